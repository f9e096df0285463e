"""Targets beside the numbers: below each table, and all of them in one."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cases import targets_of
from benchmarks.render.cells import NOTHING, Record, state_machine, table
from benchmarks.targets import Verdict, judge, read_reasons

__all__ = ["render_all_targets", "target_lines"]

_UNEXPLAINED = "its cause is not measured yet"


def target_lines(record: Record) -> list[str]:
    """Say of each target of a record whether it is met; none if there are none."""
    lines = [f"- {_told(verdict)}" for verdict in _verdicts(record)]
    return ["Targets:\n\n" + "\n".join(lines)] if lines else []


def render_all_targets(records: Sequence[Record]) -> str:
    """Put the targets of several records into one table, misses with their causes."""
    head = ("case", "target", "bound", "worst", "where", "outcome", "cause of a miss")
    body = []
    for record in records:
        for verdict in _verdicts(record):
            missed = verdict.outcome == "missed"
            body.append(
                (
                    record["case"]["name"],
                    verdict.target.says,
                    verdict.target.bound,
                    NOTHING if verdict.value is None else f"{verdict.value:.3g}",
                    verdict.where or NOTHING,
                    f"{verdict.outcome} !" if missed else verdict.outcome,
                    (verdict.reason or _UNEXPLAINED) if missed else NOTHING,
                )
            )
    if not body:
        return "Not recorded yet."
    machines = dict.fromkeys(state_machine(r["conditions"]) for r in records)
    return "\n\n".join([table(head, body), *machines])


def _verdicts(record: Record) -> list[Verdict]:
    return judge(record, targets_of(record["case"]["name"]), read_reasons())


def _told(verdict: Verdict) -> str:
    target = verdict.target
    if verdict.value is None:
        return f"not measured: {target.says}, {target.bound}."
    found = f"{target.says}: {verdict.value:.3g}, {target.bound} ({verdict.where})."
    if verdict.outcome == "hit":
        return f"hit: {found}"
    cause = verdict.reason or _UNEXPLAINED
    return f"missed !: {found} {cause[0].upper()}{cause[1:].rstrip('.')}."
