"""attention_maps in every host family, with weights that let every map be seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs the extra: manyheads[export]")
pytest.importorskip("transformers", reason="needs the extra: manyheads[hf]")

from benchmarks.export_matrix import FAMILIES, SPECS, awaken

import manyheads as mh
from manyheads.attention.base import apply_maps
from manyheads.data.exhibits import exhibits
from manyheads.errors import SwapRefused
from manyheads.hosts import find_host, mechanism_of
from tests.helpers import assert_close


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_applied_to_values_are_what_the_block_gives(
    family: str, name: str
) -> None:
    recipe = mh.Recipe(mh.Swap(attention=SPECS[name]))
    try:
        model = mh.convert(awaken(FAMILIES[family]()), recipe).eval()
    except SwapRefused:
        pytest.skip("this mechanism has no place in this family")
    host, sites = find_host(model)
    given: dict[int, Any] = {}
    for site in sites:
        core = mechanism_of(model.get_submodule(site.attention_path))
        if core is None:
            continue  # A convolution, or exempt: too few heads to make some up.
        with torch.no_grad():
            for parameter in core.parameters():
                parameter.add_(torch.randn_like(parameter) / 3)
        core.register_forward_hook(
            lambda *args, index=site.index: given.setdefault(index, args[2])
        )
    wanted = host.image_input(model)
    images = exhibits(None, wanted).at(wanted.size)
    with torch.no_grad():
        host.feed(model, images)
    blocks = [b for b in mh.attention_maps(model, images).blocks if b.block in given]
    assert len(blocks) == len(given) > 0
    for block in blocks:
        found = apply_maps(block.maps, block.values)
        largest = given[block.block].abs().max()
        assert_close(found / largest, given[block.block] / largest, slack=10)
