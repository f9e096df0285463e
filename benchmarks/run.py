"""Runs cases and records them: tests first, then times.

python -m benchmarks.run                            the quick set, under ten minutes
python -m benchmarks.run --all --resume             every case not recorded here yet
python -m benchmarks.run --case hydra_core_d768     one of them; may be repeated
python -m benchmarks.run --list                     what would run, and for how long
python -m benchmarks.run --smoke                    tiny; shows only that it runs
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks.cases import CASES, SMOKE
from benchmarks.kinds import Case, as_json, kind_of
from benchmarks.measure import fit, measure
from benchmarks.records import (
    FORMAT,
    RESULTS,
    VERSION,
    date,
    is_again,
    read_records,
    write_record,
)
from benchmarks.render import render
from manyheads.gauges.machine import conditions

ROOT = Path(__file__).parents[1]


def main(
    arguments: Sequence[str] | None = None, *, cases: Sequence[Case] = CASES
) -> int:
    """Run what the command line asks for; 0 done, 1 red tests, 2 a wrong argument."""
    options = _parser(cases).parse_args(arguments)
    # Threads that wait for each other on a busy machine make a smoke run long.
    threads = options.threads or (1 if options.smoke else None)
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = _chosen(options, cases)
    if options.list:
        print(_listed(chosen, Path(options.out or RESULTS)))
        return 0
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.out or (scratch if options.smoke else RESULTS))
        if options.resume:
            chosen = [c for c in chosen if not _is_recorded(c, device, folder)]
        return _run(chosen, device, folder, gate=None if options.smoke else Gate())


def _run(
    cases: Sequence[Case], device: torch.device, folder: Path, *, gate: Gate | None
) -> int:
    """Measure and record one case after the other; 1 if one could not be."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        # Tables go to the output, the bar to the error stream.
        redirect_stdout=False,
    )
    failed = []
    begun = time.perf_counter()
    with bar:
        whole = bar.add_task("Cases", total=len(cases))
        part = bar.add_task("", total=None)
        for case in cases:
            if gate is None:
                print(f"{case.name}: a smoke run; no tests before it, no meaning in it")
            else:
                bar.update(part, description=f"{case.name}: its tests", total=None)
                if not gate.passes(case):
                    told = f"{case.name}: its tests fail, so no time is taken"
                    print(told, file=sys.stderr)
                    failed.append(case.name)
                    continue

            def watch(what: str, done: int, rounds: int, name: str = case.name) -> None:
                told = f"{name}: {what}"
                bar.update(part, description=told, completed=done, total=rounds)

            started = time.perf_counter()
            try:
                record = _record(case, device, watch)
            except Exception:
                # A long run loses one case and not those that come after it.
                traceback.print_exc()
                failed.append(case.name)
                continue
            now = time.perf_counter()
            record["wall_s"] = round(now - started, 1)
            # The last record of a run says how long all of it took, tests included.
            record["run_s"] = round(now - begun, 1)
            path = write_record(record, folder)
            print(render([record]))
            print(f"\nrecorded as {path.name} after {record['wall_s']:.0f} s\n")
            bar.advance(whole)
    done, spent = len(cases) - len(failed), time.perf_counter() - begun
    print(f"{done} of {len(cases)} cases in {spent:.0f} s, tests and memory included")
    if failed:
        print(f"not recorded: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


class Gate:
    """Runs the tests of cases; a test file that was green once is not run again."""

    def __init__(self) -> None:
        self.green: set[str] = set()

    def passes(self, case: Case) -> bool:
        """Run the case's tests; no speed-up is reported on a red gate."""
        asked = [path for path in case.gate if path not in self.green]
        if not asked:
            return True
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *asked], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
            return False
        self.green.update(asked)
        return True


def _parser(cases: Sequence[Case]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [case.name for case in cases]
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--case", action="append", choices=names, help="may be repeated")
    which.add_argument("--all", action="store_true", help="the long cases too")
    which.add_argument(
        "--smoke", action="store_true", help="one tiny case of each kind"
    )
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip what this machine has recorded at this commit, if all is committed",
    )
    parser.add_argument("--out", help="folder of the records; benchmarks/results")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number")
    return parser


def _chosen(options: argparse.Namespace, cases: Sequence[Case]) -> list[Case]:
    if options.smoke:
        return list(SMOKE)
    if options.case:
        return [case for case in cases if case.name in options.case]
    return [case for case in cases if options.all or not case.extra]


def _listed(cases: Sequence[Case], folder: Path) -> str:
    """Say how long the rounds of each case may take, and what the last run took."""
    known = sorted(read_records(folder), key=date)
    took = {r["case"]["name"]: r["wall_s"] for r in known if "wall_s" in r}
    lines = [
        f"{case.name:40} {case.budget_s:5.0f} s of rounds"
        + (f", {took[case.name]:.0f} s in all last time" if case.name in took else "")
        for case in cases
    ]
    total = sum(case.budget_s for case in cases)
    lines.append(f"{'all of them, without tests and memory':40} {total:5.0f} s")
    return "\n".join(lines)


def _is_recorded(case: Case, device: torch.device, folder: Path) -> bool:
    here = conditions(device, getattr(torch, case.dtype))
    told = as_json(case)
    return any(is_again(old, told, here) for old in read_records(folder))


def _record(case: Case, device: torch.device, watch: Any) -> dict[str, Any]:
    where = conditions(device, getattr(torch, case.dtype)) | {"weights": "random"}
    rows = measure(case, device, watch)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind_of(case),
        "case": as_json(case),
        "rows": rows,
        "conditions": where,
    }
    return record | fit(rows)


if __name__ == "__main__":
    sys.exit(main())
