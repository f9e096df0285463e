"""Images that come with a dependency: real, small, and there without a network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InvalidOption, MissingExtra

__all__ = ["Digits", "digits"]


class Digits(NamedTuple):
    """Handwritten digits in two parts, each `(images, labels)` as the verbs take it."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(
    *,
    image_size: int | tuple[int, int] = 32,
    channels: int = 3,
    test_share: float = 0.25,
    seed: int = 0,
) -> Digits:
    """Read the 1,797 handwritten digits that come with scikit-learn; real and offline.

    They are 8 x 8 scans with 17 grey values, enlarged here to a size with more than a
    handful of patches and brought to -1 to 1. Both parts hold each digit in equal
    shares; the same seed always gives the same parts.

    Raises:
        MissingExtra: scikit-learn is not installed.
        InvalidOption: The size, the channels or the share is out of range.
    """
    size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if min(size) < 1 or channels < 1 or not 0 < test_share < 1:
        raise InvalidOption(
            asked=f"digits of {size[0]}x{size[1]} pixels, {channels} channels, a test "
            f"share of {test_share}",
            found="sizes are positive and a share lies between 0 and 1",
            fix="Use digits(image_size=32, channels=3, test_share=0.25).",
        )
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtra(
            asked="the handwritten digits",
            found="scikit-learn, which brings them, is not installed",
            fix='pip install "manyheads[train]"',
        ) from error
    bundle = load_digits()
    scans = torch.from_numpy(bundle.images).float()[:, None] / 16.0
    large = F.interpolate(scans, size=size, mode="bilinear", align_corners=False)
    images = (large * 2.0 - 1.0).expand(-1, channels, -1, -1).contiguous()
    labels = torch.from_numpy(bundle.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=test_share, random_state=seed, stratify=labels
    )
    return Digits((images[train], labels[train]), (images[test], labels[test]))
