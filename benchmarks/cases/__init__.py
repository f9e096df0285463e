"""The cases, as data: what is timed against what, at which sizes.

A new case is one more entry in the file of its idea; `benchmarks.kinds` says what a
case may hold. Those that are not `extra` make up `make bench`; `benchmarks.gpu` runs
the cases of `cases/gpu.py`, and `benchmarks.exported` that of `cases/exported.py`.
"""

from __future__ import annotations

from benchmarks.cases.exported import EXPORTED
from benchmarks.cases.gpu import GPU_CASES
from benchmarks.cases.hallucinated import HALLUCINATED_CASES
from benchmarks.cases.hydra import HYDRA_CASES
from benchmarks.cases.interactive import INTERACTIVE_CASES
from benchmarks.cases.peers import PEER_CASES
from benchmarks.cases.scaling import SCALING_CASES
from benchmarks.cases.smoke import SMOKE
from benchmarks.kinds import Case
from benchmarks.targets import Target

__all__ = ["CASES", "SMOKE", "targets_of"]

CASES: tuple[Case, ...] = (
    *HYDRA_CASES,
    *INTERACTIVE_CASES,
    *HALLUCINATED_CASES,
    *PEER_CASES,
    *SCALING_CASES,
)


def targets_of(name: str) -> tuple[Target, ...]:
    """Give the targets of the case of this name; none if there is no such case.

    They are not read from records, so that a corrected target judges old numbers too.
    """
    every = (*CASES, *GPU_CASES, EXPORTED, *SMOKE)
    return next((case.targets for case in every if case.name == name), ())
