"""Tables of exported models in the runtime that they are exported for."""

from __future__ import annotations

from benchmarks.render.cells import (
    Record,
    Row,
    beside,
    marked,
    quartiles,
    shown_size,
    spread_of,
    state_conditions,
    table,
)

__all__ = ["render_exported"]


def render_exported(record: Record) -> str:
    """Show FLOPs, the file's size and time beside those of the first model."""
    head = (
        "image",
        "model",
        "GFLOPs",
        "file MiB",
        "ms [quartiles]",
        "ratio [quartiles]",
    )
    body = []
    bases: dict[tuple[int, ...], Row] = {}
    for row in record["rows"]:
        base = bases.setdefault(tuple(row["image_size"]), row)
        body.append(
            (
                shown_size(row),
                row["name"],
                beside(row, base, "flops", 1e9),
                beside(row, base, "file_mib", 1),
                spread_of(row["ms"]),
                f"{marked(row['ratio']['median'])} {quartiles(row['ratio'])}",
            )
        )
    where = record["conditions"]
    note = (
        f"{record['case']['architecture']} as ONNX, batch {where['batch']}, in "
        f"{where['runtime']}. {state_conditions(record)}"
    )
    return f"{table(head, body)}\n\n{note}"
