"""cost: the figures of the papers, and agreement with torch's own counter."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import manyheads as mh
from manyheads.errors import InvalidOption
from tests.helpers import tiny_vit


@pytest.mark.parametrize(
    ("hydra_blocks", "gflops"),
    [(0, "17.58"), (2, "17.46"), (8, "17.11"), (12, "16.87")],
)
def test_deit_base_costs_what_the_hydra_paper_counts(
    hydra_blocks: int, gflops: str
) -> None:
    model = timm.create_model("deit_base_patch16_224", device="meta")
    if hydra_blocks:
        last = range(12 - hydra_blocks, 12)
        model = mh.convert(model, mh.Recipe(mh.Swap(blocks=last, attention=mh.Hydra())))
    cost = mh.cost(model)
    assert f"{cost.flops / 1e9:.2f}" == gflops
    assert f"{cost.num_parameters / 1e6:.2f}" == "86.57"
    assert f"{gflops} GFLOPs (multiply-add = 1), 86.57 M parameters" in str(cost)


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [
        ((224, 224), 4.05, 4.15),
        ((384, 384), 11.05, 11.15),
        ((512, 512), 18.05, 18.15),
        ((1024, 1024), 46.85, 46.95),
        ((1080, 1920), 63.55, 64.05),
        ((2160, 3840), 87.45, 87.55),
    ],
)
def test_the_share_of_attention_grows_with_resolution_as_published(
    size: tuple[int, int], low: float, high: float
) -> None:
    model = timm.create_model("vit_base_patch16_224", device="meta")
    assert low <= 100 * mh.cost(model, image_size=size).attention_share < high


def test_hydra_makes_the_share_two_hundredths_of_a_percent_at_any_size() -> None:
    model = timm.create_model("vit_base_patch16_224", device="meta")
    hydra = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Hydra())))
    for size in ((224, 224), (1080, 1920)):
        share = 100 * mh.cost(hydra, image_size=size).attention_share
        assert f"{share:.2f}" == "0.02"


def test_a_size_that_is_not_whole_patches_is_padded_and_says_so() -> None:
    cost = mh.cost(tiny_vit(), image_size=(30, 33))
    assert cost.ledger.fed_size == (32, 40)
    assert "30x33, padded to 32x40" in str(cost)


def test_everything_outside_the_blocks_is_the_patch_embedding_and_the_head() -> None:
    ledger = mh.cost(tiny_vit()).ledger
    assert ledger.rest == 16 * (3 * 8 * 8) * 48 + 48 * 10
    assert ledger.normalisation == 7 * 5 * 48 * 17
    block = ledger.blocks[0]
    assert block.num_tokens == 17
    assert block.projections == 17 * 4 * 48 * 48
    assert block.feed_forward == 17 * 8 * 48 * 48
    assert block.attention_matrices == 2 * 17 * 17 * 48


def test_the_total_is_what_torch_counts_on_meta_plus_element_wise_work() -> None:
    model = timm.create_model("deit_small_patch16_224", device="meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    ledger = mh.cost(model).ledger
    assert 2 * (ledger.total - ledger.normalisation) == counter.get_total_flops()


def test_a_multiply_add_may_count_two() -> None:
    model = tiny_vit()
    assert mh.cost(model, multiply_add=2).flops == 2 * mh.cost(model).flops
    assert "(multiply-add = 2)" in str(mh.cost(model, multiply_add=2))


@pytest.mark.usefixtures("untyped")
def test_it_counts_nothing_but_one_or_two() -> None:
    with pytest.raises(InvalidOption, match="multiply_add=3"):
        mh.cost(tiny_vit(), multiply_add=3)


def test_the_result_is_json() -> None:
    model = tiny_vit()
    value = json.loads(json.dumps(mh.cost(model).to_json()))
    assert value["flops"] == mh.cost(model).flops
    assert value["blocks"][2]["path"] == "blocks.2"


def test_counting_leaves_the_model_alone() -> None:
    model = tiny_vit().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mh.cost(model, image_size=(64, 64))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
