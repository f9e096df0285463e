"""What a program that is being exported will run on, as far as attention must know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ["fuses_attention", "tracing_for_onnx"]

_FOR_ONNX = ContextVar("for_onnx", default=False)


@contextmanager
def tracing_for_onnx() -> Iterator[None]:
    """Say that what is traced here becomes ONNX; torch learns it only afterwards."""
    before = _FOR_ONNX.set(True)
    try:
        yield
    finally:
        _FOR_ONNX.reset(before)


def fuses_attention() -> bool:
    """Say whether the exported program will call torch's fused attention.

    ONNX has the products and the softmax in its place: maps are built whatever the
    widths, and padding would only widen a product.
    """
    return not (_FOR_ONNX.get() or torch.onnx.is_in_onnx_export())
