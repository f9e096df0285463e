"""Compares what an exported file does with what the model does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manyheads.artifacts.files import Artifact
from manyheads.data.exhibits import Exhibits
from manyheads.hosts import Host

__all__ = [
    "Check",
    "LabelledCheck",
    "compare",
    "compare_labelled",
    "run_at",
    "warn_of_blindness",
]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison of the written file with the model.

    Attributes:
        image_size: Height and width.
        images: Photographs in the batch.
        difference: Largest difference of two outputs, as a share of the largest.
        largest: The model's largest output; where it is 0 nothing was compared.
    """

    image_size: tuple[int, int]
    images: int
    difference: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class LabelledCheck:
    """Accuracy on the labelled images that were given, model and file."""

    images: int
    accuracy_model: float
    accuracy_file: float


def compare(
    model: nn.Module, host: Host, artifact: Artifact, shown: Exhibits
) -> Iterator[Check]:
    """Compare at the native size, and at a larger and an oblong one where they run.

    Where only the native size runs it is compared with two photographs and with one.
    """
    native = artifact.card.image.size
    sizes = [native, native]
    if artifact.card.cell is not None:
        grid = tuple(s // c for s, c in zip(native, artifact.card.cell, strict=True))
        sizes.pop()
        more = tuple(side + max(1, side // 2) for side in grid)
        for rows, columns in (more, (grid[0], more[1])):
            sizes.append(
                (rows * artifact.card.cell[0], columns * artifact.card.cell[1])
            )
    for number, size in enumerate(sizes):
        batch = shown.at(size)
        # One photograph in one of the runs: a batch that was frozen shows there.
        batch = batch[:1] if number == len(sizes) - 1 else batch
        expected = run_at(model, host, batch, resize=size != native)
        yield Check(
            image_size=size,
            images=len(batch),
            difference=_difference(artifact(batch), expected),
            largest=expected.abs().max().item(),
        )


def run_at(
    model: nn.Module, host: Host, images: Tensor, *, resize: bool = False
) -> Tensor:
    """Run the model as its library runs it at this size."""
    if resize:
        model = copy.deepcopy(model)
        host.resize(model, (images.shape[-2], images.shape[-1]))
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return host.output(host.feed(model, images.to(dtype)))


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Give the largest difference as a share of the largest output; inf if unlike."""
    wide, other = expected.double(), actual.double()
    if wide.shape != other.shape or not other.isfinite().all():
        return float("inf")
    scale = wide.abs().max().clamp_min(1e-6)
    return ((other - wide).abs().max() / scale).item()


def compare_labelled(
    model: nn.Module, host: Host, artifact: Artifact, shown: Exhibits
) -> LabelledCheck | None:
    """Give the accuracy of both on the labelled images, if there are any."""
    if shown.labels is None:
        return None
    right, count = [0, 0], 0
    for images, labels in shown.labelled(artifact.card.image.size):
        eager = run_at(model, host, images)
        for place, outputs in enumerate((eager, artifact(images))):
            right[place] += int((outputs.argmax(dim=-1) == labels).sum())
        count += len(labels)
    return LabelledCheck(
        images=count,
        accuracy_model=right[0] / count,
        accuracy_file=right[1] / count,
    )


def warn_of_blindness(checks: tuple[Check, ...], model: nn.Module) -> None:
    """Say where nothing was compared; torchvision starts classifiers at zero."""
    blind = [check for check in checks if check.largest == 0]
    if blind:
        height, width = blind[0].image_size
        warnings.warn(
            f"Exporting {type(model).__name__}: all its outputs at {height}x{width} "
            "are 0, so that a wrong file would answer the same. Export it with trained "
            "weights, or with images= that it answers.",
            RuntimeWarning,
            stacklevel=3,
        )
