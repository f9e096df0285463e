"""Tables of the ways to mix values that are wider than queries."""

from __future__ import annotations

from benchmarks.render.cells import (
    NOTHING,
    RATES,
    Record,
    marked,
    quartiles,
    share,
    spread_of,
    state_conditions,
    table,
)

__all__ = ["render_wide"]


def render_wide(record: Record) -> str:
    """Show times beside fused softmax with all heads, and which form is picked."""
    head = (
        "N",
        "batch",
        "form",
        "ms [quartiles]",
        "times softmax [quartiles]",
        "of the promise",
        "matmul rate",
        "MiB running",
        "picked for",
    )
    body = []
    for row in record["rows"]:
        extra = row.get("extra_mib")
        body.append(
            (
                f"{row['num_tokens']:,}",
                str(row["batch_size"]),
                row["form"],
                spread_of(row["ms"]),
                f"{marked(row['to_softmax']['median'])} {quartiles(row['to_softmax'])}",
                share(row["promise_kept"]),
                share(row["share_of_matmul_rate"]),
                NOTHING if extra is None else f"{extra:,.1f}",
                row["serves"] or NOTHING,
            )
        )
    case = record["case"]
    what = (
        f"D = {case['dim']}, {case['num_heads'] // 2} real of {case['num_heads']} "
        "heads, values twice as wide as queries; forward."
    )
    return f"{table(head, body)}\n\n{what} {RATES} {state_conditions(record)}"
