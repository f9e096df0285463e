"""How one picture is decoded, in bounded memory.

Decoding makes eight bits of grey or RGB out of whatever was stored, by rule and not
by accident: the rotation that the camera noted is applied, 16 bits are scaled and not
cut off, and what is transparent shows white.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

__all__ = ["TooLarge", "as_mode", "read_picture"]

MAX_PIXELS = 100_000_000
"""Largest picture that is decoded whole; JPEG files beyond it are read reduced."""
_REDUCED_ABOVE = 16_000_000


class TooLarge(OSError):
    """A picture that would take memory without bound."""


def read_picture(
    file: str | Path | BytesIO, channels: int, *, at_least: int = 1024
) -> Image.Image:
    """Decode one file as eight-bit grey (1 channel) or RGB (3 channels).

    Memory is bounded whatever the file claims: a JPEG of more than 16 million pixels
    is decoded at a half, a quarter or an eighth of its size, any other picture of more
    than 100 million pixels is refused before it is decoded.

    Args:
        file: A path, or an open file at its beginning.
        channels: 1 for grey, 3 for RGB.
        at_least: Pixels of the shorter side that a reduced reading keeps.

    Raises:
        OSError: The file cannot be read, is cut short, or is too large. Whatever a
            decoder raises on broken bytes comes out as this one.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; the limit here is an error instead.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                _bound(image, at_least)
                image.load()
                return as_mode(ImageOps.exif_transpose(image), channels)
    except (MemoryError, TooLarge):
        raise
    # Decoders raise nearly anything on broken bytes: SyntaxError, struct.error, ...
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def as_mode(image: Image.Image, channels: int) -> Image.Image:
    """Bring a decoded picture to grey or RGB of eight bits.

    Sixteen-bit grey is divided by 257, so that its white stays white; floating grey is
    read as 0 to 1. What is transparent is laid on white.

    Raises:
        ValueError: Values beyond these ranges, for which no white point is agreed.
    """
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    if image.mode in ("LAB", "HSV"):
        image = image.convert("RGB")  # There is no direct way to grey.
    return image.convert("L" if channels == 1 else "RGB")


def _bound(image: Image.Image, at_least: int) -> None:
    """Have large JPEG files decoded reduced; refuse what stays too large."""
    if image.width * image.height > _REDUCED_ABOVE and image.format == "JPEG":
        image.draft(None, (2 * at_least, 2 * at_least))
    if image.width * image.height > MAX_PIXELS:
        raise TooLarge(
            f"it has {image.width}x{image.height} pixels, more than "
            f"{MAX_PIXELS // 1_000_000} million"
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    white = 1.0 if image.mode.startswith("F") else 65535.0
    if not (np.isfinite(values).all() and 0 <= values.min() <= values.max() <= white):
        raise ValueError(f"mode {image.mode} with values outside 0 to {white:g}")
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))
