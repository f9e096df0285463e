"""Runs the tests of the Triton kernels through Triton's interpreter, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if triton.__version__.startswith("3.5."):
    pytest.skip(
        "the interpreter of Triton 3.5 loses functions that a kernel calls, under the "
        "hook that checks types, and warns of its own use of NumPy without the hook",
        allow_module_level=True,
    )
HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "path", sorted(HERE.glob("test_triton_*.py")), ids=lambda path: path.stem
)
def test_every_kernel_equals_its_twin_in_the_interpreter(path: Path) -> None:
    words = ["-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow", "-rs"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "SKIPPED" not in done.stdout, done.stdout[-2000:]
