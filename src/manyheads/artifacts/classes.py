"""Classes of an exported model: as many names as outputs, and labels that fit them."""

from __future__ import annotations

import warnings

__all__ = ["one_each"]


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
