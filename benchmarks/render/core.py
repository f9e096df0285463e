"""Tables of mechanisms on projected tokens."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.kinds import COPY, GIVEN
from benchmarks.render.cells import (
    COPY_RATE,
    NOTHING,
    RATES,
    Record,
    Row,
    compile_times,
    grown,
    marked,
    share,
    spread_of,
    state_conditions,
    table,
)
from manyheads import Softmax

__all__ = ["render_core"]


def render_core(record: Record) -> str:
    """Show times beside softmax and beside a plain copy, then how they grow."""
    case, softmax = record["case"], repr(Softmax())
    head = (
        "N",
        "form",
        "ms [quartiles]",
        "times softmax",
        "faster by",
        "of the promise",
        "copy rate",
        "matmul rate",
        "MiB running",
    )
    body = []
    for row in record["rows"]:
        to_softmax = row["to_softmax"]
        quick = 1 / to_softmax["median"] if to_softmax else None
        extra = row.get("extra_mib")
        body.append(
            (
                f"{row['num_tokens']:,}",
                row["form"],
                spread_of(row["ms"]),
                NOTHING if to_softmax is None else marked(to_softmax["median"]),
                NOTHING if quick is None or row["form"] == softmax else f"{quick:.3g}",
                share(row.get("promise_kept")),
                share(row["share_of_copy_rate"]),
                share(row.get("share_of_matmul_rate")),
                NOTHING if extra is None else f"{extra:,.1f}",
            )
        )
    notes = [
        f"D = {case['dim']}, H = {case['num_heads']}, batch {case['batch_size']}. "
        f"{COPY_RATE} {RATES} {state_conditions(record)}",
        *grown(record),
        *compile_times(record),
        *_faults(record["rows"]),
    ]
    return table(head, body) + "".join(f"\n\n{note}" for note in notes)


def _faults(rows: Sequence[Row]) -> list[str]:
    """Name the sizes where fresh memory, not the kernel, is what is paid for."""
    paid = [
        f"{row['form']} at N = {row['num_tokens']:,} ({row['page_faults']:,})"
        for row in rows
        if row["page_faults"] > 1000 and row["form"] not in (COPY, GIVEN)
    ]
    if not paid:
        return []
    return [
        "Page faults of fresh memory, which the copy and the given output do not "
        f"have, are part of the time of {', '.join(paid)}."
    ]
