"""Picture files: which of them a folder holds, and how one is decoded.

Decoding makes eight bits of grey or RGB out of whatever was stored, by rule and not
by accident: the rotation that the camera noted is applied, 16 bits are scaled and not
cut off, and what is transparent shows white.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from manyheads.errors import DataError

__all__ = ["Folder", "as_mode", "list_pictures", "read_picture"]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Picture files of one folder, in an order that does not depend on the disk.

    Attributes:
        root: The folder.
        files: Their paths, sorted.
        classes: Names of the subfolders directly under the root, sorted.
        labels: Position in `classes` of each file's subfolder; -1 for files that lie
            in no subfolder.
    """

    root: Path
    files: tuple[Path, ...]
    classes: tuple[str, ...]
    labels: tuple[int, ...]


def list_pictures(root: Path) -> Folder:
    """Find the picture files under a folder, by the endings that Pillow knows.

    Hidden files and folders are passed over. Nothing is opened.

    Raises:
        DataError: There is no such folder, it cannot be listed, or no file in it is a
            picture.
    """
    if not root.is_dir():
        found = "it is a file" if root.is_file() else "there is no such folder"
        raise DataError(
            asked=f"images from {root}",
            found=found,
            fix="Give a folder of pictures, with or without one subfolder per class.",
        )
    known = Image.registered_extensions()
    endings = {ending for ending, kind in known.items() if kind in Image.OPEN}
    files: list[Path] = []
    others: set[str] = set()
    for folder, below, names in os.walk(root, onerror=_refuse_listing):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() in endings:
                files.append(path)
            else:
                others.add(path.suffix.lower() or "nothing")
    if not files:
        there = f"only files ending in {', '.join(sorted(others))}" if others else None
        raise DataError(
            asked=f"images from {root}",
            found=f"it holds {there or 'no file'}",
            fix="Give a folder with .jpg, .png or other picture files.",
        )
    classes = sorted({p.relative_to(root).parts[0] for p in files if p.parent != root})
    number = {name: label for label, name in enumerate(classes)}
    labels = [number.get(path.relative_to(root).parts[0], -1) for path in files]
    return Folder(
        root=root, files=tuple(files), classes=tuple(classes), labels=tuple(labels)
    )


def read_picture(path: Path, channels: int) -> Image.Image:
    """Decode one file as eight-bit grey (1 channel) or RGB (3 channels).

    Raises:
        OSError: The file cannot be read, is cut short, or is too large to be trusted.
            Whatever a decoder raises on broken bytes comes out as this one.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return as_mode(ImageOps.exif_transpose(image), channels)
    except MemoryError:
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
    return image.convert("L" if channels == 1 else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    white = 1.0 if image.mode.startswith("F") else 65535.0
    if not (np.isfinite(values).all() and 0 <= values.min() <= values.max() <= white):
        raise ValueError(f"mode {image.mode} with values outside 0 to {white:g}")
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))


def _refuse_listing(error: OSError) -> None:
    raise DataError(
        asked=f"images from {error.filename}",
        found=f"the folder cannot be listed: {error.strerror}",
        fix="Give a folder that you may read.",
    ) from error
