"""The random changes of an `Augmentation`, made of timm's and torchvision's.

Loaded when something is augmented: nothing else in here needs these libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torchvision import transforms

from manyheads.data.augmentation import Augmentation
from manyheads.hosts import ImageInput

__all__ = ["for_pictures", "for_tensors"]

_STRONGEST = 9.999
"""At strength 10 timm posterises to zero bits, which Pillow refuses since 13."""

Change = tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]


@lru_cache(maxsize=8)
def for_pictures(wanted: ImageInput, augmentation: Augmentation) -> Change:
    """Make what happens to a picture before it is normalised, and after."""
    steps = _geometry(wanted.size, wanted.interpolation, augmentation)
    if augmentation.rand_magnitude is not None:
        steps.append(_rand_augment(wanted, augmentation))
    if augmentation.color_jitter:
        steps.append(transforms.ColorJitter(*[augmentation.color_jitter] * 3))
    return transforms.Compose(steps), _erasing(augmentation)


@lru_cache(maxsize=8)
def for_tensors(
    size: tuple[int, int], interpolation: str, augmentation: Augmentation
) -> Change:
    """Make what happens to a tensor of this size, in the same two parts."""
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
