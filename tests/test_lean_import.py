"""The package imports with its required dependencies alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import manyheads as mh

# Blocks what the extras bring, as if they were not installed.
BLOCKED = """
import sys
for name in (
    "accelerate", "datasets", "sklearn", "scipy", "matplotlib", "transformers",
    "onnx", "onnxruntime", "onnxscript", "pytest", "beartype", "hypothesis",
):
    sys.modules[name] = None
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
