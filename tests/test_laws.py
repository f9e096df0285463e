"""The laws of the design, over every mechanism and every way of converting there is.

A new mechanism is covered by being listed in `MECHANISMS`; what it needs beyond the
defaults stands in `VARIANTS`.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import manyheads as mh
from manyheads.attention import (
    MECHANISMS,
    AttentionSpec,
    Hallucinated,
    Hydra,
    Interactive,
    Mechanism,
    Softmax,
)
from manyheads.attention.base import apply_maps
from manyheads.errors import MaskRefused, SwapRefused
from manyheads.geometry import Geometry
from manyheads.hosts import find_host
from manyheads.ledger import keep_books
from manyheads.recipe import spec_from_json, spec_to_json
from tests.helpers import assert_close, tiny_vit

VARIANTS: tuple[AttentionSpec, ...] = (
    Softmax(),
    Hydra(),
    Hydra(kernel="mean"),
    Hydra(kernel="aft"),
    Hydra(reference_tokens=64),
    Interactive(landmarks=(1, 1)),
    Interactive(landmarks=(2, 2), mix="before"),
    Interactive(landmarks=(4, 2), mix="both"),
    Interactive(landmarks=(3, 2), mix="none"),
    Hallucinated(),
    Hallucinated(stage="logits", rank=2),
    Hallucinated(rank="full", cross_map=True, exempt_prefix=False),
    Hallucinated(layout="grid"),
)
# Prefix tokens and grid; the number of tokens N is their sum.
TOKENS = {1: (0, (1, 1)), 2: (1, (1, 1)), 63: (0, (7, 9)), 197: (1, (14, 14))}
TOKENS[257] = (1, (16, 16))

each_spec = pytest.mark.parametrize("spec", VARIANTS, ids=repr)


def test_every_mechanism_is_held_to_the_laws() -> None:
    assert {type(spec) for spec in VARIANTS} == set(MECHANISMS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", TOKENS, ids="N{}".format)
@each_spec
def test_1_twin_fast_equals_slow_in_output_and_every_gradient(
    spec: AttentionSpec, num_tokens: int, dtype: torch.dtype
) -> None:
    core, tensors, grid = _case(spec, num_tokens, dtype)
    _assert_twins(core, tensors, None, grid)


@each_spec
def test_1_twin_holds_under_a_key_mask(spec: AttentionSpec) -> None:
    core, tensors, grid = _case(spec, 63, torch.float64)
    mask = torch.rand(2, 63) > 0.3
    _assert_twins(core, tensors, mask, grid)


@each_spec
def test_1_twin_holds_on_a_packed_projection_read_in_place(
    spec: AttentionSpec,
) -> None:
    core, (q, k, v), grid = _case(spec, 63, torch.float64)
    packed = torch.cat([x.detach().flatten(2) for x in (q, k, v)], dim=-1)
    parts = packed.split([x.shape[2] * x.shape[3] for x in (q, k, v)], dim=-1)
    views = [
        p.unflatten(-1, x.shape[2:]) for p, x in zip(parts, (q, k, v), strict=True)
    ]
    assert not views[0].is_contiguous()
    assert_close(core(*views, None, grid), core(q, k, v, None, grid))


@each_spec
def test_2_maps_applied_to_values_reproduce_the_output(spec: AttentionSpec) -> None:
    core, (q, k, v), grid = _case(spec, 63, torch.float64)
    maps = core.maps(q, k, None, grid)
    assert maps.shape[0] == 2
    assert maps.shape[2:] == (63, 63)
    assert_close(core(q, k, v, None, grid), apply_maps(maps, v))


@each_spec
def test_a_pair_mask_is_honoured_or_refused(spec: AttentionSpec) -> None:
    core, (q, k, v), grid = _case(spec, 63, torch.float64)
    causal = torch.ones(63, 63, dtype=torch.bool).tril()[None, None]
    if core.accepts_pair_mask:
        assert_close(core(q, k, v, causal, grid), core.reference(q, k, v, causal, grid))
        return
    with pytest.raises(
        MaskRefused, match=r"\[1, 1, 63, 63\].*\[B, 1, 1, N\] = \[2, 1, 1, 63\]"
    ):
        core(q, k, v, causal, grid)


def test_3_identity_swap_leaves_logits_unchanged() -> None:
    model, image = tiny_vit(), torch.randn(2, 3, 32, 32)
    swapped = mh.convert(model, mh.Recipe(mh.Swap(attention=Softmax())))
    assert_close(swapped(image), model(image))


@each_spec
def test_4_the_teacher_is_bit_for_bit_as_it_was(spec: AttentionSpec) -> None:
    model = tiny_vit().train()
    model.blocks[1].requires_grad_(False)
    before, text = _snapshot(model), repr(model)
    student = mh.convert(model, mh.Recipe(mh.Swap(attention=spec)))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert repr(model) == text
    for name, tensor in _snapshot(model).items():
        assert torch.equal(tensor, before[name]), name
    assert student.training
    assert not student.blocks[1].attn.qkv.weight.requires_grad
    assert student.blocks[2].attn.qkv.weight.requires_grad


def test_4_a_failing_conversion_changes_nothing_either() -> None:
    model = tiny_vit(attn_drop_rate=0.1)
    before, text = _snapshot(model), repr(model)
    with pytest.raises(SwapRefused, match=r"blocks\.0\.attn"):
        mh.convert(model, mh.Recipe(mh.Swap(attention=Hydra())))
    assert repr(model) == text
    for name, tensor in _snapshot(model).items():
        assert torch.equal(tensor, before[name]), name


@each_spec
def test_6_cost_closed_form_equals_what_torch_counts_inside_the_blocks(
    spec: AttentionSpec,
) -> None:
    model = mh.convert(tiny_vit(), mh.Recipe(mh.Swap(attention=spec)))
    host, sites = find_host(model)
    books = keep_books(model, host, sites)
    counter = FlopCounterMode(display=False)
    model.to("meta")
    with counter:
        model(torch.empty(1, 3, 32, 32, device="meta"))
    inside = counter.get_flop_counts()["VisionTransformer.blocks"]
    counted = sum(inside.values()) // 2
    closed = sum(block.matmul for block in books.blocks)
    if isinstance(spec, Hydra) and spec.kernel != "cosine":
        # Plain element-wise operators: torch counts nothing, the closed form does.
        closed -= sum(block.attention_matrices for block in books.blocks)
    assert closed == counted
    assert books.num_parameters == sum(p.numel() for p in model.parameters())


@each_spec
def test_8_spec_and_recipe_survive_json(spec: AttentionSpec) -> None:
    assert spec_from_json(spec_to_json(spec), "here") == spec
    recipe = mh.Recipe(mh.Swap(blocks=[0, -1], attention=spec, ffn=mh.Compact()))
    assert mh.Recipe.from_json(recipe.to_json()) == recipe


@each_spec
def test_8_a_saved_model_comes_back_with_the_same_logits(
    spec: AttentionSpec, tmp_path: object
) -> None:
    recipe = mh.Recipe(
        mh.Swap(blocks=[0, 2], attention=spec), mh.Swap(ffn=mh.Compact())
    )
    student = mh.convert(tiny_vit(), recipe)
    again = mh.load(mh.save(student, f"{tmp_path}/student"))
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(image), student(image))


@each_spec
@pytest.mark.parametrize("size", [(32, 32), (40, 64), (96, 16)], ids=str)
def test_10_any_size_whose_grid_is_valid_runs(
    spec: AttentionSpec, size: tuple[int, int]
) -> None:
    if not _fits(spec, (size[0] // 8, size[1] // 8)):
        pytest.skip("the grid is smaller than what the mechanism needs")
    model = tiny_vit(dynamic_img_size=True)
    student = mh.convert(model, mh.Recipe(mh.Swap(attention=spec)))
    assert student(torch.randn(1, 3, *size)).isfinite().all()


def _fits(spec: AttentionSpec, grid: tuple[int, int]) -> bool:
    landmarks = getattr(spec, "landmarks", (1, 1))
    return all(side >= n for side, n in zip(grid, landmarks, strict=True))


def _case(
    spec: AttentionSpec, num_tokens: int, dtype: torch.dtype
) -> tuple[Mechanism, list[Tensor], tuple[int, int]]:
    prefix, grid = TOKENS[num_tokens]
    assert prefix + math.prod(grid) == num_tokens
    geometry = Geometry(
        dim=24,
        num_heads=4,
        head_dim=6,
        num_prefix_tokens=prefix,
        grid=grid,
        scale=6**-0.5,
    )
    if not _fits(spec, grid):
        pytest.skip("the grid is smaller than what the mechanism needs")
    assert spec.problem(geometry) is None
    core = spec.build(geometry).to(dtype)
    for parameter in core.parameters():
        nn.init.normal_(parameter, std=0.5)
    heads = spec.num_query_heads(geometry)
    shapes = [(2, num_tokens, h, 6) for h in (heads, heads, 4)]
    tensors = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    return core, tensors, grid


def _assert_twins(
    core: Mechanism, tensors: list[Tensor], mask: Tensor | None, grid: tuple[int, int]
) -> None:
    leaves = [*tensors, *core.parameters()]
    fast, slow = core(*tensors, mask, grid), core.reference(*tensors, mask, grid)
    assert_close(fast, slow)
    weight = torch.randn_like(slow)
    for ours, theirs in zip(
        _gradients(fast, weight, leaves), _gradients(slow, weight, leaves), strict=True
    ):
        if theirs is None or ours is None:
            # A query of length-one maps has no say: both forms agree on that.
            assert (
                ours is theirs or (ours if theirs is None else theirs).abs().max() == 0
            )
        else:
            assert_close(ours, theirs, slack=4)


def _gradients(
    out: Tensor, weight: Tensor, leaves: list[Tensor]
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        (out * weight).sum(), leaves, retain_graph=True, allow_unused=True
    )


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: copy.deepcopy(t) for name, t in model.state_dict().items()}
