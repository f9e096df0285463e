"""What Triton kernels need around a launch: the device, the shares, a mask or none.

Imported only together with the kernels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Plan", "masked", "on_device_of", "share_out"]

# Elements of one tile: 32 float32 a thread with four warps, so that several programs
# share a multiprocessor and their loads cover each other's waiting.
_TILE = 4096
# Programs that fill a large chip a few times over. Part of the order of summation, so
# it is one number for all devices.
_PROGRAMS = 1024
# Partial sums are written and read in float32: at least this many tiles before one.
_LEAST_TILES = 4


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches there, wherever x is."""
    # torch leaves this class without types.
    guard: AbstractContextManager[Any] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
    return guard


def masked(key_mask: Tensor | None, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Give a mask and its strides; without one, a pointer that is never followed."""
    return (x, (0, 0)) if key_mask is None else (key_mask, key_mask.stride())


class Plan(NamedTuple):
    """How the tokens of a tensor [B, N, D] are shared out among programs.

    Attributes:
        images: Images ``B``.
        sizes: Tokens N, width D, tokens of one program, programs of one image.
        options: Block sizes and launch options.
    """

    images: int
    sizes: tuple[int, int, int, int]
    options: dict[str, Any]

    @property
    def programs(self) -> int:
        """Programs in all; none where there is nothing to do."""
        return self.images * self.sizes[3] if self.sizes[1] else 0

    def room(self, like: Tensor) -> Tensor:
        """Make room for the partial sums, a row a program."""
        shape = self.images * self.sizes[3], self.sizes[1]
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        return like.new_empty(shape, dtype=dtype)


def share_out(x: Tensor) -> Plan:
    """Cut every image into runs of tokens, as many as fill the chip."""
    B, N, D = x.shape
    block_d = triton.next_power_of_2(max(1, D))
    most = triton.next_power_of_2(max(1, N))
    block_n = min(most, max(1, _TILE // block_d))
    tiles = triton.cdiv(N, block_n)
    wanted = min(triton.cdiv(tiles, _LEAST_TILES), triton.cdiv(_PROGRAMS, max(1, B)))
    run = block_n * triton.cdiv(tiles, max(1, wanted))
    return Plan(
        images=B,
        sizes=(N, D, run, triton.cdiv(N, run) if run else 0),
        options={
            "WIDE": tl.float64 if x.dtype is torch.float64 else tl.float32,
            "BLOCK_N": block_n,
            "BLOCK_D": block_d,
            "num_warps": min(16, max(1, block_n * block_d // 1024)),
            "enable_fp_fusion": True,
        },
    )
