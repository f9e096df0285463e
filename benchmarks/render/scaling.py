"""Tables of one model from small to very large images."""

from __future__ import annotations

from benchmarks.render.cells import (
    NOTHING,
    Record,
    Row,
    grown,
    shown_size,
    spread_of,
    state_machine,
    table,
)

__all__ = ["render_scaling"]


def render_scaling(record: Record) -> str:
    """Show time and memory, whole and per token, and how they grow."""
    head = (
        "image",
        "tokens",
        "model",
        "GFLOPs",
        "ms [quartiles]",
        "us a token",
        "peak MiB",
        "MiB running",
        "KiB a token",
    )
    body = [_cells(row, len(head)) for row in record["rows"]]
    case = record["case"]
    counts = [row["rounds"] for row in record["rows"] if row["rounds"]] or [0]
    note = (
        f"{case['architecture']}, eager, one image at a time, each row in a process of "
        f"its own, limited to {case['limit_mib']:,} MiB and {case['limit_s']:g} s. "
        f"Running: the peak less the model and the image; a token's share is of that. "
        f"Random weights, {record['conditions']['dtype']}, {min(counts)} to "
        f"{max(counts)} rounds. {state_machine(record['conditions'])}"
    )
    return "\n\n".join([table(head, body), note, *grown(record)])


def _cells(row: Row, width: int) -> tuple[str, ...]:
    if "problem" in row:
        name = f"{row['name']}: {row['problem']}"
        told = (shown_size(row), f"{row['num_tokens']:,}", name)
        return (*told, *[NOTHING] * (width - len(told)))
    return (
        shown_size(row),
        f"{row['num_tokens']:,}",
        row["name"],
        f"{row['flops'] / 1e9:,.4g}",
        spread_of(row["ms"]),
        f"{row['us_per_token']:.3g}",
        f"{row['peak_mib']:,.0f}",
        f"{row['extra_mib']:,.1f}",
        f"{row['kib_per_token']:.3g}",
    )
