"""A glance at a dataset of another's making: its first item, and what tells it apart.

Items may be augmented at random, and a run over them must be able to go on all the
same. So they are read under fixed seeds, which most randomness follows, and twice;
what differs even so, from a generator of the dataset's own, tells nothing.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from manyheads.data.samples import parts_of
from manyheads.data.seeds import seeded

__all__ = ["Glance", "digest_tensor", "glance_at"]

_ITEMS = 8


class Glance(NamedTuple):
    """What a few items of a dataset are.

    Attributes:
        image: The first that can be read, whatever it is; None if none can.
        label: Its label, or -1.
        digest: Labels and contents of all, as far as they are the same each time.
    """

    image: Any
    label: int
    digest: str


def glance_at(inner: Any, count: int) -> Glance:
    """Read a few items of a dataset, evenly spread from the first to the last."""
    last = max(1, min(_ITEMS, count) - 1)
    spread = sorted({place * (count - 1) // last for place in range(last + 1)})
    once = [_read(inner, position) for position in spread]
    again = [_read(inner, position) for position in spread]
    digest = hashlib.sha256()
    for kind in (_labels, _contents):
        told = kind(once)
        digest.update(repr(told if told == kind(again) else None).encode())
    good = [(image, label) for image, label in once if image is not None]
    image, label = good[0] if good else (None, -1)
    return Glance(image, label, digest.hexdigest()[:16])


def digest_tensor(tensor: Tensor) -> str:
    """Sum up a tensor's values."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16]


def _read(inner: Any, position: int) -> tuple[Any, int]:
    with seeded(0):
        try:
            return parts_of(inner[position])
        except OSError:
            return None, -1


def _labels(items: list[tuple[Any, int]]) -> list[int]:
    return [label for _, label in items]


def _contents(items: list[tuple[Any, int]]) -> list[str]:
    return [_content(image) for image, _ in items]


def _content(image: Any) -> str:
    if isinstance(image, Tensor):
        return f"{image.dtype} {list(image.shape)} {digest_tensor(image)}"
    if isinstance(image, Image.Image):
        pixels = hashlib.sha256(image.tobytes()).hexdigest()[:16]
        return f"{image.mode} {image.size} {pixels}"
    return type(image).__name__
