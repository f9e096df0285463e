"""What a program that is being exported will run on, as far as attention must know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["fuses_attention", "tracing_for_onnx"]

# A plain flag: torch 2.9 cannot compile what reads a context variable, and no two
# threads can export at once, torch's own flags being plain ones too.
_for_onnx = False


@contextmanager
def tracing_for_onnx() -> Iterator[None]:
    """Say that what is traced here becomes ONNX; torch learns it only afterwards."""
    global _for_onnx
    before, _for_onnx = _for_onnx, True
    try:
        yield
    finally:
        _for_onnx = before


def fuses_attention() -> bool:
    """Say whether the exported program will call torch's fused attention.

    ONNX has the products and the softmax in its place: maps are built whatever the
    widths, and padding would only widen a product.
    """
    return not (_for_onnx or torch.onnx.is_in_onnx_export())
