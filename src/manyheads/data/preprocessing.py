"""From a picture or a tensor to what the model is fed, fixed or augmented.

The augmentations are timm's and torchvision's. Each is a function of its seed, so that
a run that starts again, or that another process shares, sees the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import (
    RandomResizedCropAndInterpolation,
    str_to_pil_interp,
)
from torch import Tensor
from torchvision import transforms

from manyheads.data.augmentation import Augmentation
from manyheads.data.photographs import frame, normalise
from manyheads.data.seeds import seeded
from manyheads.hosts import ImageInput

__all__ = ["Preprocessing"]

_STRONGEST = 9.999
"""At strength 10 timm posterises to zero bits, which Pillow refuses since 13."""


class Preprocessing:
    """The model's own preprocessing of evaluation, or an augmented one.

    Args:
        wanted: What the model's library recorded.
    """

    def __init__(self, wanted: ImageInput) -> None:
        self.wanted = wanted

    def picture(
        self, picture: Image.Image, seed: int | None, augmentation: Augmentation
    ) -> Tensor:
        """Make the tensor; with a seed, always the same augmented one."""
        if seed is None:
            return normalise(frame(picture, self.wanted), self.wanted)
        change, finish = _for_pictures(self.wanted, augmentation)
        if augmentation.crop_area is None:
            picture = frame(picture, self.wanted)
        with seeded(seed):
            ready: Tensor = finish(normalise(change(picture), self.wanted))
        return ready

    def tensor(
        self, image: Tensor, seed: int | None, augmentation: Augmentation
    ) -> Tensor:
        """Give a preprocessed image, augmented at its own size if there is a seed."""
        if seed is None or image.ndim != 3 or not image.is_floating_point():
            return image  # whoever stacks it says what is wrong
        size = (image.shape[1], image.shape[2])
        change, finish = _for_tensors(size, self.wanted.interpolation, augmentation)
        with seeded(seed):
            ready: Tensor = finish(change(image).clone())
        return ready


Change = tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]


@lru_cache(maxsize=8)
def _for_pictures(wanted: ImageInput, augmentation: Augmentation) -> Change:
    """Make what comes before normalising, and what comes after."""
    steps = _geometry(wanted.size, wanted.interpolation, augmentation)
    if augmentation.rand_magnitude is not None:
        steps.append(_rand_augment(wanted, augmentation))
    if augmentation.color_jitter:
        steps.append(transforms.ColorJitter(*[augmentation.color_jitter] * 3))
    return transforms.Compose(steps), _erasing(augmentation)


@lru_cache(maxsize=8)
def _for_tensors(
    size: tuple[int, int], interpolation: str, augmentation: Augmentation
) -> Change:
    steps = _geometry(size, interpolation, augmentation)
    return transforms.Compose(steps), _erasing(augmentation)


def _geometry(
    size: tuple[int, int], interpolation: str, augmentation: Augmentation
) -> list[Any]:
    """List the random crop and flip."""
    steps: list[Any] = []
    if augmentation.crop_area is not None:
        crop = RandomResizedCropAndInterpolation(
            size,
            scale=augmentation.crop_area,
            ratio=augmentation.crop_ratio,
            interpolation=interpolation,
        )
        steps.append(crop)
    elif augmentation.crop_padding is not None:
        steps.append(transforms.RandomCrop(size, padding=augmentation.crop_padding))
    if augmentation.flip:
        steps.append(transforms.RandomHorizontalFlip(augmentation.flip))
    return steps


def _rand_augment(wanted: ImageInput, augmentation: Augmentation) -> Any:
    """Make timm's RandAugment with operations that grow with the strength."""
    mean = tuple(min(255, round(255 * value)) for value in wanted.mean)
    policy = (
        f"rand-m{augmentation.rand_magnitude}-n{augmentation.rand_operations}"
        f"-mstd{augmentation.rand_spread:g}-inc1"
    )
    options = {
        # What moves in from outside has the mean colour; one number for grey.
        "img_mean": mean if wanted.channels == 3 else mean[0],
        "interpolation": str_to_pil_interp(wanted.interpolation),
        "magnitude_max": _STRONGEST,
    }
    return rand_augment_transform(policy, options)


def _erasing(augmentation: Augmentation) -> Callable[[Tensor], Tensor]:
    erasing: Callable[[Tensor], Tensor] = RandomErasing(
        augmentation.erasing, mode="pixel", device="cpu"
    )
    return erasing if augmentation.erasing else _as_is


def _as_is(image: Tensor) -> Tensor:
    return image
