"""Runs cases and records them: tests first, then times.

python -m benchmarks.run                            every case, for the record
python -m benchmarks.run --case hydra_core_d768     one of them
python -m benchmarks.run --smoke                    seconds; shows only that it runs
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, SMOKE
from benchmarks.kinds import Case, CoreCase
from benchmarks.measure import growth, measure
from benchmarks.records import FORMAT, RESULTS, VERSION, write_record
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
    device = torch.device(options.device)
    chosen = SMOKE if options.smoke else [c for c in cases if _wanted(c, options.case)]
    for case in chosen:
        if options.smoke:
            print(f"{case.name}: a smoke run; no tests before it, no meaning in it")
        elif not _passes(case):
            print(f"{case.name}: its tests fail, so no time is taken", file=sys.stderr)
            return 1
        record = _record(case, device)
        with tempfile.TemporaryDirectory() as scratch:
            default = scratch if options.smoke else RESULTS
            path = write_record(record, Path(options.out or default))
            print(render([record]))
            print(f"\nrecorded as {path.name}\n")
    return 0


def _parser(cases: Sequence[Case]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [case.name for case in cases]
    parser.add_argument(
        "--case", action="append", choices=names, help="may be repeated"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="one tiny case of each kind"
    )
    parser.add_argument("--out", help="folder of the records; benchmarks/results")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number")
    return parser


def _wanted(case: Case, names: Sequence[str] | None) -> bool:
    return names is None or case.name in names


def _passes(case: Case) -> bool:
    """Run the case's tests; no speed-up is reported on a red gate."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *case.gate], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    return done.returncode == 0


def _record(case: Case, device: torch.device) -> dict[str, Any]:
    where = conditions(device, getattr(torch, case.dtype)) | {"weights": "random"}
    rows = measure(case, device)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "kind": type(case).__name__.removesuffix("Case").lower(),
        "case": {f.name: _as_json(getattr(case, f.name)) for f in fields(case)},
        "rows": rows,
        "conditions": where,
    }
    return record | ({"growth": growth(rows)} if isinstance(case, CoreCase) else {})


def _as_json(value: object) -> object:
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    plain = value is None or isinstance(value, str | int | float)
    return value if plain else repr(value)


if __name__ == "__main__":
    sys.exit(main())
