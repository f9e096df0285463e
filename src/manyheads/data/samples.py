"""Single images of a source: from a file, a tensor, or another dataset.

What cannot be read comes back as a reason in place of an image, because a batch must
be able to go on without it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from manyheads.data.augmentation import Augmentation
from manyheads.data.pictures import as_mode, read_picture
from manyheads.data.preprocessing import Preprocessing

__all__ = [
    "Item",
    "PictureSamples",
    "Request",
    "Samples",
    "Store",
    "TensorSamples",
    "WrappedSamples",
    "parts_of",
]


class Item(NamedTuple):
    """One image of a source, or the reason why there is none."""

    image: Tensor | None
    label: int
    name: str
    problem: str = ""


class Request(NamedTuple):
    """Which image is wanted, and how it is changed if there is a seed."""

    position: int
    seed: int | None
    augmentation: Augmentation


@runtime_checkable
class Store(Protocol):
    """Where encoded pictures lie: a folder, a table, the shards of an archive."""

    def name(self, position: int) -> str:
        """Say where a picture is found, for the list of those that were skipped."""

    def open(self, position: int) -> Path | BytesIO:
        """Give the encoded picture.

        Raises:
            OSError: There is none, or it cannot be read.
        """


class Samples(Dataset[Item], ABC):
    """Images by number; answers a `Request` with an `Item`."""

    @abstractmethod
    def name(self, position: int) -> str:
        """Say what an image is called in lists and messages."""

    @abstractmethod
    def __getitem__(self, request: Request) -> Item:
        """Give one image, or the reason why there is none."""


class PictureSamples(Samples):
    """Encoded pictures of any store, decoded when asked for, and preprocessed."""

    def __init__(
        self, store: Store, labels: Tensor | None, preprocess: Preprocessing
    ) -> None:
        self.store, self.labels, self.preprocess = store, labels, preprocess
        wanted = preprocess.wanted
        self.at_least = max(1024, math.ceil(max(wanted.size) / wanted.crop))

    def name(self, position: int) -> str:
        """Ask the store."""
        return self.store.name(position)

    def __getitem__(self, request: Request) -> Item:
        position, seed, augmentation = request
        label = -1 if self.labels is None else int(self.labels[position])
        name = self.name(position)
        channels = self.preprocess.wanted.channels
        try:
            file = self.store.open(position)
            picture = read_picture(file, channels, at_least=self.at_least)
        except OSError as error:
            return Item(None, label, name, str(error))
        return Item(self.preprocess.picture(picture, seed, augmentation), label, name)


class TensorSamples(Samples):
    """Images of one tensor."""

    def __init__(
        self, images: Tensor, labels: Tensor | None, preprocess: Preprocessing
    ) -> None:
        self.images, self.labels, self.preprocess = images, labels, preprocess

    def name(self, position: int) -> str:
        """Number the image."""
        return f"image {position}"

    def __getitem__(self, request: Request) -> Item:
        position, seed, augmentation = request
        label = -1 if self.labels is None else int(self.labels[position])
        image = self.preprocess.tensor(self.images[position], seed, augmentation)
        return Item(image, label, self.name(position))


class WrappedSamples(Samples):
    """Another dataset's items, told apart by their form."""

    def __init__(self, inner: Any, preprocess: Preprocessing) -> None:
        self.inner, self.preprocess = inner, preprocess

    def name(self, position: int) -> str:
        """Number the item."""
        return f"item {position}"

    def __getitem__(self, request: Request) -> Item:
        position, seed, augmentation = request
        name = self.name(position)
        try:
            image, label = parts_of(self.inner[position])
        except OSError as error:
            return Item(None, -1, name, str(error))
        if isinstance(image, Image.Image):
            picture = as_mode(image, self.preprocess.wanted.channels)
            image = self.preprocess.picture(picture, seed, augmentation)
        elif isinstance(image, Tensor):
            image = self.preprocess.tensor(image, seed, augmentation)
        return Item(image, label, name)


def parts_of(item: Any) -> tuple[Any, int]:
    """Split (image, label) and leave a lone image without a label."""
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], int(item[1])
    return item, -1
