"""What all Triton kernels need around a launch: the right device, a mask that may lack.

Imported only together with the kernels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

__all__ = ["masked", "on_device_of", "type_of_sums", "wide_dtype"]


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches there, wherever x is."""
    # torch leaves this class without types.
    guard: AbstractContextManager[Any] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
    return guard


def wide_dtype(x: Tensor) -> torch.dtype:
    """Name torch's type of sums: float32 for half types."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def type_of_sums(x: Tensor) -> Any:
    """Name Triton's type of sums."""
    return tl.float64 if x.dtype is torch.float64 else tl.float32


def masked(key_mask: Tensor | None, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Give a mask and its strides; without one, a pointer that is never followed."""
    return (x, (0, 0)) if key_mask is None else (key_mask, key_mask.stride())
