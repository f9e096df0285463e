"""The one script for a borrowed GPU, on a CPU: every way through it but the numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.cases.gpu import GPU_PIECES, GPU_SMOKE
from benchmarks.gpu import obstacle
from benchmarks.records import read_records
from benchmarks.render import render

ROOT = Path(__file__).parents[1]


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_smoke_run_records_every_piece(tmp_path: Path) -> None:
    done = _run("--smoke", "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "3 of 3 pieces" in done.stdout
    records = read_records(tmp_path)
    names = {record["case"]["name"] for record in records}
    assert names == {piece.case.name for piece in GPU_SMOKE}
    for record in records:
        json.dumps(record, allow_nan=False)
        assert render([record])


def test_red_tests_and_a_spent_budget_are_told() -> None:
    piece = GPU_PIECES[0]
    gate = piece.gate[0]
    assert obstacle(piece, {"test_other"}, 500.0) == ""
    assert f"{gate} is red" in obstacle(piece, {gate}, 500.0)
    assert "12 s are left" in obstacle(piece, set(), 12.0)
    assert "0 s are left" in obstacle(piece, set(), -3.0)


def test_pieces_have_gates_that_exist_and_fit_their_limits() -> None:
    for piece in (*GPU_PIECES, *GPU_SMOKE):
        assert piece.case.budget_s < piece.limit_s
        for name in piece.gate:
            assert (ROOT / "tests" / "kernels" / f"{name}.py").is_file()
    names = [piece.case.name for piece in (*GPU_PIECES, *GPU_SMOKE)]
    assert len(set(names)) == len(names)
