"""The export matrix of the documentation is what was recorded, and is complete."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("onnxruntime", reason="needs the extra: manyheads[export]")
pytest.importorskip("transformers", reason="needs the extra: manyheads[hf]")

from benchmarks.export_matrix import FAMILIES, PAGE, RECORD, SPECS, table

from manyheads.attention import MECHANISMS


def test_every_mechanism_and_family_has_its_cell_for_both_portable_targets() -> None:
    found = json.loads(RECORD.read_text())
    assert set(SPECS) == {kind.__name__ for kind in MECHANISMS}
    for family in FAMILIES:
        for name in SPECS:
            for target in ("pt2", "onnx"):
                cell = found[f"{family} | {name} | {target}"]
                assert cell["refused"] or cell["difference"] <= 1e-4


def test_the_page_shows_the_record() -> None:
    assert table(json.loads(RECORD.read_text())) in PAGE.read_text(encoding="utf-8")
