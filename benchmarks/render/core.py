"""Tables of mechanisms on projected tokens."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measure import COPY, GIVEN
from benchmarks.render.cells import (
    Record,
    Row,
    marked,
    spread_of,
    state_conditions,
    table,
)
from manyheads import Softmax

__all__ = ["render_core"]

_GROWTH_LIMIT = 1.1


def render_core(record: Record) -> str:
    """Show times beside softmax and beside a plain copy, then how they grow."""
    case, softmax = record["case"], repr(Softmax())
    head = ("N", "form", "ms [quartiles]", "times softmax", "faster by", "copy rate")
    body = []
    for row in record["rows"]:
        to_softmax, share = row["to_softmax"], row["share_of_copy_rate"]
        quick = 1 / to_softmax["median"] if to_softmax else None
        body.append(
            (
                f"{row['num_tokens']:,}",
                row["form"],
                spread_of(row["ms"]),
                "-" if to_softmax is None else marked(to_softmax["median"]),
                "-" if quick is None or row["form"] == softmax else f"{quick:.3g}",
                "-" if share is None else f"{share['median']:.2f}",
            )
        )
    fits = ", ".join(
        f"{form} {exponent:.2f}{' !' if exponent > _GROWTH_LIMIT else ''}"
        for form, exponent in record["growth"].items()
    )
    notes = [
        f"D = {case['dim']}, H = {case['num_heads']}, batch {case['batch_size']}. "
        f"Copy rate: share of the speed of a plain copy of as many bytes. "
        f"{state_conditions(record)}",
        *(
            [f"Time grows with N to the power of (from 1,024 up): {fits}."]
            if fits
            else []
        ),
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
