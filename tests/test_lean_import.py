"""The package imports with its required dependencies alone, and loads little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import manyheads as mh

# Blocks what the extras bring, as if they were not installed.
BLOCKED = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "accelerate", "datasets", "sklearn", "scipy", "matplotlib", "transformers",
            "onnx", "onnxruntime", "onnxscript", "pytest", "beartype", "hypothesis",
        }:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def _run(code: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_every_public_name_and_the_terminal_come_without_extras() -> None:
    names = "; ".join(f"mh.{name}" for name in mh.__all__)
    _run(f"{BLOCKED}\nimport manyheads as mh\n{names}\nimport manyheads.cli")


def test_what_needs_an_extra_names_the_pip_line(tmp_path: Path) -> None:
    said = _run(
        f"{BLOCKED}\nimport sys\nfrom manyheads.cli import main\n"
        "sys.stderr = sys.stdout\n"
        f"code = main(['demo', '--quick', '--out', {str(tmp_path)!r}])\n"
        "print(code)"
    )
    assert 'pip install "manyheads[train]"' in said
    assert said.strip().endswith("2")


def test_importing_the_package_loads_none_of_the_heavy_libraries() -> None:
    loaded = _run("import sys, manyheads; print(*sys.modules)").split()
    assert not {"timm", "torchvision", "sklearn", "matplotlib", "typer"} & set(loaded)
