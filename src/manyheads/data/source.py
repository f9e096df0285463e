"""Image sources: whatever the user has, as batches that one model can read.

A source is a folder of pictures, a torch dataset, a tensor of images that are already
preprocessed, or such a tensor with labels. Pictures get the preprocessing that the
model's library recorded; tensors are taken as they are, after a look at their shape,
type and values.

Which image comes when is a function of (seed, epoch) and how it is augmented one of
(seed, epoch, image), so that a run can start again in the middle of an epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from manyheads.data.pictures import Folder, list_pictures
from manyheads.data.samples import (
    FileSamples,
    Item,
    Preprocessing,
    Request,
    TensorSamples,
    WrappedSamples,
    parts_of,
)
from manyheads.errors import DataError, InvalidOption
from manyheads.hosts import ImageInput, find_host

__all__ = ["Batch", "ImageSource", "Images", "image_source", "mix"]

Images = str | Path | Tensor | tuple[Tensor, Tensor] | Dataset[Any]
"""What every verb takes as `images`."""

_SHOWN = 3
_NONE = (torch.empty(0), torch.empty(0, dtype=torch.long))


class Batch(NamedTuple):
    """Images with their labels; -1 stands for a label that is not known."""

    images: Tensor
    labels: Tensor


@dataclass(kw_only=True)
class ImageSource:
    """Images for one model, in any order asked for, with a list of what was skipped.

    Attributes:
        items: The dataset; it answers a `Request` with an `Item`.
        where: What the user gave, for messages.
        identity: What makes this source another than others, as JSON values.
        labelled: Whether every image has a label.
        labels: All labels, or None where only the items can tell.
        classes: Names of the classes where folders gave them.
        max_unreadable: Share of unreadable pictures at which a run stops.
        skipped: Unreadable pictures met so far, with the reason of each.
    """

    items: Dataset[Item]
    size: int
    where: str
    identity: dict[str, Any]
    labelled: bool
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    max_unreadable: float | int = 0.1
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.size

    def order(self, seed: int, epoch: int) -> list[int]:
        """Shuffle all images, in the same way for the same seed and epoch."""
        generator = torch.Generator().manual_seed(mix(seed, "order", epoch))
        order: list[int] = torch.randperm(len(self), generator=generator).tolist()
        return order

    def batches(
        self,
        order: Sequence[int],
        batch_size: int,
        *,
        start: int = 0,
        augment_seed: int | None = None,
        num_workers: int = 0,
    ) -> Iterator[Batch]:
        """Load the images in this order; unreadable ones are missing from their batch.

        Args:
            order: Positions of images.
            batch_size: Images per batch; the last one may be smaller.
            start: Batches at the beginning that are passed over without loading.
            augment_seed: Seed of the random crops and flips of pictures; None for the
                fixed preprocessing.
            num_workers: Processes that load; 0 for this one.

        Raises:
            DataError: An image has the wrong shape or is not finite, or more pictures
                than allowed cannot be read.
        """
        requests = [
            Request(i, None if augment_seed is None else mix(augment_seed, "image", i))
            for i in order
        ]
        chunks = [
            requests[at : at + batch_size]
            for at in range(start * batch_size, len(requests), batch_size)
        ]
        if not num_workers:
            for chunk in chunks:
                yield self._stack([self.items[request] for request in chunk])
            return
        loader: DataLoader[Item] = DataLoader(
            self.items,
            batch_sampler=chunks,
            collate_fn=_as_list,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(0),
        )
        for items in loader:
            yield self._stack(items)

    def sample(self, count: int) -> Batch:
        """Load about `count` images, evenly spread; at least one that can be read."""
        step = max(1, len(self) // count)
        spread = range(0, len(self), step)[:count]
        parts = [part for part in self.batches(spread, 64) if len(part.images)]
        if not parts:
            rest = self.batches(range(len(self)), 1)
            parts = [next((part for part in rest if len(part.images)), Batch(*_NONE))]
        if not len(parts[0].images):
            raise self.too_many()
        return Batch(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _stack(self, items: Sequence[Item]) -> Batch:
        for item in items:
            if item.image is None:
                self.skipped[item.name] = item.problem
        if len(self.skipped) > self.max_unreadable * len(self):
            raise self.too_many()
        good = [item for item in items if item.image is not None]
        images = [item.image for item in good if item.image is not None]
        for item in good:
            if problem := _tensor_problem(item.image, images[0].shape):
                raise DataError(
                    asked=f"images from {self.where}",
                    found=problem,
                    where=item.name,
                    fix="Give float images [C, H, W] of one size with finite values.",
                )
        labels = torch.tensor([item.label for item in good], dtype=torch.long)
        return Batch(torch.stack(images) if images else _NONE[0], labels)

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


def image_source(
    model: nn.Module,
    images: Images,
    *,
    labelled: bool,
    max_unreadable: float | int = 0.1,
) -> ImageSource:
    """Make a source for this model out of what the user has.

    Args:
        model: A hosted model; its library says what preprocessing pictures need.
        images: A folder (flat, or one subfolder per class), a map-style torch dataset
            of images or of (image, label), a preprocessed tensor [n, C, H, W], or such
            a tensor with labels [n]. Pictures in a dataset are preprocessed, tensors
            are taken as they are.
        labelled: Whether labels are needed.
        max_unreadable: Share of unreadable pictures at which to stop.

    Raises:
        DataError: The source is missing, empty, of the wrong kind, holds values that
            are not finite, or lacks the labels that are needed.
        InvalidOption: `max_unreadable` is no share.
        UnknownHost: No host knows the model.
    """
    if not 0 <= max_unreadable < 1:
        raise InvalidOption(
            asked=f"max_unreadable={max_unreadable}",
            found="it is a share of all pictures, from 0 up to below 1",
            fix="Use max_unreadable=0 to stop at the first, 0.1 for a tenth.",
        )
    wanted = find_host(model)[0].image_input(model)
    if isinstance(images, str | Path):
        source = _from_folder(list_pictures(Path(images)), wanted)
    elif isinstance(images, Tensor):
        source = _from_tensors(images, None, wanted)
    elif isinstance(images, tuple) and all(isinstance(x, Tensor) for x in images):
        source = _from_tensors(*_pair(images), wanted)
    else:
        source = _from_dataset(images, wanted)
    source.max_unreadable = max_unreadable
    if labelled and not source.labelled:
        raise _no_labels(source.where)
    return source


def mix(*parts: int | str) -> int:
    """Make one seed out of several numbers and names, all of which matter."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7])


