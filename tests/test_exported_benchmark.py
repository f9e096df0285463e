"""Exported files against each other: the run, its record and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="needs the extra: manyheads[export]")

from benchmarks import exported
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
    first, *others = exported.CASE.entries
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
    assert exported.CASE.sizes == ((224, 224), (1080, 1920))
