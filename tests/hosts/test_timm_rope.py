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


def test_the_geometry_is_dinov3s() -> None:
    model = timm.create_model("vit_small_patch16_dinov3", device="meta")
    _, sites = find_host(model)
    assert sites[3].path == "blocks.3"
    assert sites[3].geometry.num_prefix_tokens == 5
    assert sites[3].geometry.grid == (16, 16)
    assert sites[3].ffn_path == "blocks.3.mlp.fc2"
