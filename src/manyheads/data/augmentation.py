"""What training does to images before the model sees them, as one frozen value.

Touvron et al. 2021, Training data-efficient image transformers (DeiT), 2012.12877.
Its parts: random resized crops (Szegedy et al. 2015, 1409.4842), RandAugment (Cubuk et
al. 2020, 1909.13719), random erasing (Zhong et al. 2020, 1708.04896), mixup (Zhang et
al. 2018, 1710.09412), CutMix (Yun et al. 2019, 1905.04899), label smoothing (Szegedy
et al. 2016, 1512.00567), repeated augmentation (Berman et al. 2019, 1902.05509).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from manyheads.errors import InvalidOption, nearest
from manyheads.specs import Spec

__all__ = ["Augmentation"]

Range = tuple[float | int, float | int]


@dataclass(frozen=True, kw_only=True, repr=False)
class Augmentation(Spec):
    """Random changes to training images; without arguments, none.

        per image   crop -> flip -> RandAugment or colour jitter -> normalise -> erase
        per batch   mixup or CutMix of pairs of images; labels become shares of classes

    What happens to an image is a function of (seed, epoch, image), what happens to a
    batch one of (seed, epoch, batch): never of the process that does it.

    Tensors get crops, flips, erasing and mixing as pictures do, at their own size.
    RandAugment and colour jitter are defined on pixels of pictures and are refused on
    tensors.

    Args:
        crop_area: Share of the picture's area that is cut out, from and to, and scaled
            to the model's size; None keeps the crop of evaluation.
        crop_ratio: Width over height of that part, from and to.
        crop_padding: Instead of `crop_area`: pixels added on each side of the image of
            evaluation before it is cut at a random place, as is usual at 32 pixels.
        flip: Probability of exchanging left and right.
        rand_magnitude: Strength of RandAugment from 0 to 10; None leaves it out.
        rand_spread: Standard deviation of that strength from image to image.
        rand_operations: Operations drawn per image, each done with probability 0.5.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        erasing: Probability of filling a rectangle, 2 to 33 % of the area, with noise.
        mixup: Alpha of the beta distribution of mixup's shares; 0 leaves it out.
        cutmix: Alpha of the beta distribution of CutMix's areas; 0 leaves it out.
        mix_probability: Probability that a batch is mixed at all.
        cutmix_share: Probability of CutMix rather than mixup where both are on.
        label_smoothing: Share of a label that is spread over all classes.
        repeats: Times that an image is in an epoch, each time augmented anew. The
            epoch keeps its length and sees one in `repeats` of all images.

    Raises:
        InvalidOption: A number is out of range, or two options exclude each other.
    """

    crop_area: Range | None = None
    crop_ratio: Range = (3 / 4, 4 / 3)
    crop_padding: int | None = None
    flip: float | int = 0.0
    rand_magnitude: int | None = None
    rand_spread: float | int = 0.5
    rand_operations: int = 2
    color_jitter: float | int = 0.0
    erasing: float | int = 0.0
    mixup: float | int = 0.0
    cutmix: float | int = 0.0
    mix_probability: float | int = 1.0
    cutmix_share: float | int = 0.5
    label_smoothing: float | int = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        problems = [problem for check in (_ranges, _pairs) for problem in check(self)]
        if problems:
            raise InvalidOption.many(problems)

    @classmethod
    def none(cls) -> Augmentation:
        """Leave images as evaluation sees them."""
        return cls()

    @classmethod
    def light(cls) -> Augmentation:
        """Random resized crops and flips, as the Inception networks were trained."""
        return cls(crop_area=(0.08, 1.0), flip=0.5)

    @classmethod
    def deit(cls) -> Augmentation:
        """Everything of the DeiT recipe, with its published values."""
        return cls(
            crop_area=(0.08, 1.0),
            flip=0.5,
            rand_magnitude=9,
            erasing=0.25,
            mixup=0.8,
            cutmix=1.0,
            label_smoothing=0.1,
            repeats=3,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Augmentation:
        """Read what `to_json` gave, or the part of it that differs from the defaults.

        Raises:
            InvalidOption: A name is unknown, or a value is out of range.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise InvalidOption(
                    asked=f"an augmentation with {name}={values[name]!r}",
                    found="there is no such option",
                    fix=nearest(name, known),
                )
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**plain)

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return bool((self.mixup or self.cutmix) and self.mix_probability)

    @property
    def softens(self) -> bool:
        """Whether a label becomes shares of several classes."""
        return self.mixes or self.label_smoothing > 0

    @property
    def needs_pictures(self) -> bool:
        """Whether a part of it is not defined on tensors."""
        return self.rand_magnitude is not None or self.color_jitter > 0


_RANGES = {
    "flip": (0, 1),
    "rand_magnitude": (0, 10),
    "rand_spread": (0, 100),
    "rand_operations": (1, 15),
    "color_jitter": (0, 1),
    "erasing": (0, 1),
    "mixup": (0, 100),
    "cutmix": (0, 100),
    "mix_probability": (0, 1),
    "cutmix_share": (0, 1),
    "label_smoothing": (0, 0.99),
    "crop_padding": (1, 4096),
    "repeats": (1, 100),
}


def _ranges(given: Augmentation) -> Iterable[InvalidOption]:
    for name, (low, high) in _RANGES.items():
        value = getattr(given, name)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            yield _problem(f"{name}={value}", f"it lies from {low} to {high}", name)
    for name in ("crop_area", "crop_ratio"):
        value = getattr(given, name)
        most = 1.0 if name == "crop_area" else math.inf
        if value is not None and not 0 < value[0] <= value[1] <= most:
            bounds = "0 < from <= to" + (" <= 1" if most == 1 else "")
            yield _problem(f"{name}={value}", f"its bounds are {bounds}", name)


def _pairs(given: Augmentation) -> Iterable[InvalidOption]:
    if given.crop_area is not None and given.crop_padding is not None:
        asked = f"crop_area={given.crop_area}, crop_padding={given.crop_padding}"
        yield _problem(asked, "a picture is cropped in one way", "crop_padding")
    if given.rand_magnitude is not None and given.color_jitter:
        asked = (
            f"rand_magnitude={given.rand_magnitude}, color_jitter={given.color_jitter}"
        )
        found = "RandAugment changes colours already"
        yield _problem(asked, found, "color_jitter")


def _problem(asked: str, found: str, option: str) -> InvalidOption:
    return InvalidOption(
        asked=asked,
        found=found,
        where=option,
        fix="Start from Augmentation.light() or Augmentation.deit() and change one "
        "option with dataclasses.replace().",
    )
