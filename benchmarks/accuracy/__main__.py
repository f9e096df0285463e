"""Runs the cells of the accuracy study that are not recorded yet.

python -m benchmarks.accuracy --data-cifar10 FOLDER        all of them
python -m benchmarks.accuracy --list                       what there is, what is done
python -m benchmarks.accuracy --only hydra --seeds 0       cells with this in the name

A cell that is recorded is not run again. One that was interrupted goes on where it
stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from benchmarks.accuracy.cases import CASES, Case
from benchmarks.accuracy.cells import Cell
from benchmarks.accuracy.pictures import FOLDER_OF, MissingData, read_data
from benchmarks.accuracy.records import (
    OtherCase,
    OtherWeights,
    is_recorded,
    require_one_teacher,
    require_recorded_weights,
    write,
)
from benchmarks.accuracy.table import one_line
from benchmarks.records import RESULTS
from manyheads import load
from manyheads.loop.weights import fingerprint

ROOT = Path(__file__).parents[2]


def main(
    arguments: Sequence[str] | None = None, *, cases: Sequence[Case] = CASES
) -> int:
    """Run what the command line asks for; 0 done, 2 it cannot be done."""
    options = _parser().parse_args(arguments)
    chosen = [
        (case, seed)
        for case in cases
        for seed in options.seeds
        if all(word in case.name for word in options.only)
    ]
    if not chosen:
        asked = " and ".join(map(repr, options.only))
        print(
            f"--only: no cell has {asked} in its name; --list shows all.",
            file=sys.stderr,
        )
        return 2
    out, runs = Path(options.out), Path(options.runs)
    try:
        if options.list:
            for case, seed in chosen:
                done = is_recorded(out, case, seed)
                print(f"{'done' if done else '    '}  {case.name}  seed {seed}")
            return 0
        for case, seed in chosen:
            if not is_recorded(out, case, seed):
                _run(case, seed, options, out, runs, cases)
    except (MissingData, OtherCase, OtherWeights) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(
    case: Case,
    seed: int,
    options: argparse.Namespace,
    out: Path,
    runs: Path,
    cases: Sequence[Case],
) -> None:
    print(f"{case.name} seed {seed} ...", flush=True)
    teacher = None
    if case.treatment != "teacher":
        teacher = _teacher(case, seed, options, out, runs)
    if case.treatment == "resized":
        # It takes the saved model of another cell.
        _finished(_healed_of(case, cases), seed, options, out, runs)
    record = _cell(case, seed, options, runs).perform(teacher)
    if teacher is None:
        require_one_teacher(out, case, seed, record["weights"])
    write(record, out)
    print(one_line(record), flush=True)


def _cell(case: Case, seed: int, options: argparse.Namespace, runs: Path) -> Cell:
    folder = getattr(options, f"data_{case.setting.name}")
    data = read_data(case.setting.name, folder)
    return Cell(case=case, seed=seed, data=data, runs=runs)


def _teacher(
    case: Case, seed: int, options: argparse.Namespace, out: Path, runs: Path
) -> nn.Module:
    """Load this seed's teacher; train it first if it is not there."""
    wanted = Case(setting=case.setting, model="teacher", treatment="teacher")
    return _finished(wanted, seed, options, out, runs)


def _healed_of(case: Case, cases: Sequence[Case]) -> Case:
    """Find the cell whose saved model a resized one takes."""
    for other in (*cases, *CASES):
        if other.name == case.healed_name and other.setting == case.setting:
            return other
    raise OtherCase(f"{case.name} needs a cell {case.healed_name}, and there is none.")


def _finished(
    case: Case, seed: int, options: argparse.Namespace, out: Path, runs: Path
) -> nn.Module:
    """Load the finished model of a cell; make it, again if need be, where it is gone.

    Raises:
        OtherWeights: It is not the model that was recorded.
    """
    cell = _cell(case, seed, options, runs)
    if not cell.saved.is_dir():
        teacher = None
        if case.treatment != "teacher":
            teacher = _teacher(case, seed, options, out, runs)
        record = cell.perform(teacher)
        if not is_recorded(out, case, seed):
            if teacher is None:
                require_one_teacher(out, case, seed, record["weights"])
            write(record, out)
    model = load(cell.saved)
    weights = fingerprint(model, values=True)
    require_recorded_weights(out, case, seed, weights, cell.saved)
    if case.treatment == "teacher":
        require_one_teacher(out, case, seed, weights)
    return model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WORD",
        help="cells whose name has this in it; repeat for cells that have all",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--out", default=str(RESULTS / "accuracy"), help="folder of the records"
    )
    parser.add_argument(
        "--runs",
        default=str(ROOT / "runs" / "accuracy"),
        help="folder of saved models and of runs that can go on",
    )
    for name, variable in FOLDER_OF.items():
        parser.add_argument(
            f"--data-{name}",
            default=os.environ.get(variable),
            metavar="FOLDER",
            help=f"where {name} lies; else the environment's {variable}",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
