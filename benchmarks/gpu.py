"""Everything that needs a GPU, in ten minutes: its tests first, then its benchmarks.

python -m benchmarks.gpu                        all, into benchmarks/results
python -m benchmarks.gpu --smoke --device cpu   tiny; shows only that it runs

A borrowed machine may be gone at any moment, so the most important comes first, each
piece is a process of its own with a limit, and its record is written when it is done.
A piece whose tests are red, or for which no time is left, is told and left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases.gpu import GPU_PIECES, GPU_SMOKE, Piece

__all__ = ["main", "obstacle"]

ROOT = Path(__file__).parents[1]
_TESTS = "tests/kernels"
_TESTS_LIMIT_S = 200.0
# A piece that could not even start its models is not begun.
_LEAST_S = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 all done, 1 something was left out."""
    options = _parser().parse_args(arguments)
    pieces = GPU_SMOKE if options.smoke else GPU_PIECES
    started = time.perf_counter()

    def left() -> float:
        return float(options.budget) - (time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or (scratch if options.smoke else None)
        red = _red_files(min(_TESTS_LIMIT_S, left()), smoke=options.smoke)
        if red is None:
            return 1
        undone = []
        for piece in pieces:
            problem = obstacle(piece, red, left())
            if not problem:
                limit_s = min(piece.limit_s, left())
                problem = _run_apart(piece, options, folder, limit_s)
            if problem:
                undone.append(f"{piece.case.name}: {problem}")
        spent = time.perf_counter() - started
        print(f"{len(pieces) - len(undone)} of {len(pieces)} pieces in {spent:.0f} s")
        for line in undone:
            print(f"left out: {line}", file=sys.stderr)
    return int(bool(undone or red))


def obstacle(piece: Piece, red: set[str], left_s: float) -> str:
    """Say in one clause why a piece is left out; nothing if it can begin."""
    blocked = sorted(red & set(piece.gate))
    if blocked:
        return f"{', '.join(blocked)} is red, so no time is taken"
    if left_s < min(_LEAST_S, piece.limit_s):
        return f"{max(0.0, left_s):.0f} s are left, too few to begin"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a smoke run")
    parser.add_argument("--smoke", action="store_true", help="tiny pieces")
    parser.add_argument("--out", help="folder of the records; benchmarks/results")
    parser.add_argument(
        "--budget", type=float, default=570.0, help="seconds for tests and all pieces"
    )
    return parser


def _red_files(limit_s: float, *, smoke: bool) -> set[str] | None:
    """Run the tests that need a GPU; name the files with a failure in them.

    None where pytest did not come to an end, which says nothing of any file.
    """
    path = f"{_TESTS}/test_gpu.py" if smoke else _TESTS
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *words, path]
        try:
            code = subprocess.run(command, cwd=ROOT, check=False, timeout=limit_s)
        except subprocess.TimeoutExpired:
            print(f"the tests took more than {limit_s:.0f} s", file=sys.stderr)
            return None
        if code.returncode not in (0, 1) or not report.is_file():
            print("the tests could not be run", file=sys.stderr)
            return None
        # Written a moment ago by the process above.
        cases = ET.parse(report).getroot().iter("testcase")
        return {
            case.attrib["classname"].rpartition(".")[2]
            for case in cases
            if case.find("failure") is not None or case.find("error") is not None
        }


def _run_apart(
    piece: Piece, options: argparse.Namespace, folder: str | None, limit_s: float
) -> str:
    """Measure one piece in a process of its own; say what went wrong, or nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu_piece", piece.case.name]
    command += ["--device", options.device]
    command += ["--out", folder] if folder else []
    try:
        done = subprocess.run(command, cwd=ROOT, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"it took more than {limit_s:.0f} s"
    return "" if done.returncode == 0 else f"its process ended with {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
