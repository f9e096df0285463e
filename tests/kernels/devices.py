"""Where Triton kernels are tested: in Triton's interpreter, or on a GPU.

The interpreter must be asked for before Triton is imported, so its tests run in a
process of their own, which `test_interpreter.py` starts. `pytest -m gpu` runs the same
tests compiled.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICES = [
    pytest.param(
        "cpu",
        id="interpreter",
        marks=pytest.mark.skipif(
            not INTERPRETED, reason="test_interpreter.py runs it, with TRITON_INTERPRET"
        ),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU"
            ),
        ],
    ),
]
