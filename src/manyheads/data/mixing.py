"""Mixup and CutMix of a batch, the same whichever process holds which part of it.

timm mixes an image with its mirror in the batch, the last with the first. A process
that holds a part of a batch does not have the mirrors. So here neighbours are mixed,
positions 0 with 1, 2 with 3, and parts are cut between pairs. Over shuffled images
both are the same; the blending itself is timm's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.data.augmentation import Augmentation
from manyheads.data.seeds import seeded
from manyheads.errors import DataError

__all__ = ["blend", "share"]


def share(rows: int, rank: int, world_size: int, *, unit: int = 1) -> slice:
    """Say which rows of a batch are a process's: a contiguous part, near equal.

        unit * floor(n r / W)  up to  unit * floor(n (r + 1) / W),   n = ceil(rows/unit)

    Every row is in exactly one part. A last, smaller batch may leave some process none.
    """
    units = -(-rows // unit)
    first, last = (unit * (units * r // world_size) for r in (rank, rank + 1))
    return slice(min(first, rows), min(last, rows))


def blend(
    images: Float[Tensor, "B C H W"],
    labels: Int[Tensor, " B"],
    positions: Sequence[int],
    augmentation: Augmentation,
    *,
    seed: int,
    num_classes: int | None,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B classes"] | None]:
    """Mix neighbours and soften labels, with one draw for the whole batch.

        image  = s a + (1 - s) b            mixup, s from Beta(alpha, alpha)
        image  = a outside a box, b inside  CutMix, s the area outside
        target = s smooth(label a) + (1 - s) smooth(label b)

    Args:
        images: Part of a batch.
        labels: Their class numbers; not looked at without `num_classes`.
        positions: Their places in this part before unreadable ones were dropped. An
            image whose neighbour is missing stays as it is.
        augmentation: How to mix.
        seed: What the draw comes from; the same for all parts of a batch.
        num_classes: Classes of the model; None to mix images alone.

    Returns:
        The images, and shares of classes that sum to one, or None.

    Raises:
        DataError: A label is unknown or beyond the classes.
    """
    from timm.data.mixup import Mixup, mixup_target

    targets = None
    if num_classes is not None:
        _require_labels(labels, num_classes)
        targets = mixup_target(
            labels, num_classes, smoothing=augmentation.label_smoothing
        )
    place = {position: row for row, position in enumerate(positions)}
    firsts = [p for p in positions if p % 2 == 0 and p + 1 in place]
    if not (augmentation.mixes and firsts):
        return images, targets
    # In this order every image's mirror is its neighbour.
    rows = [place[p] for p in firsts] + [place[p + 1] for p in reversed(firsts)]
    mixup = Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        prob=augmentation.mix_probability,
        switch_prob=augmentation.cutmix_share,
        label_smoothing=augmentation.label_smoothing,
        num_classes=num_classes or 1,
    )
    known = labels[rows] if num_classes else torch.zeros(len(rows), dtype=torch.long)
    with seeded(seed):
        mixed, soft = mixup(images[rows], known)
    images = images.index_copy(0, torch.tensor(rows), mixed)
    if targets is not None:
        targets = targets.index_copy(0, torch.tensor(rows), soft)
    return images, targets


def _require_labels(labels: Tensor, num_classes: int) -> None:
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise DataError(
            asked=f"shares of {num_classes} classes for a batch of {len(labels)}",
            found=f"{len(outside)} labels lie outside, {int(outside[0])} first",
            fix=f"Use labels 0 to {num_classes - 1}.",
        )
