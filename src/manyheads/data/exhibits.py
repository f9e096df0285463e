"""Images that a model is shown for checking or drawing, at whatever size is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.data.folders import list_pictures
from manyheads.data.photographs import prepare_files, sample_photographs
from manyheads.errors import DataError
from manyheads.hosts import ImageInput

__all__ = ["Exhibits", "Images", "exhibits"]

Images = str | Path | Tensor | tuple[Tensor, Tensor]
"""A picture file, a folder, preprocessed images [B, C, H, W], or these with labels."""

_SHOWN, _BATCH = 4, 16


@dataclass(frozen=True, eq=False)
class Exhibits:
    """Images from files or from a tensor, with labels where they are known.

    Attributes:
        wanted: The preprocessing of the model that is to see them.
        source: Files, or images that are already preprocessed.
        labels: One class number each, or None.
        names: What they are called in a record of conditions.
    """

    wanted: ImageInput
    source: tuple[Path, ...] | Float[Tensor, "B C H W"]
    labels: Int[Tensor, " B"] | None
    names: tuple[str, ...]

    def at(self, size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
        """Give the first four at this height and width."""
        return self._part(slice(_SHOWN), size)

    def labelled(self, size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Give all of them with their labels, batch by batch."""
        if self.labels is None:
            return
        for start in range(0, len(self.labels), _BATCH):
            part = slice(start, start + _BATCH)
            yield self._part(part, size), self.labels[part]

    def _part(self, part: slice, size: tuple[int, int]) -> Tensor:
        if not isinstance(self.source, Tensor):
            return prepare_files(self.source[part], self.wanted, size)
        chosen = self.source[part]
        if chosen.shape[-2:] == size:
            return chosen
        return F.interpolate(chosen, size, mode="bilinear", antialias=True)


def exhibits(images: Images | None, wanted: ImageInput) -> Exhibits:
    """Take what a caller has; None stands for two photographs.

    Raises:
        DataError: There is no picture, or a tensor is of the wrong form.
        MissingExtra: Nothing was given and scikit-learn is not installed.
    """
    if images is None:
        images = sample_photographs()[0].parent
    if isinstance(images, str | Path):
        path = Path(images)
        if path.is_file():
            return Exhibits(wanted, (path,), None, (path.name,))
        folder = list_pictures(path)
        known = min(folder.labels) >= 0
        labels = torch.tensor(folder.labels) if known else None
        shown = tuple(file.name for file in folder.files[:_SHOWN])
        return Exhibits(wanted, folder.files, labels, shown)
    tensor, labels = images if isinstance(images, tuple) else (images, None)
    _require_form(tensor, labels, wanted.channels)
    names = (f"tensor {list(tensor.shape)}",)
    floating = tensor.detach().float().cpu()
    return Exhibits(
        wanted, floating, labels.cpu() if labels is not None else None, names
    )


def _require_form(images: Tensor, labels: Tensor | None, channels: int) -> None:
    found = ""
    if images.ndim != 4 or images.shape[1] != channels or not images.shape[0]:
        found = f"their shape is {list(images.shape)}"
    elif not images.is_floating_point():
        found = f"their type is {images.dtype}"
    elif labels is not None and labels.shape != images.shape[:1]:
        found = f"there are {list(labels.shape)} labels for {images.shape[0]} images"
    if found:
        raise DataError(
            asked="showing a model these images",
            found=found,
            fix=f"Pass preprocessed images [B, {channels}, H, W] of a floating type, "
            "alone or as (images, labels) with labels [B].",
        )
