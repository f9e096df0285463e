"""Rates that times are held against: a matrix product's, and what FLOPs promise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyheads.gauges.stopwatch import Spread, ratios

__all__ = ["Matmul", "kept_promise"]

_LEAST_SAVED = 0.01
_SIDE = {"cpu": 1024, "cuda": 8192}


class Matmul:
    """A square matrix product: the rate of arithmetic that others are held against.

    It takes its turns in the same race, so that a busy machine slows both.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.side = _SIDE[device.type]
        shape = (self.side, self.side)
        self.left = torch.randn(shape, device=device, dtype=dtype)
        self.right = torch.randn(shape, device=device, dtype=dtype)
        self.out = torch.empty_like(self.left)

    def __call__(self) -> Tensor:
        """Multiply into memory that is there."""
        return torch.mm(self.left, self.right, out=self.out)

    def share(
        self, own: Sequence[float], laps: Sequence[float], multiply_adds: int
    ) -> Spread:
        """Give a contestant's multiply-adds a second as a share of this product's.

        Args:
            own: Seconds of this product, round by round.
            laps: Seconds of the contestant in the same rounds.
            multiply_adds: What the contestant does in one turn.
        """
        found, factor = ratios(own, laps), multiply_adds / self.side**3
        return Spread(
            median=factor * found.median,
            lower=factor * found.lower,
            upper=factor * found.upper,
        )


def kept_promise(ratio: float, flops: int, base: int) -> float | None:
    """Give saved time over saved FLOPs, each as a share of the base's.

    1 is time that falls as the FLOPs do; None where less than 1 % of them is saved.
    """
    saved = 1 - flops / base
    return (1 - ratio) / saved if saved > _LEAST_SAVED else None
