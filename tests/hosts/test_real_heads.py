"""Hallucinated attention in every library: projections of the real heads only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyheads as mh
from manyheads.errors import SwapRefused
from manyheads.hosts import find_host
from manyheads.hosts.heads import RealHeads
from manyheads.hosts.hf_names import PROJECTIONS, first_of
from tests.helpers import assert_close
from tests.hosts import laws
from tests.hosts.families import FAMILIES, at

HALLUCINATED = laws.everywhere(mh.Hallucinated())
TRANSFORMERS = [name for name in FAMILIES if name.startswith("transformers/")]
# Libraries whose heads can change places without a change of the answer.
REORDERED = [*TRANSFORMERS, "timm/vit", "timm/eva", "timm/eva02-split", "timm/dinov3"]
REORDERED += ["timm/rope", "timm/pe-core", "torchvision/vit"]


def model_of(name: str) -> nn.Module:
    return at(name, FAMILIES[name].native)


def layer_of(model: nn.Module, block: int = 0) -> Any:
    return model.get_submodule(find_host(model)[1][block].attention_path)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_project_queries_and_keys_of_the_real_heads(name: str) -> None:
    teacher = model_of(name)
    student = mh.convert(teacher, HALLUCINATED)
    ours, theirs = layer_of(student), layer_of(teacher)
    for names in PROJECTIONS[:2]:
        made, source = first_of(ours, *names), first_of(theirs, *names)
        assert isinstance(made, RealHeads)
        assert torch.equal(made.weight, source.weight[:16])
        x = torch.randn(2, 5, 32)
        assert torch.equal(made(x)[..., :16], made(x)[..., :16])
        assert_close(made(x)[..., :16], source(x)[..., :16])
        assert not made(x)[..., 16:].any()
    value = first_of(ours, *PROJECTIONS[2])
    assert torch.equal(value.weight, first_of(theirs, *PROJECTIONS[2]).weight)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_books_know_that_half_of_them_is_gone(name: str) -> None:
    teacher = model_of(name)
    before, after = mh.cost(teacher), mh.cost(mh.convert(teacher, HALLUCINATED))
    for was, now in zip(before.blocks, after.blocks, strict=True):
        assert now.projections == was.projections * 3 // 4
        assert now.num_parameters < was.num_parameters


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_hallucinated_students_of_transformers_come_back(
    name: str, tmp_path: Path
) -> None:
    swaps = mh.Swap(attention=mh.Hallucinated()), mh.Swap(ffn=mh.Compact(rank=8))
    laws.round_trip_law(model_of(name), mh.Recipe(*swaps), tmp_path / "student")


@pytest.mark.parametrize("name", REORDERED)
def test_another_order_of_heads_leaves_the_answer(name: str) -> None:
    model = mh.convert(model_of(name), mh.Recipe(mh.Swap(ffn=mh.Compact(rank=0.9))))
    host, sites = find_host(model)
    images = laws.pictures(model, FAMILIES[name].native)
    before = laws.answer(model.eval(), images)
    for site in sites:
        order = torch.randperm(site.geometry.num_heads).tolist()
        host.permute_heads(model, site, order)
    assert_close(laws.answer(model, images), before, slack=2)


@pytest.mark.parametrize(
    "name", ["transformers/vit", "transformers/dinov3", "timm/eva"]
)
def test_images_choose_the_real_heads(name: str) -> None:
    teacher = model_of(name)
    images = laws.pictures(teacher, FAMILIES[name].native)
    shown = mh.preview(teacher, HALLUCINATED, images=images)
    assert [choice.block for choice in shown.heads] == [0, 1]
    student = mh.convert(teacher, HALLUCINATED, images=images)
    assert laws.answer(student.eval(), images).isfinite().all()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("timm/sapiens2", "heads share keys in groups"),
        ("timm/rope-mixed", "each head has its own rotation"),
    ],
)
def test_heads_that_belong_to_a_place_keep_it(name: str, why: str) -> None:
    teacher = model_of(name)
    host, sites = find_host(teacher)
    with pytest.raises(SwapRefused, match=why):
        host.permute_heads(teacher, sites[1], range(sites[1].geometry.num_heads))


def test_grouped_keys_keep_the_groups_that_real_heads_read() -> None:
    teacher = model_of("timm/sapiens2")
    layer = layer_of(mh.convert(teacher, HALLUCINATED), 1)
    source = layer_of(teacher, 1)
    assert source.num_heads == 4
    assert source.num_kv_heads == 2
    width = source.head_dim
    # Heads 0 and 1 are real; both read the first group of keys, and all read values.
    assert torch.equal(layer.q_proj.weight, source.q_proj.weight[: 2 * width])
    assert torch.equal(layer.k_proj.weight, source.k_proj.weight[:width])
    assert torch.equal(layer.v_proj.weight, source.v_proj.weight)


def test_a_student_of_a_layer_whose_heads_are_twins_starts_as_its_teacher() -> None:
    """Heads 2 and 3 are made copies of 0 and 1: hallucinating them loses nothing."""
    teacher = mh.convert(model_of("transformers/dinov3"), laws.everywhere(mh.Softmax()))
    for block in range(2):
        layer = layer_of(teacher, block)
        for names in PROJECTIONS[:2]:
            _repeat_first_half(first_of(layer, *names))
    images = laws.pictures(teacher, (32, 32))
    student = mh.convert(teacher, HALLUCINATED)
    assert_close(laws.answer(student, images), laws.answer(teacher, images))


@torch.no_grad()
def _repeat_first_half(projection: nn.Linear) -> None:
    tensors: list[Tensor] = list(projection.parameters())
    for tensor in tensors:
        half = len(tensor) // 2
        tensor[half:] = tensor[:half].clone()
