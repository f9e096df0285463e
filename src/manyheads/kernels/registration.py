"""What all operators share: how autocast sees them, and whether Triton is there."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from manyheads.errors import InvalidOption

__all__ = ["has_triton", "register_autocast", "require_triton"]

# torch leaves this class without types.
_LIBRARY: Any = torch.library.Library("manyheads", "FRAGMENT")  # type: ignore[no-untyped-call]
_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


@cache
def has_triton() -> bool:
    """Say whether Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def require_triton(x: Tensor, asked: str) -> None:
    """Refuse a Triton kernel that was asked for by name where none can run.

    Triton's interpreter, switched on by TRITON_INTERPRET=1, takes tensors on the CPU.

    Raises:
        InvalidOption: There is no Triton, or the tensor is not on a GPU.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if has_triton() and (x.device.type == "cuda" or interpreted):
        return
    missing = "Triton is not installed" if not has_triton() else "Triton runs on GPUs"
    raise InvalidOption(
        asked=asked,
        found=f"the tensors are on {x.device} and {missing}",
        fix="Leave form=None: it takes what runs here.",
    )


def register_autocast(name: str, *, projected: int) -> None:
    """Run an operator of ours in the type that autocast gives matrix products.

    That is how torch treats its own fused attention. Its `register_autocast` wants one
    type at import, whatever type the user asks autocast for; here it is looked up with
    each call. float64 stays as it is, as with torch's own operators.

    Args:
        name: The operator's, without the library's.
        projected: How many of the first arguments are projected tokens, which are
            cast; parameters and masks behind them stay as they are.
    """
    overload = getattr(torch.ops.manyheads, name).default
    for device, key in _DEVICES.items():
        _LIBRARY.impl(name, _cast_and_call(overload, device, projected), key)


def _cast_and_call(overload: Any, device: str, projected: int) -> Any:
    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            cast = (_cast(x, dtype, device) for x in args[:projected])
            return overload(*cast, *args[projected:])

    return kernel


def _cast(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return x if x.dtype is torch.float64 or x.device.type != device else x.to(dtype)
