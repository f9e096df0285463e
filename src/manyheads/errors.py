"""Every exception the package raises.

A message has up to five parts, always in this order: what was asked, what is there,
where, why the rule exists, and what to do. The parts are keyword arguments, so that
no raise site can forget one and tests can look at the facts instead of the prose.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

__all__ = [
    "CheckpointError",
    "CostError",
    "DataError",
    "GeometryMismatch",
    "ImageSizeError",
    "InvalidOption",
    "InvalidRecipe",
    "ManyheadsError",
    "MapsTooLarge",
    "MaskRefused",
    "MissingExtra",
    "NonFiniteLoss",
    "NotExportable",
    "NotHealable",
    "NothingToConvert",
    "SwapRefused",
    "UnknownHost",
    "UnknownModel",
    "nearest",
]

_Error = TypeVar("_Error", bound="ManyheadsError")


class ManyheadsError(Exception):
    """Root of all errors of this package; catch it to catch them all.

    Args:
        asked: What the caller asked for, with its value.
        found: What is there instead, with values and not types alone.
        fix: A call or an action that works.
        where: Block path, file or option at which it happened.
        why: Why the rule exists, half a line.
    """

    def __init__(
        self, *, asked: str, found: str, fix: str, where: str = "", why: str = ""
    ) -> None:
        self.asked, self.found, self.fix = asked, found, fix
        self.where, self.why = where, why
        place = f" (at {where})" if where else ""
        reason = f" {why[0].upper()}{why[1:]}." if why else ""
        super().__init__(f"{asked}, but {found}{place}.{reason} {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        parts = {key: self.__dict__[key] for key in ("asked", "found", "fix")}
        parts |= {"where": self.where, "why": self.why}
        return (_rebuild, (type(self), parts))

    @classmethod
    def many(cls: type[_Error], problems: Iterable[_Error]) -> _Error:
        """Join problems of one kind into one error, so that none waits for a rerun."""
        listed = list(problems)
        if len(listed) == 1:
            return listed[0]
        first = listed[0]
        others = "; ".join(f"{p.found} (at {p.where})" for p in listed[1:])
        return cls(
            asked=first.asked,
            found=f"{first.found} (at {first.where}); {others}",
            why=first.why,
            fix=first.fix,
        )


def _rebuild(kind: type[ManyheadsError], parts: dict[str, str]) -> ManyheadsError:
    return kind(**parts)


class InvalidOption(ManyheadsError, ValueError):
    """An argument has a value that no call could use."""


class InvalidRecipe(ManyheadsError, ValueError):
    """A recipe contradicts itself or its JSON is not one this version reads."""


class NothingToConvert(ManyheadsError, ValueError):
    """The recipe asks for blocks that this model does not have."""


class SwapRefused(ManyheadsError, ValueError):
    """A block exists, but the mechanism cannot carry what its layer does."""


class GeometryMismatch(ManyheadsError, ValueError):
    """Sizes that must fit each other do not."""


class ImageSizeError(ManyheadsError, ValueError):
    """An image size gives no valid token grid for this model."""


class MaskRefused(ManyheadsError, ValueError):
    """A mask reached a mechanism that cannot honour it exactly."""


class MapsTooLarge(ManyheadsError, ValueError):
    """More attention maps were asked for than should be held in memory."""


class UnknownHost(ManyheadsError, TypeError):
    """No host knows the blocks of this model."""


class UnknownModel(ManyheadsError, ValueError):
    """A model was named that no library registers and no folder holds."""


class NotHealable(ManyheadsError, ValueError):
    """Student and teacher do not fit each other, or nothing was converted."""


class NotExportable(ManyheadsError, ValueError):
    """A model cannot be exported, or what was written differs from it."""


class NonFiniteLoss(ManyheadsError, ArithmeticError):
    """A loss became infinite or NaN; names the step and the block."""


class CheckpointError(ManyheadsError, ValueError):
    """A checkpoint is missing, cut short, foreign, or cannot be written."""


class DataError(ManyheadsError, ValueError):
    """A data source is empty, unreadable or of the wrong kind."""


class CostError(ManyheadsError, ValueError):
    """The model cannot be walked without data, so nothing can be counted."""


class MissingExtra(ManyheadsError, ImportError):
    """An optional dependency is needed; the fix is the exact pip line."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Say which choices exist and, if one is close, which was probably meant."""
    known = list(choices)
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    meant = f"Did you mean {close[0]!r}? " if close else ""
    return f"{meant}Choose from {', '.join(known)}."
