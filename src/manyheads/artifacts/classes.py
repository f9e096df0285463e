"""Classes of an exported model: as many names as outputs, and labels that fit them."""

from __future__ import annotations

import warnings

from jaxtyping import Int
from torch import Tensor

from manyheads.errors import DataError

__all__ = ["one_each", "require_scores"]


def one_each(names: tuple[str, ...], count: int, *, whose: str) -> tuple[str, ...]:
    """Give the class names if there is one for each output, else numbers, and say so.

    A classifier that was replaced by hand leaves the names of the old one behind. An
    embedding has no names and keeps none.
    """
    if not names or len(names) == count:
        return names
    warnings.warn(
        f"{whose}: there are {len(names)} class names for {count} outputs, so the "
        "names are left out and classes are numbered from 0.",
        RuntimeWarning,
        stacklevel=3,
    )
    return tuple(map(str, range(count)))


def require_scores(
    labels: Int[Tensor, " n"] | None, outputs: Tensor, *, scored: bool, whose: str
) -> None:
    """Refuse labels that say nothing of these outputs, before anything is written.

    Raises:
        DataError: The outputs are features, or have no place for the highest label.
    """
    if labels is None:
        return
    asked = f"the accuracy of {whose} on labelled images"
    if not scored:
        raise DataError(
            asked=asked,
            found=f"it gives features {list(outputs.shape[1:])}",
            why="labels are compared with scores, one for each class",
            fix="Give the images without labels: a tensor alone, pictures in one "
            "folder, or a table without a column of labels.",
        )
    highest, count = int(labels.max()), outputs.shape[-1]
    if highest >= count:
        raise DataError(
            asked=asked,
            found=f"label {highest} is given and the outputs are 0 to {count - 1}",
            why="a class's number is its place among the outputs",
            fix="Give labels that number the outputs from 0; those of a folder are the "
            "places of its subfolders' names, sorted.",
        )
