"""The arrows, the lean import and the sizes; and proof that each check can fail."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "manyheads"
LINE_LIMIT, FUNCTION_LIMIT = 400, 60
# What importing the package may load, whatever is installed.
HEAVY = ("timm", "torchvision", "transformers", "accelerate", "datasets", "matplotlib")


def _layers() -> list[set[str]]:
    """Read the layers that pyproject.toml declares, highest first."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    return [
        {name.strip(" ()").removeprefix("manyheads.") for name in layer.split("|")}
        for layer in layers
    ]


def _imports(path: Path) -> Iterator[str]:
    """Give the package's modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            if name.startswith("manyheads."):
                yield name.split(".")[1]


def _wrong_arrows(source: Path) -> list[str]:
    layers = _layers()
    height = {name: i for i, layer in enumerate(layers) for name in layer}
    wrong = []
    for path in sorted(source.rglob("*.py")):
        home = path.relative_to(source).parts[0].removesuffix(".py")
        if home == "__init__":
            continue
        for target in set(_imports(path)) - {home}:
            if target in height and height[target] <= height[home]:
                wrong.append(f"{home} -> {target}")
    return wrong


def _lint(source: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [tool, "--no-logo", "--no-cache"],
        cwd=source.parent.parent,
        env={"PYTHONPATH": str(source.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the tree in which one verb imports another."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    copied = shutil.copytree(SOURCE, tmp_path / "src" / "manyheads")
    with (copied / "costs.py").open("a", encoding="utf-8") as file:
        file.write("\nfrom manyheads.conversion import convert  # noqa\n")
    return Path(copied)


def test_arrows_point_down() -> None:
    assert _wrong_arrows(SOURCE) == []


def test_import_linter_agrees() -> None:
    done = _lint(SOURCE)
    assert done.returncode == 0, done.stdout


def test_both_checks_of_the_arrows_can_fail(broken: Path) -> None:
    assert _wrong_arrows(broken) == ["costs -> conversion"]
    done = _lint(broken)
    assert done.returncode != 0
    assert (
        "manyheads.costs is not allowed to import manyheads.conversion" in done.stdout
    )


def test_every_module_has_a_layer() -> None:
    known = set().union(*_layers())
    modules = {p.name.removesuffix(".py") for p in SOURCE.iterdir()} - {"__pycache__"}
    assert modules - known <= {"__init__", "py.typed"}


def _loaded(source: Path, code: str) -> set[str]:
    probe = f"import sys; {code}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env={"PYTHONPATH": str(source.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_no_host_library() -> None:
    code = "import manyheads as mh; mh.Recipe, mh.Hydra, mh.convert, mh.cost, mh.load"
    assert _loaded(SOURCE, code) == set()


def test_the_check_of_the_lean_import_can_fail(tmp_path: Path) -> None:
    heavy = Path(shutil.copytree(SOURCE, tmp_path / "manyheads"))
    with (heavy / "__init__.py").open("a", encoding="utf-8") as file:
        file.write("\nimport torchvision\n")
    assert "torchvision" in _loaded(heavy, "import manyheads")


def _too_long(source: Path) -> list[str]:
    found = []
    for path in sorted(source.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > LINE_LIMIT:
            found.append(f"{path.name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                body = [n for n in node.body if not _is_docstring(n)]
                length = sum((n.end_lineno or 0) - n.lineno + 1 for n in body)
                if length > FUNCTION_LIMIT:
                    found.append(f"{path.name}: {node.name} has {length} lines")
    return found


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_files_and_functions_stay_short() -> None:
    assert _too_long(SOURCE) == []
    assert _too_long(ROOT / "benchmarks") == []


def test_the_check_of_lengths_can_fail(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("def f():\n" + "    x = 1\n" * 401)
    assert len(_too_long(tmp_path)) == 2
