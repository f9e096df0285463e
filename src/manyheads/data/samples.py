"""Single images of a source: from a file, a tensor, or another dataset.

What cannot be read comes back as a reason in place of an image, because a batch must
be able to go on without it.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from manyheads.data.pictures import Folder, as_mode, read_picture
from manyheads.hosts import ImageInput

__all__ = [
    "FileSamples",
    "Item",
    "Preprocessing",
    "Request",
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
    """Which image is wanted, and the seed of its augmentation if it gets one."""

    position: int
    seed: int | None


class Preprocessing:
    """The model's own preprocessing, fixed or with random crops and flips."""

    def __init__(self, wanted: ImageInput) -> None:
        self.channels = wanted.channels
        size = (wanted.channels, *wanted.size)
        common = {
            "mean": wanted.mean,
            "std": wanted.std,
            "interpolation": wanted.interpolation,
        }
        self.fixed = create_transform(size, crop_pct=wanted.crop, **common)
        self.random = create_transform(
            size, is_training=True, color_jitter=0.0, **common
        )

    def __call__(self, picture: Image.Image, seed: int | None) -> Tensor:
        """Make the tensor; with a seed, always the same crop and flip."""
        if seed is None:
            ready: Tensor = self.fixed(picture)
            return ready
        # timm draws from Python's generator, torchvision from torch's.
        before = random.getstate()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            try:
                ready = self.random(picture)
            finally:
                random.setstate(before)
        return ready


class FileSamples(Dataset[Item]):
    """Pictures of a folder, decoded and preprocessed."""

    def __init__(self, folder: Folder, preprocess: Preprocessing) -> None:
        self.folder, self.preprocess = folder, preprocess

    def __getitem__(self, request: Request) -> Item:
        path = self.folder.files[request.position]
        label = self.folder.labels[request.position]
        name = str(path.relative_to(self.folder.root))
        try:
            picture = read_picture(path, self.preprocess.channels)
        except OSError as error:
            return Item(None, label, name, str(error))
        return Item(self.preprocess(picture, request.seed), label, name)


class TensorSamples(Dataset[Item]):
    """Images of one tensor, as they are."""

    def __init__(self, images: Tensor, labels: Tensor | None) -> None:
        self.images, self.labels = images, labels

    def __getitem__(self, request: Request) -> Item:
        label = -1 if self.labels is None else int(self.labels[request.position])
        return Item(self.images[request.position], label, f"image {request.position}")


class WrappedSamples(Dataset[Item]):
    """Another dataset's items, told apart by their form."""

    def __init__(self, inner: Any, preprocess: Preprocessing | None) -> None:
        self.inner, self.preprocess = inner, preprocess

    def __getitem__(self, request: Request) -> Item:
        name = f"item {request.position}"
        try:
            image, label = parts_of(self.inner[request.position])
        except OSError as error:
            return Item(None, -1, name, str(error))
        if isinstance(image, Image.Image) and self.preprocess is not None:
            picture = as_mode(image, self.preprocess.channels)
            image = self.preprocess(picture, request.seed)
        return Item(image, label, name)


def parts_of(item: Any) -> tuple[Any, int]:
    """Split (image, label) and leave a lone image without a label."""
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], int(item[1])
    return item, -1
