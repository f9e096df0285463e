"""The table of the demo: accuracies, then costs."""

from __future__ import annotations

from benchmarks.render.cells import (
    Record,
    Row,
    beside,
    shown_size,
    state_machine,
    table,
)

__all__ = ["render_demo"]

_COST_HEAD = ("M parameters", "MFLOPs", "ms", "peak MiB")


def render_demo(record: Record) -> str:
    """Show accuracies as they are, and costs beside those of the first row."""
    rows, large = record["rows"], record["large"]
    head = ("model", "before", "swapped", "healed", *_COST_HEAD)
    shares = ("accuracy_before", "accuracy_swapped", "accuracy_healed")
    body = [
        (
            row["model"],
            *(_share(row[share], rows[0][shares[0]]) for share in shares),
            *_costs(row, rows[0]),
        )
        for row in rows
    ]
    parts = [table(head, body)]
    if large:
        bases: dict[tuple[int, ...], Row] = {}
        for row in large:
            bases.setdefault(tuple(row["image_size"]), row)
        body = [
            (
                shown_size(row),
                row["model"],
                *_costs(row, bases[tuple(row["image_size"])]),
            )
            for row in large
        ]
        parts.append(table(("image", "model, random weights", *_COST_HEAD), body))
    conditions = record["conditions"]
    machine = conditions.get("machine", conditions)
    data = f"{conditions['data']}. " if conditions.get("data") else ""
    parts.append(f"{data}{state_machine(machine)}" if machine else data)
    return "\n\n".join(part for part in parts if part)


def _costs(row: Row, base: Row) -> tuple[str, ...]:
    return (
        beside(row, base, "parameters", 1e6),
        beside(row, base, "flops", 1e6),
        beside(row, base, "latency_ms", 1),
        beside(row, base, "peak_mib", 1),
    )


def _share(value: float | None, base: float) -> str:
    if value is None:
        return "-"
    ratio = value / base if base else 1.0
    return f"{100 * value:.1f} % ({ratio:.2f}{' !' if round(ratio, 2) < 1 else ''})"
