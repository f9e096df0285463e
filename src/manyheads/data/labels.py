"""Class numbers out of what a data set has for labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["number_labels"]

UNKNOWN = -1


def number_labels(
    words: Sequence[int | str | None],
) -> tuple[Int[Tensor, " n"], tuple[str, ...]]:
    """Number what was written: whole numbers as they are, words in sorted order.

    Returns:
        One number each, -1 where there is none; and the words, if there are any.
    """
    known = [word for word in words if word is not None]
    try:
        numbers = {word: int(word) for word in known}
        names: tuple[str, ...] = ()
    except ValueError:
        names = tuple(sorted({str(word) for word in known}))
        place = {name: number for number, name in enumerate(names)}
        numbers = {word: place[str(word)] for word in known}
    given = [UNKNOWN if w is None else max(UNKNOWN, numbers[w]) for w in words]
    return torch.tensor(given, dtype=torch.long), names
