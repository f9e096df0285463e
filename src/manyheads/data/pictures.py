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
from PIL.JpegImagePlugin import JpegImageFile

__all__ = ["TooLarge", "as_mode", "read_picture"]

MAX_PIXELS = 100_000_000
"""Largest picture that is decoded whole; JPEG files beyond it are read reduced."""
_REDUCED_ABOVE = 16_000_000
_MORE = f"more than {MAX_PIXELS // 1_000_000} million"
_JPEG = b"\xff\xd8\xff"


class TooLarge(OSError):
    """A picture that would take memory without bound."""


def read_picture(
    file: str | Path | BytesIO, channels: int, *, at_least: int = 1024
) -> Image.Image:
    """Decode one file as eight-bit grey (1 channel) or RGB (3 channels).

    Memory is bounded whatever the file claims: a JPEG of more than 16 million pixels
    is decoded at a half, a quarter or an eighth of its size, any other picture of more
    than 100 million pixels is refused before it is decoded. So is a progressive JPEG:
    its decoder holds all of it, at whatever size it is read.

    Args:
        file: A path, or an open file at its beginning.
        channels: 1 for grey, 3 for RGB.
        at_least: Pixels of the shorter side that a reduced reading keeps, as long as
            no more than 100 million are left.

    Raises:
        OSError: The file cannot be read, is cut short, or is too large. Whatever a
            decoder raises on broken bytes comes out as this one.
    """
    try:
        if _is_jpeg(file):
            # Not Image.open: it refuses what claims more than 179 million pixels, by a
            # setting of the whole process. Here they are never all decoded.
            with JpegImageFile(file) as image:
                return _decoded(image, channels, at_least)
        with warnings.catch_warnings():
            # Pillow warns of large pictures; the limit here is an error instead.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return _decoded(image, channels, at_least)
    except (MemoryError, TooLarge):
        raise
    except Image.DecompressionBombError as error:
        raise TooLarge(f"it has {_MORE} pixels: {error}") from error
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


def _is_jpeg(file: str | Path | BytesIO) -> bool:
    if isinstance(file, BytesIO):
        return bytes(file.getbuffer()[: len(_JPEG)]) == _JPEG
    with open(file, "rb") as stream:
        return stream.read(len(_JPEG)) == _JPEG


def _decoded(image: Image.Image, channels: int, at_least: int) -> Image.Image:
    _bound(image, at_least)
    image.load()
    return as_mode(ImageOps.exif_transpose(image), channels)


def _bound(image: Image.Image, at_least: int) -> None:
    """Have large JPEG files decoded reduced; refuse what stays too large."""
    width, height = image.size
    if isinstance(image, JpegImageFile) and width * height > _REDUCED_ABOVE:
        part = _reduction(width, height, at_least)
        image.draft(None, (width // part, height // part))
    whole = bool(image.info.get("progressive"))
    decoded = width * height if whole else image.width * image.height
    if decoded > MAX_PIXELS:
        kind = ", as a progressive JPEG" if whole else ""
        raise TooLarge(f"it has {width}x{height} pixels{kind}, {_MORE}")


def _reduction(width: int, height: int, at_least: int) -> int:
    """Give the largest reduction that keeps enough, or a larger one that bounds it."""
    wanted = min(width, height) // (2 * at_least)
    part = next((part for part in (8, 4, 2) if part <= wanted), 1)
    while part < 8 and -(-width // part) * -(-height // part) > MAX_PIXELS:
        part *= 2
    return part


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    white = 1.0 if image.mode.startswith("F") else 65535.0
    if not (np.isfinite(values).all() and 0 <= values.min() <= values.max() <= white):
        raise ValueError(f"mode {image.mode} with values outside 0 to {white:g}")
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))
