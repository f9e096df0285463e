"""Files of a folder: tables, archives or pictures, in an order that is no accident."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import Image

from manyheads.data.splits import choose_split, split_word
from manyheads.errors import DataError

__all__ = [
    "Folder",
    "list_files",
    "list_pictures",
    "picture_endings",
    "require_one_kind",
]


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

    def name(self, position: int) -> str:
        """Give a file's path under the root."""
        return str(self.files[position].relative_to(self.root))

    def open(self, position: int) -> Path | BytesIO:
        """Give a file's path."""
        return self.files[position]

    def digest(self) -> str:
        """Sum up names and sizes of all files; a link to nothing has no size."""
        listing = hashlib.sha256()
        for path in self.files:
            entry = f"{path.relative_to(self.root)}\0{_size(path)}\0"
            listing.update(entry.encode("utf-8", "surrogateescape"))
        return listing.hexdigest()[:16]


def list_files(root: Path) -> list[Path]:
    """Give all files under a folder, sorted; hidden files and folders are passed over.

    Links to folders are followed. One that leads back to a folder on the way to it is
    not: all that it could add is there already.

    Raises:
        DataError: There is no such folder, it cannot be listed, or a link in it that
            is no picture by its ending leads nowhere.
    """
    if not root.is_dir():
        found = "it is a file" if root.is_file() else "there is no such folder"
        if root.is_symlink() and not root.exists():
            found = f"it is a link to {os.readlink(root)}, which is not there"
        raise DataError(
            asked=f"images from {root}",
            found=found,
            fix="Give a folder of pictures, with or without one subfolder per class, "
            "a folder or file of .parquet or .tar, or a name such as "
            '"hub:owner/name" or "digits".',
        )
    files: list[Path] = []
    # Of folders that are still to come, where they and all above them really are.
    ways: dict[str, tuple[str, ...]] = {str(root): (os.path.realpath(root),)}
    for folder, below, names in os.walk(
        root, onerror=_refuse_listing, followlinks=True
    ):
        way = ways.pop(folder)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in list(below):
            path = os.path.join(folder, name)
            real = os.path.realpath(path) if os.path.islink(path) else ""
            real = real or os.path.join(way[-1], name)
            if real in way:
                below.remove(name)
            ways[path] = (*way, real)
        files += [Path(folder, n) for n in sorted(names) if not n.startswith(".")]
    _require_folders(root, files)
    return files


def _require_folders(root: Path, files: Sequence[Path]) -> None:
    """Refuse links to nothing that were links to folders, as far as a name can tell."""
    for path in files:
        if not path.suffix and path.is_symlink() and not os.path.exists(path):
            raise DataError(
                asked=f"images from {root}",
                found=f"{path.relative_to(root)} is a link to {os.readlink(path)}, "
                "which is not there",
                why="the images that it stood for would be left out",
                fix="Repair the link or remove it.",
            )


def require_one_kind(root: Path, files: Sequence[Path]) -> None:
    """Refuse tables, archives and pictures beside each other: one kind is read only.

    Raises:
        DataError: There is more than one kind; names what holds a single one.
    """
    kinds: dict[str, list[Path]] = {}
    for path in files:
        ending = path.suffix.lower()
        kind = "picture" if ending in picture_endings() else f"{ending} file"
        if kind in ("picture", ".parquet file", ".tar file"):
            kinds.setdefault(kind, []).append(path)
    if len(kinds) < 2:
        return
    places = []
    for kind, held in kinds.items():
        others = [path for other in kinds if other != kind for path in kinds[other]]
        shared = Path(os.path.commonpath([path.parent for path in held]))
        if not any(path.is_relative_to(shared) for path in others):
            places.append(f'"{shared}"')
        elif len(held) == 1:
            places.append(f'"{held[0]}"')
    counted = [
        f"{len(held)} {kind}{'s' if len(held) > 1 else ''} "
        f"({held[0].relative_to(root)}{', ...' if len(held) > 1 else ''})"
        for kind, held in sorted(kinds.items())
    ]
    raise DataError(
        asked=f"images from {root}",
        found=f"it holds {' and '.join(counted)}",
        why="one kind is read, and the other would be left out",
        fix=f"Give {' or '.join(places)}." if places else "Move one kind elsewhere.",
    )


def list_pictures(
    root: Path,
    *,
    files: Sequence[Path] | None = None,
    split: str | None = None,
    held_out: bool = False,
) -> Folder:
    """Find the picture files under a folder, by the endings that Pillow knows.

    Subfolders are classes. If all of them are called like parts of a data set (train,
    val, test), one of them is taken and its subfolders are classes. Nothing is opened.

    Args:
        root: The folder.
        files: All its files, where they are listed already.
        split: The part that was asked for.
        held_out: Whether the images are to measure rather than to learn from.

    Raises:
        DataError: There is no such folder, it cannot be listed, no file in it is a
            picture, or there is no such part.
    """
    listed = list_files(root) if files is None else files
    pictures = [path for path in listed if path.suffix.lower() in picture_endings()]
    if not pictures:
        others = sorted({path.suffix.lower() or "nothing" for path in listed})
        there = f"only files ending in {', '.join(others)}" if others else "no file"
        raise DataError(
            asked=f"images from {root}",
            found=f"it holds {there}",
            fix="Give a folder with .jpg, .png or other picture files.",
        )
    tops = sorted({path.relative_to(root).parts[0] for path in pictures})
    parts = {split_word(top): top for top in tops if (root / top).is_dir()}
    if len(parts) == len(tops) and None not in parts:
        names = [name for name in parts if name is not None]
        chosen = choose_split(names, split, held_out=held_out, where=str(root))
        root = root / parts[chosen]
        pictures = [path for path in pictures if path.is_relative_to(root)]
    elif split is not None:
        choose_split(["train"], split, held_out=held_out, where=str(root))
    classes = sorted(
        {p.relative_to(root).parts[0] for p in pictures if p.parent != root}
    )
    number = {name: label for label, name in enumerate(classes)}
    labels = [number.get(path.relative_to(root).parts[0], -1) for path in pictures]
    return Folder(
        root=root,
        files=tuple(pictures),
        classes=tuple(classes),
        labels=tuple(labels),
    )


@cache
def picture_endings() -> frozenset[str]:
    """Give the endings of files that Pillow reads, lower case with the dot."""
    known = Image.registered_extensions()
    return frozenset(ending for ending, kind in known.items() if kind in Image.OPEN)


def _size(path: Path) -> int | None:
    """Give a file's bytes; None where it cannot be reached, which reading will say."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _refuse_listing(error: OSError) -> None:
    raise DataError(
        asked=f"images from {error.filename}",
        found=f"the folder cannot be listed: {error.strerror}",
        fix="Give a folder that you may read.",
    ) from error
