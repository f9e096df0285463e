"""What all kinds of measurement share: races on a budget, rates, memory, growth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kinds import Case
from manyheads.gauges import rates
from manyheads.gauges.memory import Memory, measure_memory
from manyheads.gauges.rates import kept_promise
from manyheads.gauges.stopwatch import Spread, race, spread

__all__ = [
    "MATMUL",
    "Call",
    "Laps",
    "Matmul",
    "Race",
    "Row",
    "Watch",
    "compile_in_place",
    "growth",
    "in_ms",
    "kept_promise",
    "memory_of",
    "plain",
    "scaled",
]

MATMUL = "matmul"
_GROWS_FROM = 1024

Call = Callable[[], object]
Laps = dict[str, tuple[float, ...]]
Row = dict[str, Any]
# Told what is being measured, and how many rounds of it are done.
Watch = Callable[[str, int, int], None]


@dataclass
class Race:
    """Runs the races of one case and shares the case's seconds among them.

    Attributes:
        case: Its rounds and its budget.
        device: Where the work happens.
        races: Races still to come.
        watch: Told of every round.
        spent_s: Seconds that races have taken.
    """

    case: Case
    device: torch.device
    races: int
    watch: Watch
    spent_s: float = field(default=0.0, init=False)

    def run(self, what: str, calls: dict[str, Call]) -> Laps:
        """Let all take turns; what earlier races left of the budget is shared."""
        left = max(0.0, self.case.budget_s - self.spent_s) / max(1, self.races)
        started = time.perf_counter()
        laps = race(
            list(calls.values()),
            rounds=self.case.rounds,
            budget_s=left,
            device=self.device,
            on_round=lambda done: self.watch(what, done, self.case.rounds),
        )
        self.races -= 1
        self.spent_s += time.perf_counter() - started
        return dict(zip(calls, laps, strict=True))


class Matmul(rates.Matmul):
    """A square matrix product that takes its turns under a name of its own."""

    def rate(
        self, laps: Laps, name: str, multiply_adds: int
    ) -> dict[str, float] | None:
        """Give a contestant's multiply-adds a second as a share of this product's."""
        if name == MATMUL or not multiply_adds:
            return None
        return plain(self.share(laps[MATMUL], laps[name], multiply_adds))


def growth(rows: Sequence[Row], column: str = "ms.median") -> dict[str, float]:
    """Fit column = c N^e per form over token counts from 1,024 up; give the exponents.

    Args:
        rows: With a form, a token count and the column; those without are passed over.
        column: A dot leads into a spread.
    """
    found = {}
    for form in dict.fromkeys(_series(row) for row in rows):
        points = [
            (math.log(row["num_tokens"]), math.log(value))
            for row in rows
            if _series(row) == form
            and row["num_tokens"] >= _GROWS_FROM
            and (value := _value(row, column))
        ]
        if len({x for x, _ in points}) >= 2:
            x = [p[0] - sum(q[0] for q in points) / len(points) for p in points]
            slope = sum(a * p[1] for a, p in zip(x, points, strict=True))
            found[form] = slope / sum(a * a for a in x)
    return found


def _series(row: Row) -> str:
    name = str(row.get("form") or row.get("name"))
    batch = row.get("batch_size", 1)
    return name if batch == 1 else f"{name}, batch {batch}"


def _value(row: Row, column: str) -> float | None:
    found: Any = row
    for key in column.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return None if found is None else float(found)


def memory_of(module: nn.Module, x: Tensor) -> Row:
    """Measure peak memory in a fresh process; a failure is told in the row."""
    found = measure_memory(module, x)
    if isinstance(found, Memory):
        return {"peak_mib": found.peak_mib, "extra_mib": found.extra_mib}
    return {"peak_mib": None, "extra_mib": None, "memory_problem": found}


def compile_in_place(module: nn.Module, call: Call) -> float:
    """Compile and give the seconds that the first call takes."""
    module.compile()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_ms(laps: Sequence[float]) -> dict[str, float]:
    """Give median and quartiles in milliseconds."""
    return asdict(spread([1e3 * seconds for seconds in laps]))


def plain(found: Spread | None) -> dict[str, float] | None:
    """Give a spread as JSON values."""
    return asdict(found) if found is not None else None


def scaled(found: Spread, factor: float) -> Spread:
    """Multiply a spread."""
    return Spread(
        median=factor * found.median,
        lower=factor * found.lower,
        upper=factor * found.upper,
    )
