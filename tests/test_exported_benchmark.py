"""Exported files against each other: the run, its record and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="needs the extra: manyheads[export]")

from benchmarks import exported, exported_steps
from benchmarks.cases.exported import EXPORTED
from benchmarks.records import read_records
from benchmarks.render import render
from benchmarks.tables import TABLES

from manyheads.attention import MECHANISMS

# The tracer passes symbolic sizes where the type checks know only int.
pytestmark = pytest.mark.usefixtures("untyped")


def test_a_smoke_run_is_recorded_and_shown(tmp_path: Path) -> None:
    assert exported.main(["--smoke", "--out", str(tmp_path)]) == 0
    (record,) = read_records(tmp_path)
    assert record["conditions"]["weights"] == "random"
    assert [(row["name"], row["image_size"]) for row in record["rows"]] == [
        (name, size)
        for size in ([32, 32], [40, 64])
        for name in ("softmax", "Hydra() in all blocks")
    ]
    assert record["rows"][2]["fed_size"] == [48, 64]
    assert TABLES["exported"].select([record]) == [record]
    shown = render([record])
    assert "40x64, padded to 48x64" in shown
    assert "as ONNX, batch 1, in onnxruntime, CPU" in shown


def test_every_mechanism_runs_against_softmax_at_both_sizes() -> None:
    first, *others = EXPORTED.entries
    assert first.recipe is None
    tried = {
        type(swap.attention)
        for entry in others
        if entry.recipe
        for swap in entry.recipe.swaps
    }
    assert {kind.__name__ for kind in MECHANISMS} == {
        "Softmax",
        *(kind.__name__ for kind in tried),
    }
    assert EXPORTED.sizes == ((224, 224), (1080, 1920))


def test_the_script_behind_the_causes_names_the_steps_of_both_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    exported_steps.main(["--size", "64x64", "--rounds", "2"])
    first, second = capsys.readouterr().out.split("Hallucinated() in all blocks: ")
    assert first.startswith("softmax: ")
    for step in ("linear 384 to 1536", "softmax", "scores", "mixing", "copies"):
        assert f"  {step} " in first
        assert f"  {step} " in second
    assert "linear 384 to 1152" in first
    assert "linear 384 to 768" in second
