"""The export matrix of the documentation is what was recorded, and is complete."""

from __future__ import annotations

import json
from typing import Literal, get_args

import pytest

pytest.importorskip("onnxruntime", reason="needs the extra: manyheads[export]")
pytest.importorskip("transformers", reason="needs the extra: manyheads[hf]")

import torch
from benchmarks.export_matrix import (
    FAMILIES,
    PAGE,
    RECORD,
    SPECS,
    awaken,
    export_cell,
    table,
)

from manyheads.artifacts import Target
from manyheads.attention import MECHANISMS
from manyheads.data.exhibits import exhibits
from manyheads.hosts import find_host


def test_every_mechanism_and_family_has_its_cell_for_every_target() -> None:
    found = json.loads(RECORD.read_text())
    assert set(SPECS) == {kind.__name__ for kind in MECHANISMS}
    for family in FAMILIES:
        for name in SPECS:
            for target in get_args(Target):
                cell = found[f"{family} | {name} | {target}"]
                assert cell["refused"] or 0 <= cell["difference"] <= 1e-4
                assert len(cell["with"]["git"]) == 40, "recorded from committed code"


def test_the_page_shows_the_record() -> None:
    assert table(json.loads(RECORD.read_text())) in PAGE.read_text(encoding="utf-8")


def test_a_cell_of_one_size_where_any_was_tried_has_its_reason_below() -> None:
    found = json.loads(RECORD.read_text())
    tried = {"cell": None, "not_at_any_size": "NotExportable: a guard failed"}
    found["timm ViT, DeiT | Softmax | pt2"] |= tried
    found["torchvision ViT | Hydra | pt2"] |= tried
    shown = table(found)
    assert "| timm ViT, DeiT | native size (1) |" in shown
    assert "\n1. NotExportable: a guard failed\n" in shown
    assert shown.count("native size (1)") == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_attention_shows_in_the_outputs(family: str) -> None:
    # Else an export could have any attention at all and pass the comparison.
    model = awaken(FAMILIES[family]()).eval()
    host, sites = find_host(model)
    wanted = host.image_input(model)
    images = exhibits(None, wanted).at(wanted.size)
    with torch.no_grad():
        before = host.output(host.feed(model, images))
        for site in (site for site in sites if not site.fixed):
            layer = model.get_submodule(site.attention_path)
            for name, parameter in layer.named_parameters():
                # Version 4 of transformers calls it key.bias.
                if name in ("k.bias", "k_proj.bias", "key.bias"):
                    continue  # Softmax ignores what all keys have in common.
                kept = parameter.clone()
                parameter.mul_(1.5)
                after = host.output(host.feed(model, images))
                parameter.copy_(kept)
                moved = (after - before).abs().max() / before.abs().max()
                assert moved > 1e-4, f"{site.attention_path}.{name}"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pt2", "onnx"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_is_still_what_was_recorded(
    family: str, name: str, target: Literal["pt2", "onnx"], untyped: None
) -> None:
    recorded = json.loads(RECORD.read_text())[f"{family} | {name} | {target}"]
    found = export_cell(family, name, target)
    assert found["cell"] == (recorded["cell"] and tuple(recorded["cell"]))
    assert bool(found["refused"]) == bool(recorded["refused"])
