"""Tables of attention layers and of whole blocks."""

from __future__ import annotations

from typing import Any

from benchmarks.render.cells import (
    RATES,
    Record,
    Row,
    beside,
    compile_times,
    grown,
    marked,
    quartiles,
    share,
    spread_of,
    state_conditions,
    table,
)

__all__ = ["render_layer"]


def render_layer(record: Record) -> str:
    """Show times and what they are beside the first form's."""
    head = (
        "tokens",
        "batch",
        "form",
        "MFLOPs",
        "ms [quartiles]",
        "ratio [quartiles]",
        "of the promise",
        "matmul rate",
        "MiB running",
    )
    body = []
    base: Row = {}
    for row in record["rows"]:
        if not base or _at(row) != _at(base):
            base = row
        body.append(
            (
                f"{row['grid'][0]} x {row['grid'][1]} + prefix",
                str(row["batch_size"]),
                row["form"],
                beside(row, base, "flops", 1e6),
                spread_of(row["ms"]),
                f"{marked(row['ratio']['median'])} {quartiles(row['ratio'])}",
                share(row.get("promise_kept")),
                share(row.get("share_of_matmul_rate")),
                beside(row, base, "extra_mib", 1),
            )
        )
    case = record["case"]
    how = "compiled" if case["compiled"] else "eager"
    what = f"{case['architecture']}, {case['part']}, {how}."
    notes = [f"{what} {RATES} {state_conditions(record)}", *grown(record)]
    return "\n\n".join([table(head, body), *notes, *compile_times(record)])


def _at(row: Row) -> tuple[Any, ...]:
    return (*row["grid"], row["batch_size"])
