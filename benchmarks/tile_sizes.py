"""Races tile sizes of Hydra's passes on CPU against a copy: which fits this machine?

    OMP_NUM_THREADS=1 python -m benchmarks.tile_sizes
    OMP_NUM_THREADS=2 python -m benchmarks.tile_sizes

Nothing is recorded. What wins on a quiet machine goes into `tiles` in
``kernels/hydra.py``. The least of many short rounds is told beside the median: on a
busy machine only the least means something, and only with one thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from manyheads.gauges.stopwatch import race, spread
from manyheads.kernels import hydra as kernel

_SIZES_KIB = (96, 192, 384, 768, 1536, 4096, 65536)
_SHAPES = ((8, 197, 384), (1, 1024, 768), (1, 4096, 768), (1, 8160, 768))
_WORKING_SET = 256 * 2**20


def main() -> None:
    """Print one line for each shape and size."""
    print(f"{torch.get_num_threads()} threads; copy rates by least and by median")
    for shape in _SHAPES:
        count = max(2, _WORKING_SET // (12 * torch.Size(shape).numel()))
        turn = itertools.cycle([torch.randn(3, *shape) for _ in range(count)])
        calls = {"copy": _copy(turn, shape)}
        calls |= {f"{size} KiB": _fill(turn, shape, size) for size in _SIZES_KIB}
        with torch.inference_mode():
            device = torch.device("cpu")
            laps = race(list(calls.values()), rounds=60, budget_s=30, device=device)
        least, median = min(laps[0]), spread(laps[0]).median
        for name, lap in zip(calls, laps, strict=True):
            rates = f"{least / min(lap):.2f} {median / spread(lap).median:.2f}"
            print(f"{shape!s:16} {name:10} {rates}")


def _copy(turn: Iterator[Tensor], shape: tuple[int, int, int]) -> Callable[[], object]:
    room = torch.empty(2, *shape)
    return lambda: room.copy_(next(turn)[:2])


def _fill(
    turn: Iterator[Tensor], shape: tuple[int, int, int], size: int
) -> Callable[[], object]:
    out = torch.empty(shape)

    def call() -> object:
        kernel._TILE_BYTES = size * 1024
        kernel._CACHED_TILE_BYTES = size * 1024 // torch.get_num_threads()
        return kernel.hydra_into(out, *next(turn))

    return call


if __name__ == "__main__":
    main()
