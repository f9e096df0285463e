"""Tables of whole models."""

from __future__ import annotations

from typing import Any

from benchmarks.render.cells import (
    NOTHING,
    RATES,
    Record,
    Row,
    beside,
    compile_times,
    marked,
    share,
    shown_size,
    state_conditions,
    table,
)

__all__ = ["render_models"]


def render_models(record: Record) -> str:
    """Show parameters, FLOPs, time and memory beside those of the first model."""
    head = (
        "image",
        "batch",
        "model",
        "M parameters",
        "GFLOPs",
        "ms [quartiles]",
        "ratio [quartiles]",
        "of the promise",
        "matmul rate",
        "peak MiB",
        "of it running",
    )
    body = []
    base: Row = {}
    for row in record["rows"]:
        if not base or _at(row) != _at(base):
            base = row
        if "problem" in row:
            body.append(_without_numbers(row, len(head)))
            continue
        low, high = row["latency_quartiles_ms"]
        least, most = row["ratio_quartiles"]
        body.append(
            (
                shown_size(row),
                str(row["batch_size"]),
                row["name"],
                beside(row, base, "parameters", 1e6),
                beside(row, base, "flops", 1e9),
                f"{row['latency_ms']:.4g} [{low:.4g}-{high:.4g}]",
                f"{marked(row['ratio'])} [{least:.2f}-{most:.2f}]",
                share(row.get("promise_kept")),
                share(row.get("share_of_matmul_rate")),
                beside(row, base, "peak_mib", 1),
                beside(row, base, "extra_mib", 1),
            )
        )
    how = "compiled" if record["case"]["compiled"] else "eager"
    warned = sorted({w for row in record["rows"] for w in row.get("warnings", ())})
    what = f"{record['case']['architecture']}, {how}."
    note = f"{what} {RATES} {state_conditions(record)}"
    return "\n\n".join([table(head, body), note, *warned, *compile_times(record)])


def _without_numbers(row: Row, width: int) -> tuple[str, ...]:
    """Say in the row itself why it has no numbers."""
    told = (shown_size(row), str(row["batch_size"]), f"{row['name']}: {row['problem']}")
    return (*told, *[NOTHING] * (width - len(told)))


def _at(row: Row) -> tuple[Any, ...]:
    return (*row["image_size"], row["batch_size"])