def _from_folder(folder: Folder, wanted: ImageInput) -> ImageSource:
    if wanted.channels not in (1, 3):
        raise DataError(
            asked=f"images from {folder.root}",
            found=f"the model wants {wanted.channels} channels",
            why="picture files give 1 (grey) or 3 (RGB)",
            fix=f"Give a tensor of images [n, {wanted.channels}, H, W].",
        )
    listing = hashlib.sha256()
    for path in folder.files:
        entry = f"{path.relative_to(folder.root)}\0{path.stat().st_size}\0"
        listing.update(entry.encode("utf-8", "surrogateescape"))
    return ImageSource(
        items=FileSamples(folder, Preprocessing(wanted)),
        size=len(folder.files),
        where=str(folder.root),
        identity={
            "kind": "folder",
            "images": len(folder.files),
            "digest": listing.hexdigest()[:16],
        },
        labelled=min(folder.labels) >= 0,
        labels=torch.tensor(folder.labels),
        classes=folder.classes,
    )


def _from_tensors(
    images: Tensor, labels: Tensor | None, wanted: ImageInput
) -> ImageSource:
    shape = list(images.shape)
    problem = None
    if images.ndim != 4 or not len(images):
        problem = f"its shape is {shape}, not [n, C, H, W] with at least one image"
    elif shape[1] != wanted.channels:
        problem = f"it has {shape[1]} channels and the model wants {wanted.channels}"
    elif not images.is_floating_point():
        problem = f"its type is {images.dtype}: that is not preprocessed yet"
    elif not images.isfinite().all():
        bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        problem = f"image {bad[0]} and {len(bad) - 1} others hold NaN or infinity"
    elif labels is not None:
        problem = _label_problem(labels, len(images))
    if problem:
        raise DataError(
            asked=f"images as a tensor {shape}",
            found=problem,
            fix=f"Give a float tensor [n, {wanted.channels}, {wanted.size[0]}, "
            f"{wanted.size[1]}], normalised as the model wants it, or a folder.",
        )
    identity = {"kind": "tensor", "shape": shape, "digest": _digest(images)}
    if labels is not None:
        identity["labels"] = _digest(labels)
    return ImageSource(
        items=TensorSamples(images, labels),
        size=len(images),
        where=f"a tensor {shape}",
        identity=identity,
        labelled=labels is not None,
        labels=labels,
    )


def _from_dataset(images: Any, wanted: ImageInput) -> ImageSource:
    kind = type(images).__name__
    sized = isinstance(images, Dataset) and not isinstance(images, IterableDataset)
    try:
        count = len(images) if sized else 0
    except (TypeError, NotImplementedError):
        sized, count = False, 0
    if not count:
        raise DataError(
            asked=f"images from a {kind}",
            found="it is empty" if sized else "it is no source of images",
            why="a run that can be resumed needs a length and items by number",
            fix="Give a folder, a map-style torch dataset, a tensor [n, C, H, W], or "
            "a pair of tensors (images, labels).",
        )
    first, label = parts_of(images[0])
    if not isinstance(first, Tensor | Image.Image):
        raise DataError(
            asked=f"images from a {kind}",
            found=f"an item is a {type(first).__name__}",
            where="item 0",
            fix="Items are a tensor [C, H, W] or a picture, alone or with a label: "
            "(image, label).",
        )
    plain = isinstance(first, Tensor)
    return ImageSource(
        items=WrappedSamples(images, None if plain else Preprocessing(wanted)),
        size=count,
        where=f"a {kind}",
        identity={
            "kind": kind,
            "images": count,
            "first": _digest(first) if isinstance(first, Tensor) else first.size,
        },
        labelled=label >= 0,
    )


def _pair(images: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    if len(images) == 2:
        return images[0], images[1]
    raise DataError(
        asked=f"images as {len(images)} tensors",
        found="a source is one tensor of images or a pair (images, labels)",
        fix="Give (images, labels).",
    )


def _label_problem(labels: Tensor, count: int) -> str | None:
    if labels.ndim != 1 or len(labels) != count:
        return f"its labels are {list(labels.shape)}, not [n] = [{count}]"
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return f"its labels are {labels.dtype}, not class numbers"
    return f"label {int(labels.min())} is negative" if labels.min() < 0 else None


def _tensor_problem(image: object, shape: torch.Size) -> str | None:
    if not isinstance(image, Tensor):
        return f"it is a {type(image).__name__}, not a tensor"
    if image.ndim != 3 or image.shape != shape or not image.is_floating_point():
        return f"it is {image.dtype} {list(image.shape)}, others are {list(shape)}"
    return None if image.isfinite().all() else "it holds NaN or infinity"


def _no_labels(where: str) -> DataError:
    return DataError(
        asked=f"labelled images from {where}",
        found="not every image has a label",
        why="training and evaluation compare with labels; heal() needs none",
        fix="Give one subfolder per class, (images, labels), or a dataset of pairs.",
    )


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16]


def _as_list(items: list[Item]) -> list[Item]:
    return items
