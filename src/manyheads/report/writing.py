"""One page that shows what a run found: a single HTML file, from the run's JSON.

Nothing is measured here and nothing is left out: what the JSON does not hold is said
to be missing, and what got worse stays in the table and is marked.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from manyheads.drafts import draft_of
from manyheads.errors import DataError
from manyheads.report.charts import Cell, line_chart, table

__all__ = ["report"]

Row = Mapping[str, Any]

_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_COSTS = (
    ("parameters", "parameters, M", 1e6),
    ("flops", "FLOPs, G", 1e9),
    ("latency_ms", "latency, ms", 1.0),
    ("peak_mib", "memory, MiB", 1.0),
)


def report(
    run: str | Path,
    path: str | Path | None = None,
    *,
    figures: Mapping[str, str | Path] | None = None,
) -> Path:
    """Write a self-contained page from a recorded run; it opens from disk, offline.

    The page shows what was converted, accuracy before, swapped and healed, cost and
    time with their ratios to the first row, latency and memory against resolution,
    the pictures, and all conditions. Tables sort by a click or the keyboard.

    The run is an object with any of these fields: `rows`, models with
    `model`, `accuracy_before`, `accuracy_swapped`, `accuracy_healed`, `parameters`,
    `flops`, `latency_ms`, `peak_mib`; `large`, the same costs with an `image_size`;
    `converted`, what preview(...).to_json() gives; `figures`, objects with `file`
    and `caption`, the file beside the JSON; `conditions`, anything. The demo writes
    such a file.

    Args:
        run: A JSON file, or a folder that holds one as demo.json or run.json.
        path: The page to write; None for report.html beside the JSON.
        figures: Further pictures, as caption to file.

    Returns:
        The page's path.

    Raises:
        DataError: The run cannot be read or holds nothing to show, a picture is
            missing, or the page cannot be written.
    """
    source = _source(Path(run))
    found = _read(source)
    target = Path(path) if path is not None else source.with_name("report.html")
    pictures = _listed(found, source) + [
        (caption, Path(file)) for caption, file in (figures or {}).items()
    ]
    sections = [
        _converted(found),
        _accuracy(found),
        _costs(found),
        _resolution(found),
        _pictures(pictures),
        _conditions(found, source),
    ]
    name = str(found.get("title") or f"manyheads: {source.stem}")
    template = files("manyheads.report").joinpath("page.html")
    page = Template(template.read_text(encoding="utf-8")).substitute(
        title=html.escape(name), summary=_summary(found), sections="\n".join(sections)
    )
    _write(target, page)
    return target


def _source(run: Path) -> Path:
    if not run.is_dir():
        return run
    for name in ("run.json", "demo.json"):
        if (run / name).is_file():
            return run / name
    raise _unreadable(run, "the folder holds neither run.json nor demo.json")


def _read(source: Path) -> dict[str, Any]:
    try:
        found = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(source, f"it cannot be read: {error}") from error
    shown = ("rows", "large", "converted")
    if not isinstance(found, dict) or not any(found.get(name) for name in shown):
        raise _unreadable(source, f"it has none of {', '.join(shown)}")
    for name in ("rows", "large"):
        rows = found.get(name) or []
        named = isinstance(rows, list) and all(
            isinstance(row, dict) and "model" in row for row in rows
        )
        if not named:
            raise _unreadable(source, f"{name!r} is no list of models")
    for number, row in enumerate(found.get("large") or []):
        if not _is_size(row.get("image_size")):
            told = f"'large' row {number} has image_size={row.get('image_size')!r}"
            raise _unreadable(source, f"{told}, which is no [height, width]")
    converted, figures = found.get("converted") or {}, found.get("figures") or []
    if not isinstance(converted, dict) or not _are_objects(converted.get("rows") or []):
        raise _unreadable(source, "'converted' is not what preview().to_json() gives")
    for number, row in enumerate(converted.get("rows") or []):
        for name in ("parameters", "flops"):
            if not _is_pair(row.get(name, [0, 0])):
                told = f"'converted' row {number} has {name}={row[name]!r:.80}"
                raise _unreadable(source, f"{told}, which is no [before, after]")
    if not _are_objects(figures):
        raise _unreadable(source, "'figures' is no list of objects with a 'file'")
    return found


def _are_objects(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def _is_pair(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) == 2
        and all(isinstance(value, int | float) for value in values)
    )


def _is_size(size: Any) -> bool:
    return (
        isinstance(size, list)
        and len(size) == 2
        and all(isinstance(side, int) and side > 0 for side in size)
    )


def _summary(found: dict[str, Any]) -> str:
    """Say the result in one sentence, from the rows."""
    rows = found.get("rows") or []
    if len(rows) < 2:
        return "What was recorded, with its conditions; ratios are to the first row."
    first, last = rows[0], rows[-1]
    before, healed = _number(first, "accuracy_before"), _number(last, "accuracy_healed")
    parts = [
        f"{html.escape(str(last['model']))} against {html.escape(str(first['model']))}"
    ]
    if before is not None and healed is not None:
        parts.append(f"accuracy {100 * before:.1f} → {100 * healed:.1f} %")
    for key, name, _ in _COSTS:
        base, value = _number(first, key), _number(last, key)
        if base and value:
            parts.append(f"{name.partition(',')[0]} x {value / base:.2f}")
    return f"{parts[0]}: {', '.join(parts[1:])}. Below x 1 is cheaper."


def _converted(found: dict[str, Any]) -> str:
    rows = (found.get("converted") or {}).get("rows") or []
    if not rows:
        return _section("What was converted", _missing("block by block"))
    cells: list[list[Cell]] = [
        [
            f"{row.get('block')} {row.get('path', '')}",
            str(row.get("was", "")),
            str(row.get("becomes", "")) + _left_alone(row),
            *(
                (f"{old:,} → {new:,}", float(new))
                for old, new in (
                    row.get("parameters", (0, 0)),
                    row.get("flops", (0, 0)),
                )
            ),
        ]
        for row in rows
    ]
    heads = ("block", "was", "becomes", "parameters", "multiply-adds")
    return _section("What was converted", table("Block by block", heads, cells))


def _left_alone(row: Row) -> str:
    return f" (left alone: {row['left_alone']})" if row.get("left_alone") else ""


def _accuracy(found: dict[str, Any]) -> str:
    stages = ("before", "swapped", "healed")
    rows = found.get("rows") or []
    if not any(
        _number(row, f"accuracy_{s}") is not None for row in rows for s in stages
    ):
        return _section("Accuracy", _missing("accuracy"))
    cells: list[list[Cell]] = []
    for row in rows:
        values = [_number(row, f"accuracy_{stage}") for stage in stages]
        before, healed = values[0], values[2]
        lost = before is not None and healed is not None and healed < before
        shown: list[Cell] = [str(row["model"])]
        for place, value in enumerate(values):
            worse = lost and place == 2
            text = "-" if value is None else f"{100 * value:.1f} %"
            shown.append((text, -1.0 if value is None else value, worse))
        cells.append(shown)
    caption = "Before: the teacher. Swapped: converted, untouched. Healed: afterwards."
    heads = ("model", *stages)
    return _section("Accuracy", table(caption, heads, cells))


def _costs(found: dict[str, Any]) -> str:
    rows = found.get("rows") or []
    if not rows:
        return _section("Cost and time", _missing("cost"))
    caption = "Ratio to the first row in brackets; below 1 is cheaper."
    return _section("Cost and time", table(caption, _heads(()), _priced(rows, rows[0])))


def _resolution(found: dict[str, Any]) -> str:
    rows = found.get("large") or []
    if not rows:
        return _section("Against resolution", _missing("latency at several sizes"))
    cells: list[list[Cell]] = []
    for size in dict.fromkeys(_size(row) for row in rows):
        same = [row for row in rows if _size(row) == size]
        where: Cell = (f"{size[0]} x {size[1]}", float(size[0] * size[1]))
        for cost in _priced(same, same[0]):
            cells.append([cost[0], where, *cost[1:]])
    charts = [
        _chart(rows, key, title, unit)
        for key, title, unit in (
            ("latency_ms", "Latency against resolution", "latency, ms"),
            ("peak_mib", "Memory against resolution", "memory, MiB"),
        )
    ]
    caption = "Ratio to the first model at the same size in brackets."
    body = "".join(charts) + table(caption, _heads(("image",)), cells)
    return _section("Against resolution", body)


def _chart(rows: Sequence[Row], key: str, title: str, unit: str) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        value, size = _number(row, key), _size(row)
        # The axes are logarithmic.
        if value is not None and value > 0:
            point = (math.sqrt(size[0] * size[1]), value)
            lines.setdefault(str(row["model"]), []).append(point)
    if not lines:
        return ""
    return line_chart(title, lines, across="side of a square image, pixels", up=unit)


def _heads(more: tuple[str, ...]) -> tuple[str, ...]:
    return ("model", *more, *(name for _, name, _ in _COSTS))


def _priced(rows: Sequence[Row], base: Row) -> list[list[Cell]]:
    """Give each cost with its ratio to the base; what costs more is marked."""
    cells: list[list[Cell]] = []
    for row in rows:
        shown: list[Cell] = [str(row["model"])]
        for key, _, unit in _COSTS:
            value, first = _number(row, key), _number(base, key)
            if value is None:
                shown.append(("-", None))
                continue
            ratio = value / first if first and row is not base else None
            text = _digits(value / unit) + (f" ({ratio:.2f})" if ratio else "")
            shown.append((text, value, ratio is not None and ratio > 1.005))
        cells.append(shown)
    return cells


def _pictures(pictures: Sequence[tuple[str, Path]]) -> str:
    if not pictures:
        return _section("Pictures", _missing("maps"))
    parts = []
    for caption, file in pictures:
        try:
            content = base64.b64encode(file.read_bytes()).decode("ascii")
        except OSError as error:
            raise _unreadable(file, f"the picture cannot be read: {error}") from error
        kind = _KINDS.get(file.suffix.lower())
        if kind is None:
            raise _unreadable(file, "it is no .png or .jpg picture")
        told = html.escape(caption)
        parts.append(
            f'<figure><div class="wide"><img alt="{told}" '
            f'src="data:{kind};base64,{content}"></div>'
            f"<figcaption>{told}</figcaption></figure>"
        )
    return _section("Pictures", "".join(parts))


def _listed(found: dict[str, Any], source: Path) -> list[tuple[str, Path]]:
    """Read the pictures that the run names; they lie beside it and nowhere else."""
    listed = []
    for figure in found.get("figures") or []:
        name = Path(str(figure.get("file", "")))
        if name.name != str(name):
            raise _unreadable(source, f"the picture {str(name)!r} is not beside it")
        listed.append((str(figure.get("caption") or name.stem), source.parent / name))
    return listed


def _conditions(found: dict[str, Any], source: Path) -> str:
    if not found.get("conditions"):
        return _section("Conditions", _missing("conditions"))
    flat = dict(_flattened(found["conditions"]))
    rows: list[list[Cell]] = [[name, value] for name, value in flat.items()]
    text = table("Under which all of this holds", ("condition", "value"), rows)
    text = text.replace("<td>", '<td class="long">')
    text += f'<p class="quiet">From {html.escape(source.name)}.</p>'
    return _section("Conditions", text)


def _flattened(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [
            pair
            for key, inner in value.items()
            for pair in _flattened(inner, f"{name}.{key}" if name else str(key))
        ]
    return [(name, value if isinstance(value, str) else json.dumps(value))]


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _missing(what: str) -> str:
    return f'<p class="quiet">Not recorded in this run: {html.escape(what)}.</p>'


def _number(row: Row, key: str) -> float | None:
    """Read a number; what is none, or not finite, counts as not recorded."""
    value = row.get(key)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def _digits(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def _size(row: Row) -> tuple[int, int]:
    height, width = row["image_size"]
    return int(height), int(width)


def _write(target: Path, page: str) -> None:
    try:
        with draft_of(target) as draft:
            draft.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(
            asked=f"writing the report {target}",
            found=f"it cannot be written: {error}",
            fix="Choose a folder that exists and that you may write to, on a disk with "
            "room.",
        ) from error


def _unreadable(source: Path, found: str) -> DataError:
    return DataError(
        asked=f"a report from {source}",
        found=found,
        fix="Give a run's JSON such as the demo.json that `manyheads demo` writes.",
    )
