"""Parts of a data set: train, validation, test; which one is meant, and which files.

The words are those of the Hugging Face hub. A name may end in the part that is wanted,
`"photos[test]"`; without it, what learns reads train and what measures reads validation
or test, so that nothing is measured on what it learned by oversight.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from manyheads.errors import DataError, nearest

__all__ = ["choose_split", "group_by_split", "split_name", "split_of", "split_word"]

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}


def split_name(text: str) -> tuple[str, str | None]:
    """Part `"name[split]"` into its name and its split, which may be missing."""
    match = re.fullmatch(r"(.+?)\[(.+)\]", text)
    return (match[1], match[2]) if match else (text, None)


def split_of(path: Path) -> str | None:
    """Read from a relative path which part a file belongs to, its own name first."""
    for name in reversed(path.parts):
        for word in re.split(r"[-._ 0-9]+", name.lower()):
            if word in _SPLIT_OF:
                return _SPLIT_OF[word]
    return None


def split_word(name: str) -> str | None:
    """Say which part a folder of exactly this name holds."""
    return _SPLIT_OF.get(name.lower())


def group_by_split(root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Sort files into parts; all are train where no name says a part.

    Raises:
        DataError: Some names say a part and others do not.
    """
    groups: dict[str, list[Path]] = {}
    unnamed = []
    for file in files:
        split = split_of(file.relative_to(root))
        if split is None:
            unnamed.append(file)
        else:
            groups.setdefault(split, []).append(file)
    if not groups:
        return {"train": unnamed}
    if unnamed:
        raise DataError(
            asked=f"images from {root}",
            found=f"its files belong to {', '.join(groups)}, but "
            f"{unnamed[0].relative_to(root)} says no such word",
            why="a part of the data would be left out",
            fix="Put train, validation or test into the name of each file, or into "
            "none.",
        )
    return groups


def choose_split(
    available: Sequence[str], asked: str | None, *, held_out: bool, where: str
) -> str:
    """Say which part is meant.

    Args:
        available: The parts there are.
        asked: The part that was named, if one was.
        held_out: Whether the images are to measure rather than to learn from.
        where: What the user gave.

    Raises:
        DataError: It is not there, or several are and none is the usual one.
    """
    if asked is not None:
        wanted = _SPLIT_OF.get(asked, asked)
        for name in (asked, wanted):
            if name in available:
                return name
        raise DataError(
            asked=f"the part {asked!r} of {where}",
            found=f"there is {', '.join(available)}",
            fix=nearest(asked, available),
        )
    if len(available) == 1:
        return available[0]
    for name in ("validation", "test") if held_out else ("train",):
        if name in available:
            return name
    raise DataError(
        asked=f"images from {where}",
        found=f"it has the parts {', '.join(available)}",
        fix=f'Say which: "{where}[{available[0]}]".',
    )
