"""preview and convert: what is shown is what is done, and what cannot be is said."""

from __future__ import annotations

import json

import pytest
import torch

import manyheads as mh
from manyheads.errors import InvalidRecipe, NothingToConvert, SwapRefused
from manyheads.hosts import find_host
from tests.helpers import assert_close, tiny_vit

HYDRA = mh.Hydra()


def _kinds(model: torch.nn.Module) -> list[object]:
    return [site.attention for site in find_host(model)[1]]


def test_only_the_named_blocks_change() -> None:
    student = mh.convert(
        tiny_vit(), mh.Recipe(mh.Swap(blocks=range(1, 3), attention=HYDRA))
    )
    assert _kinds(student) == [mh.Softmax(), HYDRA, HYDRA]


def test_negative_blocks_count_from_the_end() -> None:
    student = mh.convert(tiny_vit(), mh.Recipe(mh.Swap(blocks=[-1], attention=HYDRA)))
    assert _kinds(student) == [mh.Softmax(), mh.Softmax(), HYDRA]


def test_a_converted_model_can_be_converted_further_and_back() -> None:
    model = tiny_vit()
    last = mh.convert(model, mh.Recipe(mh.Swap(blocks=[2], attention=HYDRA)))
    every = mh.convert(last, mh.Recipe(mh.Swap(blocks=[0, 1], attention=HYDRA)))
    assert _kinds(every) == [HYDRA] * 3
    back = mh.convert(every, mh.Recipe(mh.Swap(attention=mh.Softmax())))
    image = torch.randn(1, 3, 32, 32)
    assert_close(back(image), model(image))


def test_one_swap_may_give_attention_and_another_the_feed_forward_layer() -> None:
    recipe = mh.Recipe(
        mh.Swap(blocks=[2], attention=HYDRA), mh.Swap(ffn=mh.Compact(rank=8))
    )
    _, sites = find_host(mh.convert(tiny_vit(), recipe))
    assert [site.ffn for site in sites] == [mh.Compact(rank=8)] * 3
    assert [site.attention for site in sites][2] == HYDRA


def test_preview_shows_what_convert_does_and_changes_nothing() -> None:
    model = tiny_vit()
    names = list(model.state_dict())
    recipe = mh.Recipe(
        mh.Swap(blocks=[2], attention=HYDRA), mh.Swap(blocks=[0], ffn=mh.Compact())
    )
    shown = mh.preview(model, recipe)
    student = mh.convert(model, recipe)
    assert list(model.state_dict()) == names
    assert [row.block for row in shown.rows] == [0, 2]
    assert [row.path for row in shown.rows] == ["blocks.0", "blocks.2"]
    assert [row.becomes for row in shown.rows] == ["Softmax() + Compact()", "Hydra()"]
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, student))
    assert shown.parameters == (before, after)
    assert shown.flops == (mh.cost(model).flops, mh.cost(student).flops)
    assert json.loads(json.dumps(shown.to_json()))["rows"][1]["becomes"] == "Hydra()"
    for fact in ("blocks.2", "Hydra()", f"{before / 1e6:.2f}", "multiply-add = 1"):
        assert fact in str(shown)


def test_preview_counts_at_any_size() -> None:
    recipe = mh.Recipe(mh.Swap(attention=HYDRA))
    small = mh.preview(tiny_vit(), recipe)
    large = mh.preview(tiny_vit(), recipe, image_size=(64, 128))
    assert large.image_size == (64, 128)
    assert large.flops[0] / large.flops[1] > small.flops[0] / small.flops[1]


@pytest.mark.parametrize("verb", [mh.preview, mh.convert])
def test_a_block_that_is_not_there_is_refused_with_those_that_are(verb: object) -> None:
    recipe = mh.Recipe(mh.Swap(blocks=range(2, 5), attention=HYDRA))
    with pytest.raises(NothingToConvert) as error:
        verb(tiny_vit(), recipe)
    for fact in ("3, 4", "blocks 0-2", "range(1, 3)"):
        assert fact in str(error.value)


def test_two_swaps_for_one_part_are_a_contradiction() -> None:
    recipe = mh.Recipe(
        mh.Swap(attention=HYDRA),
        mh.Swap(blocks=[-1], attention=mh.Hydra(kernel="mean")),
    )
    with pytest.raises(InvalidRecipe) as error:
        mh.convert(tiny_vit(), recipe)
    for fact in ("block 2", "Hydra(kernel='mean')", "Hydra()"):
        assert fact in str(error.value)


def test_a_rank_the_matrix_does_not_have_is_refused_for_all_blocks_at_once() -> None:
    with pytest.raises(SwapRefused) as error:
        mh.convert(tiny_vit(), mh.Recipe(mh.Swap(ffn=mh.Compact(rank=49))))
    for fact in ("rank 49", "48", "blocks.0.mlp.fc2", "blocks.2.mlp.fc2"):
        assert fact in str(error.value)


def test_a_layer_is_not_made_compact_twice() -> None:
    recipe = mh.Recipe(mh.Swap(ffn=mh.Compact()))
    student = mh.convert(tiny_vit(), recipe)
    with pytest.raises(SwapRefused, match="already is Compact"):
        mh.convert(student, recipe)


def test_converting_does_not_disturb_the_random_state() -> None:
    model = tiny_vit()
    state = torch.get_rng_state()
    mh.convert(model, mh.Recipe(mh.Swap(attention=HYDRA, ffn=mh.Compact())))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_type_and_gradients_carry_over(dtype: torch.dtype) -> None:
    model = tiny_vit().to(dtype)
    student = mh.convert(model, mh.Recipe(mh.Swap(attention=HYDRA, ffn=mh.Compact())))
    assert {p.dtype for p in student.parameters()} == {dtype}
    student(torch.randn(1, 3, 32, 32, dtype=dtype)).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in model.parameters())
