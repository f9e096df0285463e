"""Tables of attention layers and of whole blocks."""

from __future__ import annotations

from benchmarks.render.cells import (
    Record,
    marked,
    quartiles,
    spread_of,
    state_conditions,
    table,
)

__all__ = ["render_layer"]


def render_layer(record: Record) -> str:
    """Show times and their ratio to the first form."""
    head = ("tokens", "batch", "form", "ms [quartiles]", "ratio [quartiles]")
    body = [
        (
            f"{row['grid'][0]} x {row['grid'][1]} + prefix",
            str(row["batch_size"]),
            row["form"],
            spread_of(row["ms"]),
            f"{marked(row['ratio']['median'])} {quartiles(row['ratio'])}",
        )
        for row in record["rows"]
    ]
    case = record["case"]
    how = "compiled" if case["compiled"] else "eager"
    note = f"{case['architecture']}, {case['part']}, {how}. {state_conditions(record)}"
    return f"{table(head, body)}\n\n{note}"
