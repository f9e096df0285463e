"""Pictures of the study: read once, kept as bytes, augmented ahead of time.

An image is asked for by a number alone, so random crops and flips are drawn before:
copy c of image i is shifted and flipped as the seed says, always in the same way. One
pass over `copies` copies is `copies` epochs with fresh augmentation.
"""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

__all__ = ["FOLDER_OF", "Data", "MissingData", "Views", "read_data"]

SIZE, MARGIN = 32, 4
FOLDER_OF = {
    "cifar10": "MANYHEADS_CIFAR10",
    "fashion": "MANYHEADS_FASHION_MNIST",
}
"""Environment variable that may name the folder of each data set."""


class MissingData(Exception):
    """The data of a study is not where it was looked for."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """One data set: pictures [n, 3, 32, 32] of bytes, and their labels [n].

    Attributes:
        name: Its name.
        train: Pictures and labels to learn from.
        test: Pictures and labels to measure on.
        digest: What tells these pictures from others.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    digest: str


class Views(Dataset[Any]):
    """Views of pictures: plain, or several copies, each shifted and flipped its way.

    Args:
        pictures: Bytes [n, 3, 32, 32] and labels [n].
        count: Views in all; beyond n the pictures begin again, augmented anew. None
            for each picture once.
        seed: What shifts and flips come from; None for plain pictures.
        labelled: Whether an item is (image, label) or an image.
        flips: Whether a picture may be mirrored; letters and clothes read otherwise.
        size: Height and width to which a picture is enlarged at last.
    """

    def __init__(
        self,
        pictures: tuple[Tensor, Tensor],
        *,
        count: int | None = None,
        seed: int | None = None,
        labelled: bool = True,
        flips: bool = True,
        size: int = SIZE,
    ) -> None:
        self.size = size
        self.images, self.labels = pictures
        self.count, self.labelled = count or len(self.images), labelled
        self.moves: list[list[int]] | None = None
        self.order = torch.arange(self.count) % len(self.images)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            # The whole set is drawn in another order each time it begins again, so
            # that a number of views below n is a random subset.
            rounds = -(-self.count // len(self.images))
            shuffled = [
                torch.randperm(len(self.images), generator=generator)
                for _ in range(rounds)
            ]
            self.order = torch.cat(shuffled)[: self.count]
            shape = (self.count, 2)
            shifts = torch.randint(0, 2 * MARGIN + 1, shape, generator=generator)
            mirrored = torch.randint(0, 2, (self.count, 1), generator=generator)
            self.moves = torch.cat([shifts, mirrored * int(flips)], dim=1).tolist()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        at = int(self.order[number])
        image = self.images[at]
        if self.moves is not None:
            down, right, mirrored = self.moves[number]
            padded = F.pad(image, (MARGIN, MARGIN, MARGIN, MARGIN))
            image = padded[:, down : down + SIZE, right : right + SIZE]
            image = image.flip(-1) if mirrored else image
        ready = image.float() / 127.5 - 1.0
        if self.size != SIZE:
            size = (self.size, self.size)
            ready = F.interpolate(ready[None], size, mode="bicubic")[0].clamp(-1, 1)
        return (ready, int(self.labels[at])) if self.labelled else ready

    def tensor(self) -> Tensor:
        """Give all images as one tensor."""
        items = (self[number] for number in range(self.count))
        return torch.stack([item[0] if self.labelled else item for item in items])


@lru_cache(maxsize=1)
def read_data(name: str, folder: str | None) -> Data:
    """Read a data set from the folder that holds it.

    Raises:
        MissingData: The folder is not named, not there, or lacks a file.
    """
    if not folder:
        raise MissingData(
            f"where the {name} data lies is not known: give --data-{name} FOLDER, or "
            f"set {FOLDER_OF[name]}"
        )
    train, test = (_READERS[name](Path(folder), part) for part in ("train", "test"))
    digest = hashlib.sha256()
    for pictures, labels in (train, test):
        digest.update(pictures.numpy().tobytes())
        digest.update(labels.numpy().tobytes())
    return Data(name=name, train=train, test=test, digest=digest.hexdigest()[:16])


def _cifar10(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read Parquet with columns `image` (a struct with `bytes`) and `label`."""
    files = sorted(folder.glob(f"{part}-*.parquet"))
    if not files:
        raise MissingData(f"{folder} holds no {part}-*.parquet")
    pictures, labels = [], []
    for file in files:
        table = parquet.read_table(file, columns=["image", "label"]).to_pydict()
        pictures += [
            _pixels(Image.open(io.BytesIO(x["bytes"]))) for x in table["image"]
        ]
        labels += table["label"]
    return _packed(pictures, labels)


def _fashion(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read gzipped IDX files, grey 28 x 28: padded to 32, in three channels."""
    stem = {"train": "train", "test": "t10k"}[part]
    images = _idx(folder / f"{stem}-images-idx3-ubyte.gz", 16)
    labels = torch.from_numpy(_idx(folder / f"{stem}-labels-idx1-ubyte.gz", 8)).long()
    side = int((len(images) / len(labels)) ** 0.5)
    grey = torch.from_numpy(images).reshape(-1, 1, side, side)
    margin = (SIZE - side) // 2
    padded = F.pad(grey, (margin, margin, margin, margin))
    return padded.expand(-1, 3, -1, -1).contiguous(), labels


def _idx(path: Path, header: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read()[header:], dtype=np.uint8).copy()
    except FileNotFoundError:
        raise MissingData(f"{path.parent} holds no {path.name}") from None


def _pixels(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return pixels.permute(2, 0, 1)


def _packed(pictures: Sequence[Tensor], labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.stack(list(pictures)).contiguous(), torch.tensor(labels)


_READERS: dict[str, Callable[[Path, str], tuple[Tensor, Tensor]]] = {
    "cifar10": _cifar10,
    "fashion": _fashion,
}
