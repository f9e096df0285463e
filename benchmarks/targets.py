"""Targets as data, and whether a record meets them; a miss has its cause beside it.

A target picks rows of a record, one column of them and a bound that every picked row
must keep. Causes of misses are measured and written by hand into ``reasons.json``,
by case and target.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["REASONS", "Target", "Verdict", "judge", "read_reasons"]

REASONS = Path(__file__).parent / "reasons.json"
Row = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on one column of some rows.

    Attributes:
        name: Names the target within its case; lower case, digits and underscores.
        says: What is bounded, in words that go before "at least 0.5".
        rows: Columns that a row must have with these values; a tuple offers several,
            and a size is written "1080x1920".
        column: What is bounded; a dot leads into a spread, as in "speedup.median".
        at_least: The lower bound, or None.
        at_most: The upper bound, or None.
    """

    name: str
    says: str
    rows: Mapping[str, object] = field(hash=False)
    column: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"{self.name}: give either at_least or at_most")

    @property
    def bound(self) -> str:
        """The bound in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return f"at most {self.at_most:g}"

    def holds(self, value: float) -> bool:
        """Say whether a value keeps the bound; nothing is rounded."""
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is not None and value <= self.at_most

    def worst(self, values: Sequence[float]) -> float:
        """Pick the value that is furthest on the wrong side."""
        return min(values) if self.at_least is not None else max(values)

    def picks(self, row: Row) -> bool:
        """Say whether a row is meant."""
        return all(
            _plain(row.get(key)) in wanted
            if isinstance(wanted, tuple)
            else _plain(row.get(key)) == wanted
            for key, wanted in self.rows.items()
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a record says about one target.

    Attributes:
        target: The target.
        outcome: Whether it is met; a target of which nothing was measured is neither.
        value: The worst value, or None.
        where: The row with that value, told by the columns that single it out.
        reason: The measured cause of a miss; empty where none is written.
    """

    target: Target
    outcome: Literal["hit", "missed", "not measured"]
    value: float | None = None
    where: str = ""
    reason: str = ""


def judge(
    record: Record, targets: Sequence[Target], reasons: Mapping[str, Mapping[str, str]]
) -> list[Verdict]:
    """Hold a record against its targets.

    Args:
        record: Rows, and what was fitted to them.
        targets: Of the record's case.
        reasons: By case and target, why one is missed.
    """
    rows = [*record["rows"], *fitted(record)]
    return [
        _verdict(target, rows, reasons.get(record["case"]["name"], {}))
        for target in targets
    ]


def fitted(record: Record) -> list[Row]:
    """Tell the exponents that were fitted to the rows as rows of their own."""
    return [
        {"form": form, column: exponent}
        for column in ("growth", "memory_growth")
        for form, exponent in record.get(column, {}).items()
    ]


def read_reasons(path: Path = REASONS) -> dict[str, dict[str, str]]:
    """Read the causes of missed targets, by case and target."""
    found: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _verdict(
    target: Target, rows: Sequence[Row], reasons: Mapping[str, str]
) -> Verdict:
    meant = [
        (value, row)
        for row in rows
        if target.picks(row) and (value := _at(row, target.column)) is not None
    ]
    if not meant:
        return Verdict(target=target, outcome="not measured")
    value = target.worst([value for value, _ in meant])
    where = next(row for found, row in meant if found == value)
    if target.holds(value):
        return Verdict(target=target, outcome="hit", value=value, where=_told(where))
    return Verdict(
        target=target,
        outcome="missed",
        value=value,
        where=_told(where),
        reason=reasons.get(target.name, ""),
    )


def _at(row: Row, column: str) -> float | None:
    found: Any = row
    for key in column.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return None if found is None else float(found)


def _told(row: Row) -> str:
    """Name a row as its table does."""
    parts = [str(row.get("form") or row.get("name"))]
    if "num_tokens" in row:
        parts.append(f"N = {row['num_tokens']:,}")
    if "image_size" in row:
        parts.append("{}x{}".format(*row["image_size"]))
    if row.get("batch_size", 1) != 1:
        parts.append(f"batch {row['batch_size']}")
    return ", ".join(parts)


def _plain(value: object) -> object:
    """Write sizes as tables do: 1080x1920."""
    return "x".join(map(str, value)) if isinstance(value, list) else value
