"""What the demo found: its rows, their recorded form and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Demo", "DemoRow", "LargeRow"]

Cells = tuple[str, ...]

_ACCURACIES = ("before", "swapped", "healed")
_COSTS = ("M parameters", "MFLOPs", "ms", "peak MiB")


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One model on the digits; the softmax teacher is neither swapped nor healed."""

    model: str
    accuracy_before: float
    accuracy_swapped: float | None
    accuracy_healed: float | None
    parameters: int
    flops: int
    latency_ms: float
    peak_mib: float | None


@dataclass(frozen=True, kw_only=True)
class LargeRow:
    """One large model with random weights at one image size."""

    model: str
    image_size: tuple[int, int]
    parameters: int
    flops: int
    latency_ms: float
    latency_quartiles_ms: tuple[float, float]
    peak_mib: float | None


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo found, and where it wrote it.

    Attributes:
        rows: The digit models; the softmax teacher first.
        large: The large model, softmax then Hydra, at each image size.
        conditions: Data, sizes, effort and machine.
        folder: Where demo.json, its pictures, report.html and student/ are.
    """

    rows: tuple[DemoRow, ...]
    large: tuple[LargeRow, ...]
    conditions: dict[str, Any]
    folder: Path

    def to_json(self) -> dict[str, Any]:
        """Give the recorded form, without the folder, which means nothing elsewhere."""
        return {
            "format": "manyheads.demo",
            "version": 1,
            "rows": [asdict(row) for row in self.rows],
            "large": [
                asdict(row) | {"image_size": list(row.image_size)} for row in self.large
            ],
            "conditions": self.conditions,
        }

    def __str__(self) -> str:
        small: list[Cells] = [("handwritten digits", *_ACCURACIES, *_COSTS)]
        for row in self.rows:
            accuracies = (
                row.accuracy_before,
                row.accuracy_swapped,
                row.accuracy_healed,
            )
            small.append(
                (row.model, *map(_percent, accuracies), *_ratios(row, self.rows[0]))
            )
        large: list[Cells] = [("random weights, batch 1", *_COSTS)]
        for base, hydra in zip(self.large[::2], self.large[1::2], strict=True):
            at = f" at {base.image_size[0]}x{base.image_size[1]}"
            large += [(one.model + at, *_ratios(one, base)) for one in (base, hydra)]
        return "\n".join(
            [
                *_aligned(small),
                "",
                *_aligned(large),
                "",
                "(ratio to softmax attention; below 1 is cheaper, ! marks worse)",
                f"Written to {self.folder}: demo.json, pictures, student/",
                f"Open {self.folder / 'report.html'} to see it all.",
            ]
        )


def _ratios(row: DemoRow | LargeRow, base: DemoRow | LargeRow) -> tuple[str, ...]:
    """Show each cost with its ratio to the base; what got worse is marked."""
    cells = []
    for value, first, unit in (
        (row.parameters, base.parameters, 1e6),
        (row.flops, base.flops, 1e6),
        (row.latency_ms, base.latency_ms, 1),
        (row.peak_mib, base.peak_mib, 1),
    ):
        if value is None or not first:
            cells.append("not measured")
            continue
        ratio = value / first
        worse = " !" if round(ratio, 2) > 1 else ""
        cells.append(f"{value / unit:,.2f} ({ratio:.2f}{worse})")
    return tuple(cells)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _aligned(cells: Sequence[Cells]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
