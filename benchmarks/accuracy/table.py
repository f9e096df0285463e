"""The tables of the accuracy study; what misses its target stays in, marked with !."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from benchmarks.render.cells import Record, table

__all__ = ["accuracy_table", "healing_table", "one_line"]

_COLUMNS = ("converted", "calibrated", "healed", "scratch")
# Healed in another way beside the usual one, for every model and data set.
_BESIDE = "batch_64"


def one_line(record: Record) -> str:
    """Say in one line what a cell found."""
    taught = record["teacher_top1"]
    below = "" if taught is None else f", {_points(record):+.1f} points"
    return (
        f"{record['case']['name']} seed {record['seed']}: top-1 "
        f"{100 * record['top1']:.1f} %{below}, {100 * _share(record):.1f} % of the "
        f"teacher's work, {record['seconds']:.0f} s"
    )


def accuracy_table(records: Sequence[Record]) -> str:
    """Give Markdown: one table for each data set, a row for each model.

    A cell holds points of top-1 against the teacher of the same seed: the mean over
    seeds, and between brackets the worst and the best of them.
    """
    cells = [r for r in records if r["kind"] == "accuracy"]
    if not cells:
        return "Not recorded yet."
    return "\n\n".join(
        _accuracy(name, [r for r in cells if r["data"]["name"] == name])
        for name in dict.fromkeys(r["data"]["name"] for r in cells)
    )


def healing_table(records: Sequence[Record]) -> str:
    """Give Markdown: ways of healing by models, in points against the teacher."""
    tried = [r for r in records if r["kind"] == "healing"]
    if not tried:
        return "Not recorded yet."
    models = tuple(dict.fromkeys(r["case"]["model"] for r in tried))
    chosen = [
        r
        for r in records
        if r["case"]["treatment"] == "healed"
        and r["case"]["model"] in models
        and r["data"]["name"] == tried[0]["data"]["name"]
        and r["kind"] == "accuracy"
    ]
    cells, body = [*chosen, *tried], []
    for variant in dict.fromkeys(_way(r) for r in cells):
        same = [r for r in cells if _way(r) == variant]
        most = max(_share(r) for r in same)
        found = [_spread([r for r in same if r["case"]["model"] == m]) for m in models]
        body.append((variant, f"{100 * most:.1f} %", *found))
    head = ("way of healing (model)", "work", *models)
    return f"{table(head, body)}\n\n{_conditions(cells)}"


def _way(record: Record) -> str:
    return record["case"]["variant"] or "as in the table of accuracies"


def _accuracy(name: str, cells: Sequence[Record]) -> str:
    teachers = [r for r in cells if r["teacher_top1"] is None]
    body = []
    for model in dict.fromkeys(r["case"]["model"] for r in cells):
        if model == "teacher":
            continue
        mine = [r for r in cells if r["case"]["model"] == model]
        by = {
            treatment: [
                r
                for r in mine
                if r["case"]["treatment"] == treatment and not r["case"]["variant"]
            ]
            for treatment in _COLUMNS
        }
        beside = [r for r in mine if r["case"]["variant"] == _BESIDE]
        parameters, flops = mine[0]["parameters"], mine[0]["flops"]
        body.append(
            (
                model,
                *(_spread(by[treatment]) for treatment in _COLUMNS[:3]),
                _verdict(by["healed"]),
                _spread(beside),
                _spread(by["scratch"]),
                f"{parameters / 1e6:.3f}",
                f"{flops / 1e6:.2f}",
            )
        )
    head = (
        "model",
        "converted",
        "calibrated",
        "healed",
        "target",
        f"healed, {_BESIDE}",
        "from scratch",
        "M parameters",
        "MFLOPs",
    )
    notes = [_teachers(name, teachers), _budget(cells), _conditions(cells)]
    return "\n\n".join([table(head, body), *(note for note in notes if note)])


def _teachers(name: str, teachers: Sequence[Record]) -> str:
    if not teachers:
        return ""
    found = ", ".join(
        f"{100 * r['top1']:.2f} % (seed {r['seed']})"
        for r in sorted(teachers, key=lambda r: int(r["seed"]))
    )
    first = teachers[0]
    setting = first["case"]["setting"]
    return (
        f"{name}: teachers reach {found} on {first['data']['test_images']:,} unseen "
        f"images, after {setting['epochs']} epochs of {setting['train_images']:,}; "
        f"{first['parameters'] / 1e6:.3f} M parameters, {first['flops'] / 1e6:.2f} "
        "MFLOPs."
    )


def _budget(cells: Sequence[Record]) -> str:
    shares = [
        f"{treatment} at most {100 * max(found):.1f} %"
        for treatment in ("calibrated", "healed", "scratch")
        if (found := [_share(r) for r in cells if r["case"]["treatment"] == treatment])
    ]
    if not shares:
        return ""
    return f"Share of the teacher's training work: {', '.join(shares)}."


def _verdict(healed: Sequence[Record]) -> str:
    """Judge by the mean over seeds."""
    if not healed or healed[0]["case"]["target"] is None:
        return "-"
    target = float(healed[0]["case"]["target"])
    # Accuracies are counts of images: what is beyond the sixth digit is rounding.
    met = round(mean(_points(r) for r in healed), 6) >= -target
    return f"-{target:g}: met" if met else f"-{target:g}: missed !"


def _spread(records: Sequence[Record]) -> str:
    if not records:
        return "-"
    points = [_points(record) for record in records]
    if len(points) == 1:
        return f"{points[0]:+.2f} (one seed)"
    return f"{mean(points):+.2f} [{min(points):+.2f} to {max(points):+.2f}]"


def _points(record: Record) -> float:
    return 100 * (float(record["top1"]) - float(record["teacher_top1"]))


def _share(record: Record) -> float:
    return float(record["work"]["multiply_adds"]) / float(record["teacher_work"])


def _conditions(cells: Sequence[Record]) -> str:
    machine = cells[0]["conditions"]
    dates = sorted(str(r["conditions"]["date"])[:10] for r in cells)
    seeds = ", ".join(str(seed) for seed in sorted({r["seed"] for r in cells}))
    return (
        f"Points of top-1 against the teacher of the same seed, mean [worst to best]; "
        f"seeds {seeds}; {machine['device_name']}, torch {machine['torch']}, timm "
        f"{machine['timm']}, {dates[0]} to {dates[-1]}."
    )
