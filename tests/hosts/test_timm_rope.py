"""Rotary timm models: EVA-02, DINOv3, Perception Encoder, grouped keys, mixed ropes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import AttentionRope
from torch import nn

import manyheads as mh
from manyheads.attention import AttentionSpec
from manyheads.errors import MaskRefused
from manyheads.hosts import find_host
from tests.helpers import assert_close
from tests.hosts import laws

SMALL = {"img_size": 64, "depth": 2, "num_classes": 7, "embed_dim": 96, "num_heads": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    # one packed projection, GluMlp
    "eva02_tiny_patch14_224": SMALL | {"img_size": 56},
    # three projections, SwiGLU with a norm
    "eva02_base_patch14_224": SMALL | {"img_size": 56},
    "eva_giant_patch14_224": SMALL | {"img_size": 56},
    # five prefix tokens, half rotation, no bias
    "vit_small_patch16_dinov3": SMALL,
    "vit_small_plus_patch16_dinov3": SMALL,
    # AttentionRope
    "vit_pe_core_tiny_patch16_384": SMALL,
    "vit_pe_spatial_tiny_patch16_512": SMALL,
    "vit_small_patch16_rope_224": SMALL,
    # a rotation of each layer's own, per head
    "vit_small_patch16_rope_mixed_224": SMALL,
    "vit_small_patch16_rope_ape_224": SMALL,
    # grouped keys, in some of its blocks
    "vit_huge_patch16_sapiens2": SMALL | {"num_heads": 4, "num_kv_heads": (4, 2)},
    # vision encoders of language models, wrapped by a classifier
    "qwen3_vit_88m": SMALL | {"pos_embed_grid_size": 4},
    "deepseek_vit_412m": SMALL | {"img_size": 126},
}
EACH_FAMILY = pytest.mark.parametrize("name", FAMILIES)


def build(name: str, **changes: Any) -> nn.Module:
    model = timm.create_model(name, **(FAMILIES[name] | changes))
    return laws.randomise(model)


@EACH_FAMILY
def test_blocks_cost_what_the_formula_says(name: str) -> None:
    if "sapiens2" in name:
        return  # grouped keys cost less
    for block in mh.cost(build(name)).blocks:
        assert block.projections == 4 * block.num_tokens * 96 * 96


@pytest.mark.parametrize("name", list(FAMILIES)[:4])
def test_a_checkpoint_comes_back(name: str, tmp_path: Path) -> None:
    recipe = mh.Recipe(
        mh.Swap(blocks=[1], attention=mh.Hydra()), mh.Swap(ffn=mh.Compact(rank=8))
    )
    model = timm.create_model(name, **FAMILIES[name])
    again = laws.round_trip_law(model, recipe, tmp_path / "student")
    student = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Hydra())))
    student.load_state_dict(model.state_dict(), strict=True)
    assert again.blocks[1].attn.num_prefix_tokens == model.num_prefix_tokens


def test_position_reaches_hydra_through_the_rotation() -> None:
    """Without rotation Hydra would not see that two patches change places."""
    student = mh.convert(
        build("vit_small_patch16_rope_224"), laws.everywhere(mh.Hydra())
    )
    layer = student.blocks[0].attn
    x = torch.randn(1, 17, 96)
    swapped = x[:, [0, 2, 1, *range(3, 17)]]
    rope = student.rope.get_embed((4, 4))
    still, turned = layer(x), layer(x, rope)
    assert_close(layer(swapped)[:, 0], still[:, 0])
    assert (layer(swapped, rope)[:, 0] - turned[:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("spec", [mh.Softmax(), mh.Hydra()], ids=repr)
def test_grouped_keys_serve_all_heads(spec: AttentionSpec) -> None:
    model = build("vit_small_patch16_rope_224", embed_dim=96, num_heads=4)
    for block in model.blocks:
        block.attn = AttentionRope(
            96, num_heads=4, num_kv_heads=2, qkv_fused=False, gated=True
        ).eval()
    student = laws.mechanism_law(model, spec)
    assert student.blocks[0].attn.k_proj.out_features == 48
    laws.identity_law(model)


def test_masks_are_honoured_or_refused() -> None:
    model = build("vit_small_patch16_dinov3")
    x = torch.randn(2, 9, 96)
    pairs = torch.ones(9, 9, dtype=torch.bool).tril()
    same = mh.convert(model, laws.everywhere(mh.Softmax()))
    for options in ({"attn_mask": pairs}, {"is_causal": True}):
        ours, theirs = (m.blocks[0].attn(x, **options) for m in (same, model))
        assert_close(ours, theirs)
    hydra = mh.convert(model, laws.everywhere(mh.Hydra())).blocks[0].attn
    with pytest.raises(MaskRefused):
        hydra(x, is_causal=True)
    with pytest.raises(MaskRefused):
        hydra(x, attn_mask=torch.randn(1, 1, 9, 9))
    kept = torch.arange(9) < 6
    masked = hydra(x, attn_mask=kept[None, None, None])
    assert_close(masked[:, :6], hydra(x[:, :6]))


NAFLEX: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov3": ("vit_small_patch16_dinov3", SMALL),
    "eva02": ("eva02_tiny_patch14_224", SMALL | {"img_size": 56}),
    "eva02-split": ("eva02_base_patch14_224", SMALL | {"img_size": 56}),
    **{
        name: (
            "naflexvit_base_patch16_gap",
            {"depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 7, **options},
        )
        for name, options in {
            "axial": {"rope_type": "axial"},
            "mixed": {"rope_type": "mixed"},
            "gated": {"attn_gated": True},
            "key-only": {"rope_type": "axial", "use_key_only_attn_mask": True},
        }.items()
    },
}


def naflex(name: str) -> nn.Module:
    architecture, options = NAFLEX[name]
    switch = {} if architecture.startswith("naflex") else {"use_naflex": True}
    return laws.randomise(timm.create_model(architecture, **options, **switch))


def packed(model: nn.Module, shapes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Images of these grids as NaFlexVit takes them, padded to the longest."""
    generator = torch.Generator().manual_seed(0)
    longest = max(rows * columns for rows, columns in shapes)
    width = 3 * model.embeds.patch_size[0] ** 2
    batch = {
        "patches": torch.randn(len(shapes), longest, width, generator=generator),
        "patch_coord": torch.zeros(len(shapes), longest, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(shapes), longest, dtype=torch.bool),
    }
    for image, (rows, columns) in enumerate(shapes):
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        batch["patch_coord"][image, : rows * columns] = places
        batch["patch_valid"][image, : rows * columns] = True
    return batch


