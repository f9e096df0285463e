"""Batches dealt out to processes, and what these have to agree on before each.

Before a batch is looked at, processes tell each other how many of its images they
could read, whether one of them was asked to stop, and whether one of them failed. So
every mean is taken over the images of all, all stop at the same step, and none waits
for another that is gone.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from manyheads.data import Augmentation, Batch, ImageSource
from manyheads.loop.devices import Processes

__all__ = ["Portion", "portions"]

_STOPS = (signal.SIGINT, signal.SIGTERM)
_NOTHING = Batch(torch.empty(0), torch.empty(0, dtype=torch.long))


class Portion(NamedTuple):
    """This process's part of one batch.

    Attributes:
        batch: Its images; none if the part is empty.
        images: Images of all processes together.
        stop: The signal by which some process was asked to stop, or 0.
    """

    batch: Batch
    images: int
    stop: int


def portions(
    processes: Processes,
    source: ImageSource,
    order: Sequence[int],
    batch_size: int,
    *,
    start: int = 0,
    augment_seed: int | None = None,
    augmentation: Augmentation | None = None,
    num_classes: int | None = None,
    num_workers: int = 0,
    received: Callable[[], int] = lambda: 0,
) -> Iterator[Portion]:
    """Deal batches out; every process gets as many portions, if empty ones.

    Args:
        processes: Who shares.
        source: The images; what any process could not read is noted in all.
        order: Positions of the images of the epoch.
        batch_size: Images of a batch, all processes together.
        start: Batches that are passed over without loading.
        augment_seed: Seed of augmentation; None for none.
        augmentation: What it does; None for random crops and flips of pictures.
        num_classes: Classes of the model, where augmentation mixes their labels.
        num_workers: Loading processes of each process.
        received: Gives the signal that this process received, or 0.

    Raises:
        DataError: In all processes alike, if one of them cannot go on.
    """
    batches = source.batches(
        order,
        batch_size,
        start=start,
        augment_seed=augment_seed,
        augmentation=augmentation,
        num_classes=num_classes,
        num_workers=num_workers,
        rank=processes.index,
        world_size=processes.count,
    )
    known = _share_skipped(processes, source)
    for _ in range(start, math.ceil(len(order) / batch_size)):
        batch, problem = _NOTHING, None
        try:
            batch = next(batches, _NOTHING)
        except Exception as error:
            if processes.count == 1:
                raise
            problem = error
        asked = [int(received() == number) for number in _STOPS]
        images, failed, news, *stops = processes.sum(
            len(batch.images), problem is not None, len(source.skipped) > known, *asked
        )
        if failed:
            processes.agree(problem)
        if news:
            known = _share_skipped(processes, source)
        stop = next((n for n, count in zip(_STOPS, stops, strict=True) if count), 0)
        yield Portion(batch, int(images), int(stop))


def _share_skipped(processes: Processes, source: ImageSource) -> int:
    """Note in every process what one of them could not read, and how many that is."""
    if processes.count > 1:
        for skipped in processes.gather(source.skipped):
            source.skipped.update(skipped)
        if len(source.skipped) > source.max_unreadable * len(source):
            raise source.too_many()
    return len(source.skipped)
