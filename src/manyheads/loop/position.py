"""How far a run is: all of it that is neither weights nor the optimiser's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from manyheads.loop.stages import StageRecord

__all__ = ["Position"]


@dataclass
class Position:
    """Plain values that go into the state file.

    Attributes:
        stage: Stages done.
        step: Steps done in the stage.
        total: Steps done in the whole run.
        finished: Whether nothing is left to do.
        settled: Whether the model was given its averaged weights for good.
        seconds: Time spent.
        loss_sum: Of the epoch's steps so far.
        loss_count: How many these are.
        recent_sum: Of the steps since the last line of the log.
        recent_count: How many these are.
        losses: Mean loss of each epoch of the stage.
        measured: What was measured after each of them.
        records: The same of the stages done.
        notes: Values of the caller.
        skipped: Pictures that could not be read, with the reason of each.
        lines: Lines of each log file.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    finished: bool = False
    settled: bool = False
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    recent_sum: float = 0.0
    recent_count: int = 0
    losses: list[float] = field(default_factory=list)
    measured: list[dict[str, float]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def end_stage(self, name: str, overflows: int) -> None:
        """Put the stage among those that are done."""
        record = {"name": name, "steps": self.step, "overflows": overflows}
        record |= {"losses": self.losses, "measured": self.measured}
        self.records.append(record)
        self.stage, self.step, self.losses, self.measured = self.stage + 1, 0, [], []

    def told(self) -> tuple[StageRecord, ...]:
        """Give the records of the stages that are done."""
        return tuple(
            StageRecord(
                name=record["name"],
                steps=record["steps"],
                losses=tuple(record["losses"]),
                measured=tuple(record["measured"]),
                overflows=record["overflows"],
            )
            for record in self.records
        )
