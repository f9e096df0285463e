"""Tiny models of every supported family of transformers, built without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from tests.hosts import laws

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
PICTURE = {"image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}


def build(name: str, **changes: Any) -> nn.Module:
    kind = getattr(transformers, name)
    config = kind.config_class
    if "vision_config" in getattr(config, "sub_configs", {}):
        vision = SMALL | (PICTURE | changes.pop("vision", {}))
        made = config(vision_config=vision, text_config=dict(TEXT), **changes)
    else:
        made = config(**(SMALL | PICTURE | changes))
    return laws.randomise(kind(made))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: build("ViTForImageClassification"),
    "vit-features": lambda: build("ViTModel", qkv_bias=False),
    "deit": lambda: build("DeiTForImageClassificationWithTeacher"),
    "dinov2": lambda: build("Dinov2ForImageClassification"),
    "dinov2-gated": lambda: build("Dinov2Model", use_swiglu_ffn=True),
    "dinov2-registers": lambda: build("Dinov2WithRegistersModel"),
    "dinov3": lambda: build("DINOv3ViTModel"),
    "dinov3-gated": lambda: build("DINOv3ViTModel", use_gated_mlp=True),
    "siglip": lambda: build("SiglipVisionModel"),
    "siglip2": lambda: laws.randomise(
        transformers.Siglip2VisionModel(
            transformers.Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=8)
        )
    ),
    "clip": lambda: build("CLIPModel", projection_dim=16),
    "clip-vision": lambda: build("CLIPVisionModelWithProjection", projection_dim=16),
    "ijepa": lambda: build("IJepaModel"),
    "mae": lambda: build("ViTMAEModel"),
    "mae-pretraining": lambda: build(
        "ViTMAEForPreTraining",
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=32,
    ),
}