@pytest.mark.parametrize("name", NAFLEX)
def test_naflex_models_are_converted_at_any_grid(name: str) -> None:
    """They have no one patch embedding, and rotations may differ between images."""
    model = naflex(name)
    size = (56, 84) if name.startswith("eva02") else (48, 80)
    laws.identity_law(model, size)
    for spec in laws.SPECS:
        if not laws.refused(model, spec):
            laws.mechanism_law(model, spec, size)
    laws.cost_law(model, mh.Softmax(), mh.Hydra(), size=size)
    batch = packed(model, [(3, 4), (2, 3)])
    student = mh.convert(model, laws.everywhere(mh.Softmax()))
    with torch.no_grad():
        assert_close(student(batch), model(batch))


def test_naflex_rotations_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    laws.round_trip_law(
        naflex("dinov3"), laws.everywhere(mh.Hydra()), tmp_path / "student"
    )


@pytest.mark.parametrize("spec", [mh.Hydra(), mh.Hallucinated()], ids=repr)
def test_naflex_padding_that_is_the_same_for_all_queries_is_honoured(
    spec: AttentionSpec,
) -> None:
    student = mh.convert(naflex("key-only"), laws.everywhere(spec)).eval()
    batch = packed(student, [(3, 4), (2, 3)])
    alone = {key: value[1:, :6] for key, value in batch.items()}
    with torch.no_grad():
        assert_close(student(batch)[1:], student(alone))


def test_the_geometry_is_dinov3s() -> None:
    model = timm.create_model("vit_small_patch16_dinov3", device="meta")
    _, sites = find_host(model)
    assert sites[3].path == "blocks.3"
    assert sites[3].geometry.num_prefix_tokens == 5
    assert sites[3].geometry.grid == (16, 16)
    assert sites[3].ffn_path == "blocks.3.mlp.fc2"
