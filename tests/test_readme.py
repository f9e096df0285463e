"""The README and the documentation say what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import manyheads as mh
from manyheads.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"


def _python() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def test_the_python_in_the_readme_is_twelve_lines() -> None:
    assert len([line for line in _python().splitlines() if line.strip()]) == 12


def test_the_python_in_the_readme_runs(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _python()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Hydra()" in ended.stdout
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_the_commands_of_the_readme_exist() -> None:
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    verbs = re.findall(r"^manyheads (\w+)", README, re.MULTILINE)
    assert set(verbs) <= {c.callback.__name__ for c in app.registered_commands}


def test_the_five_files_to_read_first_are_there() -> None:
    files = re.findall(r"^\d\. `(.+?)`", README, re.MULTILINE)
    assert len(files) == 5
    assert all((ROOT / file).is_file() for file in files)


def test_the_tables_have_their_markers() -> None:
    assert README.count("<!-- table: demo -->") == 1
    index = (DOCS / "index.md").read_text()
    tables = re.findall(r"<!-- table: (\w+) -->", index)
    assert tables == ["demo"]
    assert index.count("<!-- /table -->") == 1


def test_the_three_papers_are_cited() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    for paper in ("2209.07484", "2402.17507", "2306.10875"):
        assert paper in README
        assert paper in citation


def test_every_public_name_is_in_the_reference() -> None:
    reference = (DOCS / "reference.md").read_text()
    documented = set(re.findall(r"^::: manyheads\.(\w+)$", reference, re.MULTILINE))
    assert documented - {"errors"} == set(mh.__all__)


def test_every_command_is_in_the_documentation() -> None:
    page = (DOCS / "command_line.md").read_text()
    for command in app.registered_commands:
        assert f"`manyheads {command.callback.__name__}" in page


def test_every_module_is_in_the_architecture() -> None:
    page = (DOCS / "architecture.md").read_text()
    rooms = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "src" / "manyheads").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert sorted(room for room in rooms if f"  {room} " not in page) == []


def test_constraints_are_names_and_exact_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", pin) for pin in pins)
    assert {"torch", "timm", "setuptools"} <= {pin.split("==")[0] for pin in pins}


def test_the_documentation_includes_every_example() -> None:
    page = (DOCS / "examples.md").read_text()
    for example in (ROOT / "examples").glob("*.py"):
        assert f'--8<-- "examples/{example.name}"' in page
