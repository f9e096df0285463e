"""One real architecture of every supported family, small, with random weights.

`FAMILIES` is what the laws run over. A family is built as its library builds it; only
sizes are changed, where its constructor allows that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torchvision
from torch import nn

from tests.hosts import hf_models, laws

Size = tuple[int, int]


@dataclass(frozen=True)
class Family:
    """How to build a model, and the two sizes of image at which it is looked at.

    Attributes:
        build: Makes the model, at the size given where that is not None.
        native: The size it has when it is built.
        other: A second size, not a square where the library allows that.
        rebuilt: Whether the second size needs building anew: the library ties a model
            to the size it was built for.
    """

    build: Callable[[Size | None], nn.Module]
    native: Size
    other: Size
    rebuilt: bool = False


def _timm(name: str, *, cells: int = 16, **arguments: Any) -> Family:
    """A timm model, looked at with 2 x 5 cells as well; by itself it has 4 x 4."""
    side = arguments.get("img_size", 4 * cells)

    def build(_: Size | None) -> nn.Module:
        return timm.create_model(name, **arguments)

    return Family(build, (side, side), (2 * cells, 5 * cells))


def _fixed(name: str, native: Size, other: Size, **arguments: Any) -> Family:
    def build(size: Size | None) -> nn.Module:
        return timm.create_model(name, img_size=size or native, **arguments)

    return Family(build, native, other, rebuilt=True)


def _hf(name: str) -> Family:
    return Family(lambda _: hf_models.FAMILIES[name](), (32, 32), (24, 40))


def _torchvision(_: Size | None) -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=48,
        mlp_dim=96,
        num_classes=7,
    )


PLAIN = {"img_size": 64, "depth": 2, "num_classes": 7}
THIN = PLAIN | {"embed_dim": 192, "num_heads": 4}
FINE = PLAIN | {"img_size": 56}
ROPE = PLAIN | {"embed_dim": 96, "num_heads": 3}
NARROW = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_classes": 10}

FAMILIES: dict[str, Family] = {
    "timm/vit": _timm("vit_tiny_patch16_224", **PLAIN),
    "timm/deit": _timm("deit_tiny_patch16_224", **PLAIN),
    "timm/deit-distilled": _timm("deit_tiny_distilled_patch16_224", **PLAIN),
    "timm/deit3": _timm("deit3_small_patch16_224", **PLAIN),
    "timm/siglip": _timm("vit_base_patch16_siglip_224", **THIN),
    "timm/clip": _timm("vit_base_patch16_clip_224", **THIN),
    "timm/dinov2": _timm("vit_small_patch14_dinov2", cells=14, **FINE),
    "timm/dinov2-registers": _timm("vit_small_patch14_reg4_dinov2", cells=14, **FINE),
    "timm/registers-gap": _timm("vit_medium_patch16_reg4_gap_256", **PLAIN),
    "timm/so150m2": _timm("vit_so150m2_patch16_reg1_gap_256", **THIN),
    "timm/rpn": _timm("vit_base_patch16_rpn_224", **THIN),
    "timm/plus": _timm("vit_base_patch16_plus_240", **THIN),
    "timm/parallel": _timm("vit_base_patch16_18x2_224", **THIN),
    "timm/aimv2": _timm(
        "aimv2_large_patch14_224", cells=14, **FINE | {"depth": 1, "embed_dim": 256}
    ),
    "timm/hybrid": _timm(
        "vit_tiny_r_s16_p8_224", cells=32, **PLAIN | {"img_size": 128}
    ),
    "timm/vitamin": _timm("vitamin_small_224", cells=16, img_size=64, num_classes=7),
    "timm/naflexvit": _timm("naflexvit_base_patch16_gap", depth=2, num_classes=7),
    "timm/mobilevit": _timm("mobilevit_xxs", cells=32),
    "timm/csatv2": _timm("csatv2", cells=32),
    "timm/pit": _fixed("pit_ti_224", (64, 64), (48, 96), num_classes=7),
    "timm/crossvit": _fixed(
        "crossvit_9_240",
        (120, 120),
        (120, 240),
        depth=((1, 1, 0), (1, 1, 0), (1, 1, 0)),
        num_classes=7,
    ),
    "timm/pvt": _timm("pvt_v2_b0", cells=32, num_heads=(1, 2, 3, 4), **NARROW),
    "timm/pvt-linear": _timm(
        "pvt_v2_b2_li", cells=32, num_heads=(1, 2, 3, 4), **NARROW
    ),
    "timm/nextvit": _timm("nextvit_small", cells=32, depths=(1, 1, 5, 1)),
    "timm/eva": _timm("eva_giant_patch14_224", cells=14, **ROPE | {"img_size": 56}),
    "timm/eva02": _timm("eva02_tiny_patch14_224", cells=14, **ROPE | {"img_size": 56}),
    "timm/eva02-split": _timm(
        "eva02_base_patch14_224", cells=14, **ROPE | {"img_size": 56}
    ),
    "timm/dinov3": _timm("vit_small_patch16_dinov3", **ROPE),
    "timm/dinov3-plus": _timm("vit_small_plus_patch16_dinov3", **ROPE),
    "timm/pe-core": _timm("vit_pe_core_tiny_patch16_384", **ROPE),
    "timm/pe-spatial": _timm("vit_pe_spatial_tiny_patch16_512", **ROPE),
    "timm/rope": _timm("vit_small_patch16_rope_224", **ROPE),
    "timm/rope-mixed": _timm("vit_small_patch16_rope_mixed_224", **ROPE),
    "timm/rope-ape": _timm("vit_small_patch16_rope_ape_224", **ROPE),
    "timm/sapiens2": _timm(
        "vit_huge_patch16_sapiens2", **ROPE | {"num_heads": 4, "num_kv_heads": (4, 2)}
    ),
    "timm/qwen3": _timm("qwen3_vit_88m", cells=32, **ROPE | {"pos_embed_grid_size": 4}),
    "timm/deepseek": _timm("deepseek_vit_412m", cells=42, **ROPE | {"img_size": 126}),
    "torchvision/vit": Family(_torchvision, (32, 32), (48, 48)),
} | {f"transformers/{name}": _hf(name) for name in hf_models.FAMILIES}


@cache
def at(name: str, size: Size) -> nn.Module:
    """Build a family at a size, once; nothing may change what this returns."""
    family = FAMILIES[name]
    if size == family.native or family.rebuilt:
        return laws.randomise(family.build(size if family.rebuilt else None))
    model = copy.deepcopy(at(name, family.native))
    laws.resize(model, size)
    return model
