"""An image source: batches in any order asked for, and a list of what was skipped.

Which image comes when is a function of (seed, epoch), how it is augmented one of
(seed, epoch, image), how a batch is mixed one of (seed, epoch, batch). So a run can
start again in the middle of an epoch, and several processes can share every batch.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from manyheads.data.augmentation import Augmentation
from manyheads.data.mixing import blend, share
from manyheads.data.samples import Item, Request, Samples
from manyheads.data.seeds import mix
from manyheads.errors import DataError, InvalidOption

__all__ = ["Batch", "ImageSource"]

_SHOWN = 3
_GROUP = 8
"""Images whose repeats are shuffled among each other; even, so that pairs differ."""


class Batch(NamedTuple):
    """Images with their labels; -1 stands for a label that is not known.

    Attributes:
        images: Images [B, C, H, W]; empty where none of them can be read.
        labels: Class numbers [B]. Of images that were mixed without targets, -1.
        targets: Shares of classes [B, classes] where an augmentation softens labels
            and the number of classes was given; they take the labels' place in a loss.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor | None = None


_NONE = Batch(torch.empty(0), torch.empty(0, dtype=torch.long))


@dataclass(kw_only=True)
class ImageSource:
    """Images for one model.

    Attributes:
        items: The images by number.
        where: What the user gave, for messages.
        identity: What makes this source another than others, as JSON values.
        labelled: Whether every image has a label.
        pictures: Whether images are decoded and preprocessed here; tensors are not.
        labels: All labels, or None where only the items can tell.
        classes: Names of the classes where the source gives them.
        max_unreadable: Share of unreadable pictures at which a run stops.
        skipped: Unreadable pictures met so far, with the reason of each.
    """

    items: Samples
    size: int
    where: str
    identity: dict[str, Any]
    labelled: bool
    pictures: bool = True
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    max_unreadable: float | int = 0.1
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.size

    def order(self, seed: int, epoch: int, *, repeats: int = 1) -> list[int]:
        """Shuffle all images, in the same way for the same seed and epoch.

        With `repeats`, the epoch has the same length and holds one in `repeats` of the
        images that often, near each other (Berman et al. 2019, 1902.05509). Every
        eight of them come in a row, then again in another order: the neighbours that
        mixup blends in a batch of even size are never the same image.
        """
        generator = torch.Generator().manual_seed(mix(seed, "order", epoch))
        shuffled = torch.randperm(len(self), generator=generator)
        if repeats == 1:
            order: list[int] = shuffled.tolist()
            return order
        distinct = -(-len(self) // repeats)
        groups = torch.split(shuffled[: distinct + distinct % 2], _GROUP)
        repeated = [
            group[torch.randperm(len(group), generator=generator)]
            for group in groups
            for _ in range(repeats)
        ]
        order = torch.cat(repeated)[: len(self)].tolist()
        return order

    def batches(
        self,
        order: Sequence[int],
        batch_size: int,
        *,
        start: int = 0,
        augment_seed: int | None = None,
        augmentation: Augmentation | None = None,
        num_classes: int | None = None,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """Load the images in this order; unreadable ones are missing from their batch.

        Of each batch a process of several loads its part, `rank` of `world_size`: a
        contiguous one, the parts near equal, in whole pairs where pairs are mixed. Put
        together the parts are the batch of one process, bit for bit. A part may be
        empty, as may a batch of unreadable pictures.

        Args:
            order: Positions of images; the same in all processes.
            batch_size: Images per batch of all processes together; the last one may be
                smaller.
            start: Batches at the beginning that are passed over without loading.
            augment_seed: What augmentation comes from; None for the fixed
                preprocessing.
            augmentation: What happens to images if there is a seed; None for random
                crops and flips of pictures and nothing on tensors.
            num_classes: Classes of the model, for `Batch.targets`; None for none.
            num_workers: Processes that load; 0 for this one.
            rank: Number of this process.
            world_size: Number of processes that share a batch.

        Raises:
            DataError: An image has the wrong shape or is not finite, a label is not
                known where targets are asked for, or more pictures than allowed
                cannot be read.
            InvalidOption: Tensors cannot be augmented like this, or there is no such
                rank.
        """
        if augment_seed is None:
            augmentation = Augmentation.none()
        elif augmentation is None:
            light, none = Augmentation.light(), Augmentation.none()
            augmentation = light if self.pictures else none
        self.require_augmentable(augmentation)
        if not 0 <= rank < world_size:
            raise InvalidOption(
                asked=f"part {rank} of batches for {world_size} processes",
                found="parts are numbered from 0",
                fix=f"Use rank=0 to {world_size - 1}.",
            )
        unit = 2 if augmentation.mixes else 1
        parts = _parts(len(order), batch_size, start, (rank, world_size, unit))
        requests = _requests(order, parts, augment_seed, augmentation)
        loaded = self._load(requests, num_workers)
        stacked = (self._stack(items) for items in loaded)
        if augment_seed is None or not augmentation.softens:
            return (batch for batch, _ in stacked)
        return (
            _blended(*pair, augmentation, mix(augment_seed, "batch", n), num_classes)
            for n, pair in enumerate(stacked, start)
        )

    def sample(self, count: int) -> Batch:
        """Load about `count` images, evenly spread; at least one that can be read."""
        step = max(1, len(self) // count)
        spread = range(0, len(self), step)[:count]
        parts = [part for part in self.batches(spread, 64) if len(part.images)]
        if not parts:
            rest = self.batches(range(len(self)), 1)
            parts = [next((part for part in rest if len(part.images)), _NONE)]
        if not len(parts[0].images):
            raise self.too_many()
        images = torch.cat([part.images for part in parts])
        return Batch(images, torch.cat([part.labels for part in parts]))

    def require_augmentable(self, augmentation: Augmentation) -> None:
        """Refuse what is not defined on this kind of images.

        Raises:
            InvalidOption: The source gives tensors and a part needs pictures.
        """
        if augmentation.needs_pictures and not self.pictures:
            raise InvalidOption(
                asked=f"{augmentation} for {self.where}",
                found="it gives tensors, which are normalised already",
                why="RandAugment and colour jitter are defined on pixels of pictures",
                fix="Use dataclasses.replace(augmentation, rand_magnitude=None, "
                "color_jitter=0), or give pictures.",
            )

    def too_many(self) -> DataError:
        """Say that too few pictures can be read, and which cannot."""
        count = len(self.skipped)
        shown = [f"{name} ({why})" for name, why in list(self.skipped.items())[:_SHOWN]]
        more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
        return DataError(
            asked=f"images from {self.where}",
            found=f"{count} of {len(self)} cannot be read: {', '.join(shown)}{more}",
            why=f"max_unreadable={self.max_unreadable:g} of all is the limit",
            fix="Repair or remove them, or raise max_unreadable.",
        )

    def _load(
        self, requests: Iterator[list[Request]], num_workers: int
    ) -> Iterator[list[Item]]:
        if not num_workers:
            return ([self.items[request] for request in part] for part in requests)
        loader: DataLoader[Item] = DataLoader(
            self.items,
            batch_sampler=_Once(requests),
            collate_fn=_as_list,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_pass_over_signals,
        )
        return iter(loader)

    def _stack(self, items: Sequence[Item]) -> tuple[Batch, list[int]]:
        """Make a batch, and say at which places of it there was an image."""
        for item in items:
            if item.image is None:
                self.skipped[item.name] = item.problem
        if len(self.skipped) > self.max_unreadable * len(self):
            raise self.too_many()
        good = [
            (place, item) for place, item in enumerate(items) if item.image is not None
        ]
        images = [item.image for _, item in good if item.image is not None]
        for _, item in good:
            if problem := _tensor_problem(item.image, images[0].shape):
                raise DataError(
                    asked=f"images from {self.where}",
                    found=problem,
                    where=item.name,
                    fix="Give float images [C, H, W] of one size with finite values.",
                )
        if not images:
            return _NONE, []
        labels = torch.tensor([item.label for _, item in good], dtype=torch.long)
        return Batch(torch.stack(images), labels), [place for place, _ in good]


def _blended(
    batch: Batch,
    positions: list[int],
    augmentation: Augmentation,
    seed: int,
    classes: int | None,
) -> Batch:
    if not positions:
        return batch
    images, targets = blend(
        batch.images,
        batch.labels,
        positions,
        augmentation,
        seed=seed,
        num_classes=classes,
    )
    unknown = augmentation.mixes and targets is None
    labels = torch.full_like(batch.labels, -1) if unknown else batch.labels
    return Batch(images, labels, targets)


class _Once:
    """Lists of requests for a loader, made while they are loaded, and once only."""

    def __init__(self, requests: Iterator[list[Request]]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[list[Request]]:
        return self.requests


def _parts(
    count: int, batch_size: int, start: int, whose: tuple[int, int, int]
) -> Iterator[range]:
    """Give one process's part of each batch, as positions in the order."""
    rank, world_size, unit = whose
    for first in range(start * batch_size, count, batch_size):
        batch = range(first, min(first + batch_size, count))
        yield batch[share(len(batch), rank, world_size, unit=unit)]


def _requests(
    order: Sequence[int],
    parts: Iterator[range],
    seed: int | None,
    augmentation: Augmentation,
) -> Iterator[list[Request]]:
    """Say for each part which images are wanted, and the seed of each.

    The second time that an image is in an epoch it has another seed; which time it is
    depends on the whole order, not on who loads it.
    """
    seen: Counter[int] = Counter()
    counted = 0
    for part in parts:
        wanted = []
        if augmentation.repeats > 1:
            seen.update(order[counted : part.start])
            counted = part.stop
        for at in part:
            image = order[at]
            time = (seen[image],) if seen[image] else ()
            own = None if seed is None else mix(seed, "image", image, *time)
            wanted.append(Request(image, own, augmentation))
            if augmentation.repeats > 1:
                seen[image] += 1
        yield wanted


def _tensor_problem(image: object, shape: torch.Size) -> str | None:
    if not isinstance(image, Tensor):
        return f"it is a {type(image).__name__}, not a tensor"
    if image.ndim != 3 or image.shape != shape or not image.is_floating_point():
        return f"it is {image.dtype} {list(image.shape)}, others are {list(shape)}"
    return None if image.isfinite().all() else "it holds NaN or infinity"


def _as_list(items: list[Item]) -> list[Item]:
    return items


def _pass_over_signals(_: int) -> None:
    """Leave it to the process that asked for images to stop, and when.

    Ctrl-C and `torchrun` signal a whole group of processes. Workers that died of it
    would fail the run in the middle of a step, before it is saved. They end with the
    iterator, and by themselves where the process above them is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
