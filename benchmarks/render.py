"""Turns records into tables; what loses stays in and is marked with a !."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.measure import COPY, GIVEN
from benchmarks.records import date
from manyheads import Softmax

__all__ = ["render"]

_GROWTH_LIMIT = 1.1
Row = dict[str, Any]
Record = dict[str, Any]


def render(records: Sequence[Record]) -> str:
    """Give the Markdown of some records, one table for each."""
    if not records:
        return "No result is recorded yet."
    return "\n\n".join(_KINDS[_kind(record)](record) for record in records)


def _kind(record: Record) -> str:
    return "demo" if record["format"] == "manyheads.demo" else str(record["kind"])


def _core(record: Record) -> str:
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
                _spread(row["ms"]),
                "-" if to_softmax is None else _ratio(to_softmax["median"]),
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
        f"{_conditions(record)}",
        *(
            [f"Time grows with N to the power of (from 1,024 up): {fits}."]
            if fits
            else []
        ),
        *_faults(record["rows"]),
    ]
    return _table(head, body) + "".join(f"\n\n{note}" for note in notes)


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


def _layer(record: Record) -> str:
    head = ("tokens", "batch", "form", "ms [quartiles]", "ratio [quartiles]")
    body = [
        (
            f"{row['grid'][0]} x {row['grid'][1]} + prefix",
            str(row["batch_size"]),
            row["form"],
            _spread(row["ms"]),
            f"{_ratio(row['ratio']['median'])} {_between(row['ratio'])}",
        )
        for row in record["rows"]
    ]
    case = record["case"]
    how = "compiled" if case["compiled"] else "eager"
    note = f"{case['architecture']}, {case['part']}, {how}. {_conditions(record)}"
    return f"{_table(head, body)}\n\n{note}"


def _models(record: Record) -> str:
    head = (
        "image",
        "batch",
        "model",
        "M parameters",
        "GFLOPs",
        "ms [quartiles]",
        "ratio [quartiles]",
        "peak MiB",
        "of it running",
    )
    body = []
    base: Row = {}
    for row in record["rows"]:
        if not base or _at(row) != _at(base):
            base = row
        low, high = row["latency_quartiles_ms"]
        least, most = row["ratio_quartiles"]
        body.append(
            (
                _size(row),
                str(row["batch_size"]),
                row["name"],
                _beside(row, base, "parameters", 1e6),
                _beside(row, base, "flops", 1e9),
                f"{row['latency_ms']:.4g} [{low:.4g}-{high:.4g}]",
                f"{_ratio(row['ratio'])} [{least:.2f}-{most:.2f}]",
                _beside(row, base, "peak_mib", 1),
                _beside(row, base, "extra_mib", 1),
            )
        )
    how = "compiled" if record["case"]["compiled"] else "eager"
    warned = sorted({w for row in record["rows"] for w in row.get("warnings", ())})
    note = f"{record['case']['architecture']}, {how}. {_conditions(record)}"
    return "\n\n".join([_table(head, body), note, *warned])


def _at(row: Row) -> tuple[Any, ...]:
    return (*row["image_size"], row["batch_size"])


def _size(row: Row) -> str:
    asked, fed = row["image_size"], row.get("fed_size") or row["image_size"]
    padded = f", padded to {fed[0]}x{fed[1]}" if list(fed) != list(asked) else ""
    return f"{asked[0]}x{asked[1]}{padded}"


def _demo(record: Record) -> str:
    """Show the demo: accuracies as they are, costs beside those of the first row."""
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
    parts = [_table(head, body)]
    if large:
        bases: dict[tuple[int, ...], Row] = {}
        for row in large:
            bases.setdefault(tuple(row["image_size"]), row)
        body = [
            (_size(row), row["model"], *_costs(row, bases[tuple(row["image_size"])]))
            for row in large
        ]
        parts.append(_table(("image", "model, random weights", *_COST_HEAD), body))
    conditions = record["conditions"]
    machine = conditions.get("machine", conditions)
    data = f"{conditions['data']}. " if conditions.get("data") else ""
    parts.append(f"{data}{_machine(machine)}" if machine else data)
    return "\n\n".join(part for part in parts if part)


_COST_HEAD = ("M parameters", "MFLOPs", "ms", "peak MiB")


def _costs(row: Row, base: Row) -> tuple[str, ...]:
    return (
        _beside(row, base, "parameters", 1e6),
        _beside(row, base, "flops", 1e6),
        _beside(row, base, "latency_ms", 1),
        _beside(row, base, "peak_mib", 1),
    )


def _share(value: float | None, base: float) -> str:
    if value is None:
        return "-"
    ratio = value / base if base else 1.0
    return f"{100 * value:.1f} % ({ratio:.2f}{' !' if round(ratio, 2) < 1 else ''})"


def _beside(row: Row, base: Row, key: str, unit: float) -> str:
    """Show a value with its ratio to the base, marked where it is worse."""
    value, first = row.get(key), base.get(key)
    if value is None:
        return "not measured"
    scaled = value / unit
    shown = f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.4g}"
    return f"{shown} ({_ratio(value / first)})" if first else shown


def _ratio(ratio: float) -> str:
    shown = f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"
    return f"{shown} !" if round(ratio, 2) > 1 else shown


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:.3g} [{found['lower']:.3g}-{found['upper']:.3g}]"


def _between(found: dict[str, float]) -> str:
    return f"[{found['lower']:.2f}-{found['upper']:.2f}]"


def _conditions(record: Record) -> str:
    counts = [row["rounds"] for row in record["rows"]]
    fewest, most = min(counts), max(counts)
    rounds = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    machine = record["conditions"]
    return (
        f"Random weights, {machine['dtype']}, {rounds} rounds, interleaved; ratios are "
        f"taken within rounds, below 1 is cheaper, ! marks worse. {_machine(machine)}"
    )


def _machine(machine: dict[str, Any]) -> str:
    facts = [
        str(machine.get("device_name") or ""),
        f"{machine['threads']} threads" if machine.get("threads") else "",
        f"torch {machine['torch']}" if machine.get("torch") else "",
        date({"conditions": machine})[:10],
    ]
    return ", ".join(fact for fact in facts if fact) + "."


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table, numbers to the right."""
    rule = ["---" if "model" in cell or cell == "form" else "--:" for cell in head]
    lines = [head, rule, *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_KINDS = {"core": _core, "layer": _layer, "model": _models, "demo": _demo}
