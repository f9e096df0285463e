"""Photographs as models want them: decoded in bounded memory, cropped, normalised.

The result is what the model's library computes in evaluation: resized to
``size / crop`` as its crop mode says, centre crop, mean and standard deviation. It is
computed crop first, so that a picture of one by ten thousand pixels is never blown up.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from manyheads.data.pictures import TooLarge, as_mode, read_picture
from manyheads.errors import DataError, MissingExtra
from manyheads.hosts import ImageInput

__all__ = [
    "frame",
    "misfit",
    "normalise",
    "open_photograph",
    "prepare",
    "prepare_files",
    "restore",
    "sample_photographs",
]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def open_photograph(
    path: str | Path, *, channels: int = 3, at_least: int = 1024
) -> Image.Image:
    """Decode one file as eight-bit grey or RGB, turned as the camera noted.

    Memory is bounded whatever the file claims: a JPEG of more than 16 million pixels
    is decoded at a half, a quarter or an eighth of its size, any other picture of more
    than 100 million pixels is refused before it is decoded.

    Args:
        path: The picture file.
        channels: 1 for grey, 3 for RGB.
        at_least: Pixels of the shorter side that a reduced reading keeps.

    Raises:
        DataError: The file cannot be read, is no picture, is cut short or too large.
    """
    try:
        return read_picture(path, channels, at_least=at_least)
    except TooLarge as error:
        raise DataError(
            asked=f"reading the photograph {path}",
            found=str(error),
            why="decoding it whole would take memory without bound",
            fix="Scale it down first, or store it as JPEG, which is read reduced.",
        ) from error
    except OSError as error:
        raise DataError(
            asked=f"reading the photograph {path}",
            found=str(error),
            fix="Give a picture file such as .jpg or .png that opens elsewhere.",
        ) from error


def prepare(
    image: Image.Image, wanted: ImageInput, size: tuple[int, int] | None = None
) -> Float[Tensor, "C H W"]:
    """Make the tensor that the model's library makes of this picture in evaluation.

    Args:
        image: A decoded picture; any mode.
        wanted: The model's preprocessing.
        size: Height and width in pixels; None for the native size.
    """
    return normalise(frame(image, wanted, size), wanted)


def frame(
    image: Image.Image, wanted: ImageInput, size: tuple[int, int] | None = None
) -> Image.Image:
    """Cut and scale a picture as the model's library does in evaluation."""
    height, width = size or wanted.size
    resample = _FILTERS.get(wanted.interpolation, Image.Resampling.BICUBIC)
    picture = as_mode(image, wanted.channels)
    if wanted.crop_mode == "border":
        return _bordered(picture, wanted, (height, width), resample)
    squash = wanted.crop_mode == "squash"
    box = _crop_box(image.size, (height, width), wanted.crop, squash=squash)
    return picture.resize((width, height), resample, box=box)


def normalise(image: Image.Image, wanted: ImageInput) -> Float[Tensor, "C H W"]:
    """Bring pixels to the mean and standard deviation that the model wants."""
    pixels = np.asarray(image, dtype=np.float32) / 255.0
    values = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
    mean, std = _statistics(wanted)
    return values.contiguous().sub_(mean).div_(std)


def prepare_files(
    paths: Sequence[str | Path],
    wanted: ImageInput,
    size: tuple[int, int] | None = None,
) -> Float[Tensor, "B C H W"]:
    """Read and prepare picture files, one batch.

    Raises:
        DataError: There is no file, or one cannot be read.
    """
    if not paths:
        raise DataError(
            asked="preparing photographs",
            found="no file was named",
            fix="Give one or more picture files.",
        )
    shorter = math.ceil(max(size or wanted.size) / wanted.crop)
    opened = (
        open_photograph(path, channels=wanted.channels, at_least=shorter)
        for path in paths
    )
    return torch.stack([prepare(image, wanted, size) for image in opened])


def misfit(images: Tensor, channels: int) -> str | None:
    """Say in one clause why a tensor is no batch of preprocessed images, or None."""
    shape = list(images.shape)
    if images.ndim != 4 or not len(images):
        return f"its shape is {shape}, not [n, C, H, W] with at least one image"
    if shape[1] != channels:
        return f"it has {shape[1]} channels and the model wants {channels}"
    if not images.is_floating_point():
        return f"its type is {images.dtype}: that is not preprocessed yet"
    if not images.isfinite().all():
        bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        return f"image {bad[0]} and {len(bad) - 1} others hold NaN or infinity"
    return None


def restore(
    images: Float[Tensor, "B C H W"], wanted: ImageInput
) -> Float[Tensor, "B C H W"]:
    """Undo the normalisation: values in [0, 1] as a picture shows them."""
    mean, std = _statistics(wanted)
    return (images.float().cpu() * std + mean).clamp(0, 1)


@lru_cache(maxsize=8)
def _statistics(wanted: ImageInput) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(x)[:, None, None] for x in (wanted.mean, wanted.std))
    return mean, std


def sample_photographs() -> tuple[Path, ...]:
    """Give two real photographs that come with scikit-learn, a temple and a flower.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise MissingExtra(
            asked="photographs to check with",
            found="scikit-learn, which brings two, is not installed",
            fix='pip install "manyheads[export]", or pass images=...',
        )
    folder = Path(found.origin).parent / "datasets" / "images"
    return folder / "china.jpg", folder / "flower.jpg"


def _crop_box(
    source: tuple[int, int], target: tuple[int, int], crop: float, *, squash: bool
) -> tuple[float, float, float, float]:
    """Find the part of the picture that resizing and cropping would leave.

    The picture would be scaled until it covers ``target / crop``, its sides rounded as
    torchvision (square targets) and timm (others) round them, or squashed to just that,
    then cut to the target. Where halves of a pixel are cut, transformers begins one
    pixel earlier than this and the others.
    """
    width, height = source
    covered = [math.floor(side / crop) for side in target]
    if squash:
        scaled_height, scaled_width = covered
    elif covered[0] == covered[1]:
        shorter = min(width, height)
        scaled_width, scaled_height = (
            covered[0] * side // shorter for side in (width, height)
        )
    else:
        ratio = min(height / covered[0], width / covered[1])
        scaled_width, scaled_height = round(width / ratio), round(height / ratio)
    top = round((scaled_height - target[0]) / 2)
    left = round((scaled_width - target[1]) / 2)
    across, down = width / scaled_width, height / scaled_height
    return (
        left * across,
        top * down,
        min((left + target[1]) * across, width),
        min((top + target[0]) * down, height),
    )


def _bordered(
    picture: Image.Image,
    wanted: ImageInput,
    target: tuple[int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """Scale the picture until it fits into ``target / crop`` and fill what is left.

    Rounded as timm does: down where it pads, to even where it cuts.
    """
    width, height = picture.size
    fitted = [math.floor(side / wanted.crop) for side in target]
    ratio = max(height / fitted[0], width / fitted[1])
    scaled = max(1, round(width / ratio)), max(1, round(height / ratio))
    colours = tuple(round(255 * mean) for mean in wanted.mean)
    fill = colours if len(colours) > 1 else colours[0]
    canvas = Image.new(picture.mode, (target[1], target[0]), fill)
    left, top = (
        (side - part) // 2 if part <= side else -round((part - side) / 2)
        for side, part in zip(canvas.size, scaled, strict=True)
    )
    canvas.paste(picture.resize(scaled, resample), (left, top))
    return canvas
