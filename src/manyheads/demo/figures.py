"""Plots of recorded results; they are drawn from the JSON form and nothing else."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from manyheads.drafts import draft_of
from manyheads.errors import MissingExtra

__all__ = ["draw_demo"]

# Colour-blind safe (Okabe and Ito).
SOFTMAX, HYDRA, HEALED = "#999999", "#0072B2", "#009E73"


def draw_demo(recorded: dict[str, Any], path: Path) -> None:
    """Draw what was lost on the left and what was gained on the right.

    Args:
        recorded: A demo's `to_json()`.
        path: The PNG to write.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtra(
            asked="drawing the demo's results",
            found="matplotlib is not installed",
            fix='pip install "manyheads[draw]"',
        ) from error
    figure = figures.Figure(figsize=(11, 4.4), layout="constrained")
    lost, gained = figure.subplots(1, 2)
    _draw_accuracy(lost, recorded["rows"])
    _draw_ratios(gained, recorded["large"])
    with draft_of(path) as draft:
        figure.savefig(draft, dpi=130, format="png")


def _draw_accuracy(axes: Any, rows: list[dict[str, Any]]) -> None:
    teacher, *students = rows
    stages = (("swapped", HYDRA), ("healed", HEALED))
    for offset, (stage, colour) in zip((-0.2, 0.2), stages, strict=True):
        heights = [100 * row[f"accuracy_{stage}"] for row in students]
        places = [index + offset for index in range(len(students))]
        bars = axes.bar(places, heights, 0.36, color=colour, label=stage)
        axes.bar_label(bars, fmt="%.1f", label_type="center", color="white")
    before = 100 * teacher["accuracy_before"]
    label = f"before: softmax, {before:.1f}"
    axes.axhline(before, color=SOFTMAX, linestyle="--", label=label)
    axes.set_xticks(range(len(students)), [row["model"] for row in students])
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy on unseen digits, %")
    axes.set_title("What it lost: handwritten digits")
    axes.legend(loc="upper center", ncols=3, fontsize=9, frameon=False)


def _draw_ratios(axes: Any, rows: list[dict[str, Any]]) -> None:
    names = {"flops": "FLOPs", "latency_ms": "time", "peak_mib": "memory"}
    # What was not measured is left out: an empty place would read as nothing gained.
    measures = [key for key in names if all(row[key] for row in rows)]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    width = 0.8 / len(pairs)
    for number, (softmax, hydra) in enumerate(pairs):
        ratios = [softmax[key] / hydra[key] for key in measures]
        size = "x".join(map(str, softmax["image_size"]))
        places = [
            i + (number - (len(pairs) - 1) / 2) * width for i in range(len(measures))
        ]
        colour = (HYDRA, HEALED)[number % 2]
        bars = axes.bar(places, ratios, 0.92 * width, color=colour, label=size)
        axes.bar_label(bars, fmt="%.2fx", label_type="center", color="white")
    axes.axhline(1, color=SOFTMAX, linestyle="--", label="softmax attention")
    axes.set_xticks(range(len(measures)), [names[key] for key in measures])
    axes.margins(y=0.2)
    axes.set_ylabel("times less with Hydra (higher is better)")
    axes.set_title(f"What it gained: {rows[0]['model']}, random weights", fontsize=11)
    axes.legend(loc="upper center", ncols=3, fontsize=9, frameon=False)
