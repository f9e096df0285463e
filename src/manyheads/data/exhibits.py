"""Images that a model is shown for checking or drawing, at whatever size is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.data.opening import Images, label_problem, open_images, pair_of
from manyheads.data.photographs import sample_photographs
from manyheads.data.source import ImageSource
from manyheads.errors import DataError
from manyheads.hosts import ImageInput

__all__ = ["Exhibits", "exhibits"]

_SHOWN, _BATCH = 4, 16


@dataclass(frozen=True, eq=False)
class Exhibits:
    """Images of a source or of a tensor, with labels where they are known.

    Attributes:
        wanted: The preprocessing of the model that is to see them.
        source: What gives pictures, or images that are already preprocessed.
        labels: One class number each, or None.
        names: What they are called in a record of conditions.
    """

    wanted: ImageInput
    source: Callable[[tuple[int, int]], ImageSource] | Float[Tensor, "B C H W"]
    labels: Int[Tensor, " B"] | None
    names: tuple[str, ...]

    def at(self, size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
        """Give the first four at this height and width.

        Raises:
            DataError: None of them can be read.
        """
        if isinstance(self.source, Tensor):
            return _scaled(self.source[:_SHOWN], size)
        source = self.source(size)
        batch = next(source.batches(range(min(_SHOWN, len(source))), _SHOWN))
        if not len(batch.images):
            raise source.too_many()
        return _scaled(batch.images, size)

    def labelled(self, size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Give all of them with their labels, batch by batch."""
        if self.labels is None:
            return
        if isinstance(self.source, Tensor):
            for start in range(0, len(self.labels), _BATCH):
                part = slice(start, start + _BATCH)
                yield _scaled(self.source[part], size), self.labels[part]
            return
        source = self.source(size)
        for batch in source.batches(range(len(source)), _BATCH):
            if len(batch.images):
                yield _scaled(batch.images, size), batch.labels


def exhibits(images: Images | None, wanted: ImageInput) -> Exhibits:
    """Take what a caller has; None stands for two photographs.

    Every picture has to be readable. Where a data set has parts, validation or test
    is taken.

    Raises:
        DataError: There is no picture, one cannot be read, or a tensor is of the
            wrong form.
        MissingExtra: Nothing was given and scikit-learn is not installed.
    """
    if images is None:
        images = sample_photographs()[0].parent
    if isinstance(images, tuple) and (not images or isinstance(images[0], Tensor)):
        return _tensors(*pair_of(images), wanted)
    if isinstance(images, Tensor):
        return _tensors(images, None, wanted)

    @cache
    def at(size: tuple[int, int]) -> ImageSource:
        return open_images(
            replace(wanted, size=size),
            images,
            labelled=False,
            max_unreadable=0,
            held_out=True,
        )

    source = at(wanted.size)
    labels = source.labels if source.labelled else None
    shown = tuple(source.items.name(i) for i in range(min(_SHOWN, len(source))))
    return Exhibits(wanted, at, labels, shown)


def _tensors(images: Tensor, labels: Tensor | None, wanted: ImageInput) -> Exhibits:
    _require_form(images, labels, wanted.channels)
    names = (f"tensor {list(images.shape)}",)
    numbers = labels.cpu() if labels is not None else None
    return Exhibits(wanted, images.detach().float().cpu(), numbers, names)


def _scaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _require_form(images: Tensor, labels: Tensor | None, channels: int) -> None:
    found = ""
    if images.ndim != 4 or images.shape[1] != channels or not images.shape[0]:
        found = f"their shape is {list(images.shape)}"
    elif not images.is_floating_point():
        found = f"their type is {images.dtype}"
    elif not images.isfinite().all():
        found = "they hold NaN or infinity"
    elif isinstance(labels, Tensor):
        found = label_problem(labels, len(images)) or ""
    elif labels is not None:
        found = f"their labels are a {type(labels).__name__}, not a tensor"
    if found:
        raise DataError(
            asked="showing a model these images",
            found=found,
            fix=f"Pass preprocessed images [B, {channels}, H, W] of a floating type, "
            "alone or as (images, labels) with a tensor of class numbers [B].",
        )
