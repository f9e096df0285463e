"""Everything that needs a GPU, in ten minutes: each benchmark after its own tests.

python -m benchmarks.gpu                        all, into benchmarks/results
python -m benchmarks.gpu --smoke --device cpu   tiny; shows only that it runs

A borrowed machine may be gone at any moment, so the most important comes first, each
piece is a process of its own with a limit, and its record is written when it is done.
So is each file of tests, run once, before the first piece that asks for it. A piece
whose tests are red or late, or for which no time is left, is told and left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.cases.gpu import GPU_PIECES, GPU_SMOKE, Piece

__all__ = ["Gate", "main", "obstacle"]

ROOT = Path(__file__).parents[1]
_TESTS = "tests/kernels"
# Of one file: those that compile take longest.
_TESTS_LIMIT_S = 120.0
# A piece that could not even start its models is not begun.
_LEAST_S = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 all done, 1 something was left out."""
    options = _parser().parse_args(arguments)
    pieces = GPU_SMOKE if options.smoke else GPU_PIECES
    started = time.perf_counter()

    def left() -> float:
        return float(options.budget) - (time.perf_counter() - started)

    gate = Gate()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or (scratch if options.smoke else None)
        undone = []
        for piece in pieces:
            problem = obstacle(piece, gate, left)
            if not problem:
                limit_s = min(piece.limit_s, left())
                problem = _run_apart(piece, options, folder, limit_s)
            if problem:
                undone.append(f"{piece.case.name}: {problem}")
        spent = time.perf_counter() - started
        print(f"{len(pieces) - len(undone)} of {len(pieces)} pieces in {spent:.0f} s")
        for line in undone:
            print(f"left out: {line}", file=sys.stderr)
    return int(bool(undone))


def obstacle(piece: Piece, gate: Gate, left: Callable[[], float]) -> str:
    """Say in one clause why a piece is left out; nothing if it can begin.

    Args:
        piece: What would be measured.
        gate: Runs the piece's tests, unless it has run them before.
        left: Tells the seconds that are left; tests take some of them.
    """
    least = min(_LEAST_S, piece.limit_s)
    for name in piece.gate:
        if left() < least:
            break
        problem = gate.problem(name, min(_TESTS_LIMIT_S, left()))
        if problem:
            return f"{name} {problem}, so no time is taken"
    if left() < least:
        return f"{max(0.0, left()):.0f} s are left, too few to begin"
    return ""


class Gate:
    """Runs files of tests that need a GPU, and remembers how each ended."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def problem(self, name: str, limit_s: float) -> str:
        """Say what is wrong with a file of tests; nothing if it is green."""
        if name not in self.known:
            self.known[name] = _run_tests(name, limit_s)
        return self.known[name]


def _run_tests(name: str, limit_s: float) -> str:
    words = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"{_TESTS}/{name}.py"]
    command = [sys.executable, "-m", "pytest", *words]
    try:
        done = subprocess.run(command, cwd=ROOT, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"took more than {limit_s:.0f} s"
    # A file that tests nothing says nothing good of a kernel.
    ended = {0: "", 1: "is red", 5: "has no test for a GPU"}
    return ended.get(done.returncode, f"ended with {done.returncode}")


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
