"""WebDataset shards: pictures in tar files, read at random through an index.

A sample is all members of one name up to its first dot: `0001.jpg` with `0001.cls`.
Shards are usually streamed and shuffled through a buffer; then no position in an epoch
can be named, and a run cannot start again at it. Here the headers are read once, and
every picture is fetched from its offset: order and resuming are those of a folder.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Int

from manyheads.data.folders import picture_endings
from manyheads.errors import DataError

__all__ = ["Shards", "index_shards"]

_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
"""Key and ending, as WebDataset parts them: at the first dot of the file's name."""
_BLOCK, _RECORD = 512, 10_240
"""Sizes that tar rounds up to: of a member, and of the file, which ends in zeros."""


@dataclass(kw_only=True)
class _Sample:
    """One sample while its shard is read; an offset of -1 stands for no picture."""

    offset: int = -1
    size: int = 0
    word: str | None = None
    picture: str = ""
    labelled_by: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """Where the pictures of some shards lie.

    Attributes:
        files: The shards.
        keys: Name of each sample, up to its first dot.
        places: Of each sample the number of its shard, the first byte of its picture
            there, -1 if it has none, and the picture's bytes.
        words: Label of each as it is written, or None.
    """

    files: tuple[Path, ...]
    keys: tuple[str, ...]
    places: Int[np.ndarray, "n 3"]
    words: tuple[str | None, ...]

    def name(self, position: int) -> str:
        """Give shard and key."""
        return f"{self.files[self.places[position, 0]].name}:{self.keys[position]}"

    def open(self, position: int) -> Path | BytesIO:
        """Read one picture's bytes."""
        shard, first, size = self.places[position].tolist()
        if first < 0:
            raise OSError("the sample has no picture")
        # Opened anew: an open file's position would be shared by worker processes.
        with self.files[shard].open("rb") as file:
            file.seek(first)
            return BytesIO(file.read(size))

    def digest(self) -> str:
        """Sum up shards, keys, places and labels."""
        listing = hashlib.sha256(self.places.tobytes())
        words = (word or "" for word in self.words)
        names = "\0".join([*(file.name for file in self.files), *self.keys, *words])
        listing.update(names.encode("utf-8", "surrogateescape"))
        return listing.hexdigest()[:16]


def index_shards(files: Sequence[Path]) -> Shards:
    """Read the headers of shards; pictures stay where they are.

    Time grows with the number of members, not with their bytes.

    Raises:
        DataError: A file is no plain tar or is cut short, a sample has two pictures
            or two labels, or there is no sample.
    """
    keys: list[str] = []
    places: list[tuple[int, int, int]] = []
    words: list[str | None] = []
    for number, file in enumerate(files):
        for key, sample in _read_headers(file).items():
            keys.append(key)
            places.append((number, sample.offset, sample.size))
            words.append(sample.word)
    if not any(offset >= 0 for _, offset, _ in places):
        raise DataError(
            asked=f"images from {', '.join(map(str, files[:3]))}",
            found=f"{len(files)} shards hold no picture",
            fix="Give tar files with members such as 0001.jpg and 0001.cls.",
        )
    return Shards(
        files=tuple(files),
        keys=tuple(keys),
        places=np.array(places, dtype=np.int64),
        words=tuple(words),
    )


def _read_headers(file: Path) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    end = 0
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                match = _MEMBER.fullmatch(member.name)
                if not member.isreg() or match is None:
                    continue
                key, ending = match[1], match[2].lower()
                sample = samples.setdefault(key, _Sample())
                if ending == "cls":
                    _require_first(sample.labelled_by, member, file, "labels")
                    sample.word = _label(tar, member, file)
                    sample.labelled_by = member.name
                elif f".{ending.rpartition('.')[2]}" in picture_endings():
                    _require_first(sample.picture, member, file, "pictures")
                    sample.offset, sample.size = member.offset_data, member.size
                    sample.picture = member.name
    except (tarfile.TarError, OSError) as error:
        raise _broken(file, f"{type(error).__name__}: {error}") from error
    _require_whole(file, end)
    return samples


def _require_first(
    earlier: str, member: tarfile.TarInfo, file: Path, kind: str
) -> None:
    if earlier:
        raise DataError(
            asked=f"images from {file}",
            found=f"{earlier} and {member.name} are {kind} of one sample",
            why="which of them is meant would be a guess",
            fix="Write shards with one picture and one .cls member per sample.",
        )


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> str | None:
    stored = tar.extractfile(member)
    try:
        return (stored.read().decode().strip() if stored else "") or None
    except UnicodeDecodeError as error:
        raise DataError(
            asked=f"labelled images from {file}",
            found=f"{member.name} is not text",
            fix="Write a class number or a class name into each .cls member.",
        ) from error


def _require_whole(file: Path, end: int) -> None:
    """Refuse what tarfile passes over: it takes a broken header for the end."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(end)
        rest = opened.read(_RECORD + _BLOCK)
    if size < end:
        raise _broken(file, f"it is cut short: {size:,} of at least {end:,} bytes")
    if rest.strip(b"\0") or size - end > _RECORD + _BLOCK:
        raise _broken(file, f"what follows byte {end:,} is no member of a tar file")


def _broken(file: Path, found: str) -> DataError:
    return DataError(
        asked=f"images from {file}",
        found=found,
        why="how many images are lost is not known",
        fix="Fetch or write it again; plain .tar, not compressed and not joined.",
    )
