"""Cells, notes and tables in Markdown; what loses stays in and is marked with a !."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.records import date, settings

__all__ = [
    "COPY_RATE",
    "NOTHING",
    "RATES",
    "Record",
    "Row",
    "beside",
    "compile_times",
    "grown",
    "marked",
    "quartiles",
    "share",
    "shown_size",
    "spread_of",
    "state_conditions",
    "state_machine",
    "table",
]

NOTHING = "-"
# Titles of columns that hold words; a name of models is one wherever it stands.
TEXTS = (
    "form",
    "case",
    "target",
    "bound",
    "where",
    "outcome",
    "cause of a miss",
    "picked for",
)

COPY_RATE = (
    "Copy rate: bytes that must be moved over time, as a share of a plain copy's."
)
RATES = (
    "Matmul rate: multiply-adds over time, as a share of a large matrix product's. "
    "Of the promise: saved time over saved FLOPs."
)
_GROWTH_LIMIT = 1.1

Row = dict[str, Any]
Record = dict[str, Any]


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table, numbers to the right; empty columns are left out."""
    rule = ["---" if _is_text(cell) else "--:" for cell in head]
    told = [
        place
        for place, _ in enumerate(head)
        if not body or any(row[place] != NOTHING for row in body)
    ]
    lines = [[line[place] for place in told] for line in (head, rule, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_text(title: str) -> bool:
    return "model" in title or title in TEXTS


def beside(row: Row, base: Row, key: str, unit: float) -> str:
    """Show a value with its ratio to the base, marked where it is worse."""
    value, first = row.get(key), base.get(key)
    if value is None:
        return NOTHING
    scaled = value / unit
    shown = f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.4g}"
    return f"{shown} ({marked(value / first)})" if first else shown


def share(value: float | dict[str, float] | None) -> str:
    """Show a share, or the median of one; what was not measured says nothing."""
    if isinstance(value, dict):
        value = value["median"]
    return NOTHING if value is None else f"{value:.2f}"


def marked(ratio: float) -> str:
    """Show a ratio of costs, marked where it is above one."""
    shown = f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"
    return f"{shown} !" if round(ratio, 2) > 1 else shown


def spread_of(found: dict[str, float]) -> str:
    """Show a median with its quartiles."""
    return f"{found['median']:.3g} [{found['lower']:.3g}-{found['upper']:.3g}]"


def quartiles(found: dict[str, float]) -> str:
    """Show the quartiles of a ratio."""
    return f"[{found['lower']:.2f}-{found['upper']:.2f}]"


def shown_size(row: Row) -> str:
    """Show the size of the image and what it was padded to."""
    asked, fed = row["image_size"], row.get("fed_size") or row["image_size"]
    padded = f", padded to {fed[0]}x{fed[1]}" if list(fed) != list(asked) else ""
    return f"{asked[0]}x{asked[1]}{padded}"


def state_conditions(record: Record) -> str:
    """Say in a sentence or two how the rows of a record were measured."""
    counts = [row["rounds"] for row in record["rows"] if row["rounds"]] or [0]
    fewest, most = min(counts), max(counts)
    rounds = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    machine = record["conditions"]
    return (
        f"Random weights, {machine['dtype']}, {rounds} rounds, interleaved; ratios are "
        f"taken within rounds, below 1 is cheaper, ! marks worse. "
        f"{state_machine(machine)}"
    )


def grown(record: Record) -> list[str]:
    """Say how time and memory grow with tokens, as far as that was fitted."""
    notes = []
    for what, key in (("Time", "growth"), ("Peak extra memory", "memory_growth")):
        fits = ", ".join(
            f"{form} {exponent:.2f}{' !' if exponent > _GROWTH_LIMIT else ''}"
            for form, exponent in record.get(key, {}).items()
        )
        if fits:
            notes.append(
                f"{what} grows with N to the power of (from 1,024 up): {fits}."
            )
    return notes


def compile_times(record: Record) -> list[str]:
    """Say how long compiling took, where something was compiled."""
    seconds = [row["compile_s"] for row in record["rows"] if row.get("compile_s")]
    if not seconds:
        return []
    return [
        f"Compiling took {min(seconds):.0f} to {max(seconds):.0f} s a form and size, "
        "and is not part of the times."
    ]


def state_machine(machine: dict[str, Any]) -> str:
    """Name the machine, torch, settings and the date."""
    facts = [
        str(machine.get("device_name") or ""),
        f"{machine['threads']} threads" if machine.get("threads") else "",
        f"torch {machine['torch']}" if machine.get("torch") else "",
        settings({"conditions": machine}),
        date({"conditions": machine})[:10],
    ]
    return ", ".join(fact for fact in facts if fact) + "."
