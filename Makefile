# Needs Python 3.11 or later, make and a C++ compiler; everything else goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
OLDEST := .venv-oldest
STAMP := $(VENV)/.installed
RUN := . $(VENV)/bin/activate &&
WHEEL := build/wheel

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs wheel smoke unit test-oldest bench bench-all clean

help:  ## Show these lines
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

# Threads that wait by spinning slow small models down eightfold on a shared machine.
demo: $(STAMP)  ## The main job end to end on handwritten digits; writes runs/demo
	$(RUN) OMP_WAIT_POLICY=passive manyheads demo --out runs/demo

# What fails fast comes first; pytest comes last, so that its summary ends the output.
test: lint docs wheel smoke unit  ## Everything that must hold: linters, types, docs, wheel, tests

lint: $(STAMP)  ## Format, style, spelling, arrows between modules, types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) codespell
	$(RUN) lint-imports --no-logo
	$(RUN) mypy

docs: $(STAMP)  ## Build the documentation strictly, into site/
	$(RUN) NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

wheel: $(STAMP)  ## Build the wheel and import every public name from it
	rm -rf $(WHEEL) build/lib
	$(RUN) pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEEL) .
	$(RUN) pip install --quiet --no-deps --target $(WHEEL)/site $(WHEEL)/*.whl
	$(RUN) cd $(WHEEL) && PYTHONPATH=site python -c "import manyheads as m; \
	assert '$(WHEEL)/site' in m.__file__, m.__file__; [getattr(m, n) for n in m.__all__]"

smoke: $(STAMP)  ## Run every benchmark case once, tiny; check the generated tables
	$(RUN) python -m benchmarks.run --smoke
	$(RUN) python -m benchmarks.tables --check

unit: $(STAMP)  ## The tests alone
	$(RUN) OMP_NUM_THREADS=1 pytest -n 2

# The linters are of one version only, so what needs them stays out.
test-oldest: $(OLDEST)/.installed  ## The tests with the oldest versions declared, in .venv-oldest
	. $(OLDEST)/bin/activate && OMP_NUM_THREADS=1 pytest -n 2 --ignore tests/test_architecture.py

# glibc gives blocks above 32 MiB back at once; every new one is cleared page by page.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736

bench: $(STAMP)  ## Measure the quick set and record it in benchmarks/results; ten minutes
	$(RUN) $(KEEP_MEMORY) python -m benchmarks.run

bench-all: $(STAMP)  ## Measure every case that is not recorded at this commit yet
	$(RUN) $(KEEP_MEMORY) python -m benchmarks.run --all --resume

clean:  ## Remove what was built, and .venv; recorded results stay
	rm -rf $(VENV) $(OLDEST) build dist site runs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'manyheads needs Python 3.11 or later')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --upgrade -c constraints.txt pip
	$(RUN) pip install -c constraints.txt -e ".[dev]"
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	. $(OLDEST)/bin/activate && pip install --quiet --upgrade -c constraints.txt pip
	. $(OLDEST)/bin/activate && pip install -c constraints-oldest.txt -e ".[test]"
	touch $@
