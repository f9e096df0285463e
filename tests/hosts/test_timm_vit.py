"""Every kind of timm model built on timm.layers.attention.Attention, for real."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch import nn

import manyheads as mh
from manyheads.errors import ImageSizeError, MaskRefused, SwapRefused, UnknownHost
from manyheads.hosts import find_host
from tests.helpers import assert_close, tiny_vit

# Real registered architectures, made small where their constructors allow it.
SMALL = {"img_size": 64, "depth": 2, "num_classes": 7}
FAMILIES: dict[str, dict[str, object]] = {
    "vit_tiny_patch16_224": SMALL,
    "deit_tiny_patch16_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,
    "deit3_small_patch16_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "vit_base_patch16_clip_224": SMALL,
    "vit_small_patch14_dinov2": SMALL | {"img_size": 56},
    "vit_small_patch14_reg4_dinov2": SMALL | {"img_size": 56},
    "vit_medium_patch16_reg4_gap_256": SMALL,
    "vit_so150m2_patch16_reg1_gap_256": SMALL,
    "vit_base_patch16_rpn_224": SMALL,
    "vit_base_patch16_plus_240": SMALL,
    "aimv2_large_patch14_224": SMALL | {"img_size": 56, "depth": 1},
    "vit_base_patch16_18x2_224": SMALL,
    "pit_ti_224": {},
    "crossvit_9_240": {},
    "mobilevit_xxs": {},
    "naflexvit_base_patch16_gap": {"depth": 2, "num_classes": 7},
}
OPTIONS: dict[str, dict[str, object]] = {
    "qk-norm": {"qk_norm": True},
    "scale-norm": {"scale_attn_norm": True},
    "no-qkv-bias": {"qkv_bias": False},
    "13-heads": {"embed_dim": 52, "num_heads": 13},
    "registers": {"reg_tokens": 4},
    "no-class-token": {"class_token": False, "global_pool": "avg"},
    "layer-scale": {"init_values": 0.1},
}


def _image(model: nn.Module) -> torch.Tensor:
    host, _ = find_host(model)
    wanted = host.image_input(model)
    return torch.randn(2, wanted.channels, *wanted.size)


@pytest.mark.parametrize("name", FAMILIES)
def test_hydra_runs_in_every_block_of_each_family(name: str) -> None:
    model = timm.create_model(name, **FAMILIES[name]).eval()
    student = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Hydra())))
    _, sites = find_host(student)
    assert {site.attention for site in sites} == {mh.Hydra()}
    with torch.no_grad():
        assert student(_image(model)).isfinite().all()
    student.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_identity_swap_holds_for_each_option(options: dict[str, object]) -> None:
    model, image = tiny_vit(**options), torch.randn(2, 3, 32, 32)
    same = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Softmax())))
    assert_close(same(image), model(image))


@pytest.mark.parametrize("spec", [mh.Softmax(), mh.Hydra()], ids=repr)
def test_gated_attention_of_another_width_keeps_its_gate(
    spec: mh.Softmax | mh.Hydra,
) -> None:
    """No registered model is gated yet; the layer is, and its users are."""
    model = tiny_vit()
    for block in model.blocks:
        block.attn = Attention(
            48, num_heads=3, attn_head_dim=24, qkv_bias=True, gated=True
        ).eval()
    image = torch.randn(2, 3, 32, 32)
    student = mh.convert(model, mh.Recipe(mh.Swap(attention=spec)))
    assert student.blocks[0].attn.attn_dim == 72
    if spec == mh.Softmax():
        assert_close(student(image), model(image))
    with torch.no_grad():
        student.blocks[0].attn.gate.bias.fill_(-1e4)
    closed = student.blocks[0].attn(torch.randn(1, 17, 48))
    assert_close(closed, student.blocks[0].attn.proj.bias.expand(1, 17, 48))


def test_the_distilled_deit_has_two_prefix_tokens() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", device="meta")
    _, sites = find_host(model)
    assert len(sites) == 12
    assert sites[3].path == "blocks.3"
    assert sites[3].geometry.num_prefix_tokens == 2
    assert sites[3].geometry.grid == (14, 14)
    assert sites[3].ffn_path == "blocks.3.mlp.fc2"


def test_children_keep_timm_names_and_only_the_attention_is_swapped() -> None:
    model = tiny_vit()
    student = mh.convert(model, mh.Recipe(mh.Swap(blocks=[1], attention=mh.Hydra())))
    assert list(student.state_dict()) == list(model.state_dict())
    changed = [
        path
        for path, module in student.named_modules()
        if path and type(module) is not type(_get(model, path))
    ]
    assert changed == ["blocks.1.attn", "blocks.1.attn.core"]


def test_pooling_heads_are_never_matched() -> None:
    model = timm.create_model("vit_base_patch16_siglip_224", device="meta")
    _, sites = find_host(model)
    assert all(site.attention_path.startswith("blocks.") for site in sites)
    student = mh.convert(model, mh.Recipe(mh.Swap(ffn=mh.Compact())))
    assert type(student.attn_pool.mlp.fc2) is nn.Linear


def test_a_causal_call_is_refused_by_hydra_and_honoured_by_softmax() -> None:
    model = tiny_vit()
    x = torch.randn(1, 5, 48)
    same = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Softmax())))
    assert_close(
        same.blocks[0].attn(x, is_causal=True), model.blocks[0].attn(x, is_causal=True)
    )
    hydra = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Hydra())))
    with pytest.raises(MaskRefused, match="Hydra was called with"):
        hydra.blocks[0].attn(x, is_causal=True)


def test_an_additive_mask_is_refused_by_hydra_and_honoured_by_softmax() -> None:
    model = tiny_vit()
    x, bias = torch.randn(1, 5, 48), torch.randn(1, 1, 5, 5)
    same = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Softmax())))
    ours, theirs = (m.blocks[0].attn(x, attn_mask=bias) for m in (same, model))
    assert_close(ours, theirs)
    hydra = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Hydra())))
    with pytest.raises(MaskRefused, match=r"additive mask \[1, 1, 5, 5\]"):
        hydra.blocks[0].attn(x, attn_mask=bias)


def test_a_key_mask_through_the_block_drops_the_tokens() -> None:
    hydra = mh.convert(tiny_vit(), mh.Recipe(mh.Swap(attention=mh.Hydra())))
    x = torch.randn(1, 6, 48)
    kept = torch.tensor([[True, True, False, True, False, True]])
    masked = hydra.blocks[0](x, attn_mask=kept[:, None, None, :])
    assert_close(masked[:, kept[0]], hydra.blocks[0](x[:, kept[0]]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "WindowAttention"),
        ("resnet18", "no attention layer"),
        ("xcit_nano_12_p16_224", "XCA"),
        ("beit_base_patch16_224", "Attention"),
    ],
)
def test_other_models_are_refused_by_name(name: str, reason: str) -> None:
    model = timm.create_model(name, device="meta")
    with pytest.raises(UnknownHost) as error:
        mh.preview(model, mh.Recipe(mh.Swap(attention=mh.Hydra())))
    assert type(model).__name__ in str(error.value)
    assert reason in str(error.value)


def test_a_model_of_no_library_is_refused_by_name() -> None:
    with pytest.raises(UnknownHost, match=r"torch\.nn\.modules\.linear\.Linear"):
        mh.convert(nn.Linear(2, 2), mh.Recipe(mh.Swap(attention=mh.Hydra())))


def test_attention_dropout_is_refused_by_name_and_all_layers_at_once() -> None:
    model = tiny_vit(attn_drop_rate=0.1)
    with pytest.raises(SwapRefused) as error:
        mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Hydra())))
    for fact in ("p=0.1", "blocks.0.attn", "blocks.2.attn", "attn_drop_rate=0"):
        assert fact in str(error.value)


def test_resize_pads_to_whole_patches_and_leaves_dynamic_models_alone() -> None:
    fixed, dynamic = tiny_vit(), tiny_vit(dynamic_img_size=True)
    host, _ = find_host(fixed)
    before = copy.deepcopy(dynamic.state_dict())
    assert host.resize(fixed, (33, 50)) == (40, 56)
    assert host.resize(dynamic, (33, 50)) == (40, 56)
    assert fixed.pos_embed.shape[1] == 5 * 7 + 1
    assert dynamic.pos_embed.shape == before["pos_embed"].shape
    for model in (fixed, dynamic):
        assert model(torch.randn(1, 3, 40, 56)).isfinite().all()


def test_an_image_smaller_than_a_patch_is_refused_with_the_sizes_that_are_valid() -> (
    None
):
    with pytest.raises(ImageSizeError, match=r"4x32.*8x8 or more"):
        mh.cost(tiny_vit(), image_size=(4, 32))


def test_a_model_whose_size_is_fixed_says_so() -> None:
    model = timm.create_model("crossvit_9_240", device="meta")
    with pytest.raises(ImageSizeError, match="240"):
        mh.cost(model, image_size=(480, 480))


def test_features_and_intermediates_still_work() -> None:
    model = mh.convert(tiny_vit(), mh.Recipe(mh.Swap(attention=mh.Hydra())))
    image = torch.randn(1, 3, 32, 32)
    assert model.forward_features(image).shape == (1, 17, 48)
    final, steps = model.forward_intermediates(image)
    assert final.shape == (1, 17, 48)
    assert [tuple(s.shape) for s in steps] == [(1, 48, 4, 4)] * 3
    model.set_grad_checkpointing()
    model.train()(image).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.isfinite().all()


def _get(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def test_a_mask_of_two_dimensions_is_one_of_pairs_as_in_torch() -> None:
    model, x = tiny_vit(), torch.randn(5, 5, 48)
    same = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Softmax())))
    pairs = torch.ones(5, 5, dtype=torch.bool).tril()
    ours, theirs = (m.blocks[0].attn(x, attn_mask=pairs) for m in (same, model))
    assert_close(ours, theirs)


@pytest.mark.parametrize("spec", [mh.Hydra(), mh.Hallucinated()], ids=repr)
def test_naflexvit_s_own_mask_is_read_where_it_leaves_out_keys_only(
    spec: mh.Hydra | mh.Hallucinated,
) -> None:
    """timm makes numbers for all pairs of tokens, even where every patch counts."""
    model = timm.create_model(
        "naflexvit_base_patch16_gap", depth=1, embed_dim=48, num_heads=4, num_classes=5
    ).eval()
    student = mh.convert(model, mh.Recipe(mh.Swap(attention=spec))).eval()
    places = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    batch = {
        "patches": torch.randn(2, 12, 768),
        "patch_coord": places.expand(2, 12, 2),
        "patch_valid": torch.ones(2, 12, dtype=torch.bool),
    }
    every = torch.ones(1, 1, 1, model.num_prefix_tokens + 12, dtype=torch.bool)
    assert_close(student(batch), student(batch | {"attn_mask": every}))
    batch["patch_valid"][1, 9:] = False
    with pytest.raises(MaskRefused, match="use_key_only_attn_mask=True"):
        student(batch)
