"""Times things against each other in one process, so that only ratios need trust.

A shared machine is never quiet: what runs beside the measurement comes and goes. So
the contestants take turns, round by round, in an order that alternates; a ratio is
taken within a round, where both met the same machine, and medians and quartiles are
taken over rounds.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["LEAST_ROUNDS", "Spread", "race", "ratios", "spread"]

LEAST_ROUNDS = 3
_WARM_CALLS, _WARM_SECONDS = 3, 0.5


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A median with the quartiles around it.

    Attributes:
        median: Half of the values are below.
        lower: A quarter is below.
        upper: A quarter is above.
    """

    median: float
    lower: float
    upper: float


def race(
    contestants: Sequence[Callable[[], object]],
    *,
    rounds: int,
    budget_s: float,
    device: torch.device,
    on_round: Callable[[int], None] | None = None,
    rehearse: bool = False,
) -> tuple[tuple[float, ...], ...]:
    """Let all take turns and give the seconds of every turn.

    Each is warmed up first: three calls, or one where a call takes long. On a GPU a
    turn ends when the device is done. The garbage collector waits outside.

    Args:
        contestants: What is called; results are dropped within the time taken.
        rounds: Turns of each.
        budget_s: No round is begun after so many seconds, once there are three.
        device: Where the work happens.
        on_round: Called after each round with the number of rounds done.
        rehearse: Call each once, untimed, right before each of its turns. Contestants
            with threads of their own need it: threads that wait by spinning take the
            cores from whoever is next.

    Returns:
        Per contestant, the seconds of each round; equally many for all.
    """
    for contestant in contestants:
        _warm_up(contestant, device)
    laps: list[list[float]] = [[] for _ in contestants]
    order = list(range(len(contestants)))
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    started = time.perf_counter()
    try:
        for done in range(rounds):
            late = time.perf_counter() - started > budget_s
            if late and done >= LEAST_ROUNDS:
                break
            for place in order if done % 2 == 0 else reversed(order):
                if rehearse:
                    contestants[place]()
                laps[place].append(_seconds(contestants[place], device))
            if on_round is not None:
                on_round(done + 1)
    finally:
        if collecting:
            gc.enable()
    return tuple(tuple(lap) for lap in laps)


def spread(values: Sequence[float]) -> Spread:
    """Give median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(median=values[0], lower=values[0], upper=values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=median, lower=lower, upper=upper)


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Give the spread of the ratios within rounds, each to the base's own turn."""
    return spread([mine / other for mine, other in zip(values, base, strict=True)])


def _warm_up(contestant: Callable[[], object], device: torch.device) -> None:
    spent = 0.0
    for _ in range(_WARM_CALLS):
        spent += _seconds(contestant, device)
        if spent > _WARM_SECONDS:
            return


def _seconds(contestant: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    started = time.perf_counter()
    contestant()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
