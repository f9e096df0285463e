"""The one script for a borrowed GPU, on a CPU: every way through it but the numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from benchmarks import gpu
from benchmarks.cases.gpu import GPU_PIECES, GPU_SMOKE
from benchmarks.gpu import Gate, obstacle
from benchmarks.kinds import LayerCase, ModelCase
from benchmarks.measure import measure
from benchmarks.records import read_records
from benchmarks.render import render

ROOT = Path(__file__).parents[1]
PIECES = (*GPU_PIECES, *GPU_SMOKE)


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


def _ran(monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, str]) -> list[str]:
    """Let tests end as told, at once; give the list of those that are run."""
    ran: list[str] = []

    def run(name: str, limit_s: float) -> str:
        ran.append(f"{name} {limit_s:.0f}")
        return outcomes.get(name, "")

    monkeypatch.setattr(gpu, "_run_tests", run)
    return ran


def test_red_tests_and_a_spent_budget_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = replace(GPU_PIECES[0], gate=("test_gpu", "test_triton_hydra"))
    ran = _ran(monkeypatch, {"test_triton_hydra": "is red", "test_gpu": ""})
    gate = Gate()
    assert "test_triton_hydra is red" in obstacle(piece, gate, lambda: 500.0)
    assert ran == ["test_gpu 120", "test_triton_hydra 120"]
    assert obstacle(replace(piece, gate=("test_gpu",)), gate, lambda: 500.0) == ""
    assert "12 s are left" in obstacle(piece, gate, lambda: 12.0)
    assert "0 s are left" in obstacle(piece, gate, lambda: -3.0)


def test_each_file_of_tests_runs_once_and_before_the_first_that_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = _ran(monkeypatch, {"test_triton_attention": "took more than 120 s"})
    gate = Gate()
    told = {piece.case.name: obstacle(piece, gate, lambda: 500.0) for piece in PIECES}
    assert ran[0] == f"{GPU_PIECES[0].gate[0]} 120"
    assert len(ran) == len({line.split()[0] for line in ran})
    # A file that never ends costs its own pieces alone.
    late = {name for name, problem in told.items() if problem}
    assert late == {p.case.name for p in PIECES if "test_triton_attention" in p.gate}
    assert 0 < len(late) < len(PIECES)


def test_tests_have_what_is_left_and_take_it_from_the_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = _ran(monkeypatch, {})
    clock = iter([80.0, 80.0, 20.0, 20.0, 20.0])
    piece = replace(GPU_PIECES[0], gate=("test_gpu", "test_triton_hydra"))
    # The first file has the 80 s there are; after it 20 are too few for the second.
    assert "20 s are left" in obstacle(piece, Gate(), lambda: next(clock))
    assert ran == ["test_gpu 80"]


@pytest.mark.slow
def test_tests_that_are_red_late_or_missing_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, body in {
        "test_green": "pass",
        "test_red": "raise ValueError",
        "test_late": "__import__('time').sleep(60)",
    }.items():
        text = f"import pytest\n@pytest.mark.gpu\ndef test_it():\n    {body}\n"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "test_empty.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(gpu, "_TESTS", str(tmp_path))
    gate = Gate()
    assert gate.problem("test_green", 60.0) == ""
    assert gate.problem("test_red", 60.0) == "is red"
    assert gate.problem("test_late", 10.0) == "took more than 10 s"
    assert gate.problem("test_empty", 60.0) == "has no test for a GPU"
    assert gate.problem("test_missing", 60.0) == "ended with 4"


def test_pieces_have_gates_that_exist_and_fit_their_limits() -> None:
    for piece in PIECES:
        assert piece.case.budget_s < piece.limit_s
        for name in piece.gate:
            assert (ROOT / "tests" / "kernels" / f"{name}.py").is_file()
    names = [piece.case.name for piece in PIECES]
    assert len(set(names)) == len(names)


def test_hallucinated_models_and_layers_are_pieces_in_bfloat16() -> None:
    cases = {piece.case.name: piece.case for piece in GPU_PIECES}
    for size in ("base", "small"):
        for name in (f"gpu_hallucinated_deit_{size}{c}" for c in ("", "_compiled")):
            case = cases[name]
            assert isinstance(case, ModelCase)
            assert case.dtype == "bfloat16"
            assert case.architecture == f"deit_{size}_patch16_224"
            labels = [entry.label for entry in case.entries]
            assert labels[0] == "softmax"
            assert labels[-1] == "hallucinated + compact at D/2"
    layer = cases["gpu_hallucinated_attention_d768"]
    assert isinstance(layer, LayerCase)
    assert (layer.part, layer.dtype) == ("attention", "bfloat16")
    # timm's own layer, whose softmax torch fuses, is the base.
    assert layer.entries[0].recipe is None
    assert timm.layers.use_fused_attn()


@pytest.mark.slow
def test_the_entries_of_those_pieces_run_in_bfloat16() -> None:
    cases = {piece.case.name: piece.case for piece in GPU_PIECES}
    model, layer = (
        cases[f"gpu_hallucinated_{name}"] for name in ("deit_small", "attention_d768")
    )
    assert isinstance(model, ModelCase)
    assert isinstance(layer, LayerCase)
    tiny = {"architecture": "deit_tiny_patch16_224", "rounds": 1, "budget_s": 0.0}
    small = replace(model, **tiny, inputs=((32, 32, 1),))
    rows = measure(small, torch.device("cpu"))
    assert [row["name"] for row in rows] == [entry.label for entry in model.entries]
    assert rows[-1]["flops"] < rows[1]["flops"] < rows[0]["flops"]
    one = replace(layer, **tiny, grids=((2, 2),), batch_sizes=(1,))
    rows = measure(one, torch.device("cpu"))
    assert [row["form"] for row in rows] == [entry.label for entry in layer.entries]
