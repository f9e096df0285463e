"""What transformers calls its parts, per family and major version, in one place.

Version 5 renamed most of them; a name that is not there is simply not taken, so one
table serves both majors.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = [
    "MODELS",
    "PROJECTIONS",
    "REASONS",
    "STATISTICS",
    "attention_of",
    "ffn_output_of",
    "first_of",
    "is_layer",
    "output_of",
    "vision_root",
]

# Block class -> where its attention may be, and where the feed-forward output matrix.
# The version 4 name stands first where version 5 has a shorter path that exists, as a
# wrapper, in both.
_OLD_AND_NEW = ("attention.attention", "attention")
_MLP = ("mlp.fc2", "mlp.down_proj", "mlp.weights_out", "output.dense")
_LAYERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ViTLayer": (_OLD_AND_NEW, _MLP),
    "DeiTLayer": (_OLD_AND_NEW, _MLP),
    "IJepaLayer": (_OLD_AND_NEW, _MLP),
    "ViTMAELayer": (_OLD_AND_NEW, _MLP),
    "Dinov2Layer": (_OLD_AND_NEW, _MLP),
    "Dinov2WithRegistersLayer": (_OLD_AND_NEW, _MLP),
    "DINOv3ViTLayer": (("attention",), _MLP),
    "SiglipEncoderLayer": (("self_attn",), _MLP),
    "Siglip2EncoderLayer": (("self_attn",), _MLP),
    "CLIPEncoderLayer": (("self_attn",), _MLP),
}

# Projections of queries, keys and values: the name of version 5, and an older one.
PROJECTIONS = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))

# The only classes a checkpoint may name.
MODELS = frozenset(
    {
        "CLIPForImageClassification",
        "CLIPModel",
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "DINOv3ViTBackbone",
        "DINOv3ViTModel",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "DeiTModel",
        "Dinov2Backbone",
        "Dinov2ForImageClassification",
        "Dinov2Model",
        "Dinov2WithRegistersBackbone",
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersModel",
        "IJepaForImageClassification",
        "IJepaModel",
        "Siglip2ForImageClassification",
        "Siglip2Model",
        "Siglip2VisionModel",
        "SiglipForImageClassification",
        "SiglipModel",
        "SiglipVisionModel",
        "ViTForImageClassification",
        "ViTMAEForPreTraining",
        "ViTMAEModel",
        "ViTModel",
    }
)

# Model class prefix -> why its attention is not taken.
REASONS = {
    "TimmWrapper": "it wraps a timm model; convert its `timm_model`",
    "TimmBackbone": "it wraps a timm model; convert its `_backbone`",
    "Beit": "its attention adds a relative position bias to pairs of tokens",
    "Data2VecVision": "its attention adds a relative position bias to pairs of tokens",
    "Swin": "its attention is windowed, with a relative bias",
    "MaskFormerSwin": "its attention is windowed, with a relative bias",
    "Dinat": "its attention is windowed (neighbourhoods)",
    "Hiera": "its attention is windowed (mask units)",
    "Sam": "its attention is windowed, with a relative bias",
    "Segformer": "its keys and values are spatially reduced",
    "Pvt": "its keys and values are spatially reduced",
    "Cvt": "its projections are convolutions",
    "MobileViT": "its attention is folded into a convolutional network",
    "Levit": "its attention adds a bias to pairs of tokens",
}

# Model type -> mean and deviation its image processor has by default.
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
STATISTICS = {
    "vit": _HALF,
    "ijepa": _HALF,
    "siglip": _HALF,
    "siglip_vision_model": _HALF,
    "siglip2": _HALF,
    "siglip2_vision_model": _HALF,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "deit": _IMAGENET,
    "dinov2": _IMAGENET,
    "dinov2_with_registers": _IMAGENET,
    "dinov3_vit": _IMAGENET,
    "vit_mae": _IMAGENET,
}


def is_layer(module: nn.Module) -> bool:
    """Match by exact class: a subclass may compute something else."""
    kind = type(module)
    known = kind.__name__ in _LAYERS
    return known and kind.__module__.startswith("transformers.models.")


def attention_of(layer: nn.Module) -> tuple[str, str]:
    """Say where a block's attention is and where all of its projections are."""
    path = _first_path(layer, _LAYERS[type(layer).__name__][0]) or ""
    return path, path.partition(".")[0]


def output_of(model: nn.Module, attention_path: str) -> nn.Linear:
    """Find the matrix after attention: inside the layer, or beside it in version 4."""
    attention = model.get_submodule(attention_path)
    inside = first_of(attention, "o_proj", "out_proj")
    if inside is None:
        inside = model.get_submodule(
            f"{attention_path.rpartition('.')[0]}.output.dense"
        )
    linear: nn.Linear = inside
    return linear


def ffn_output_of(layer: nn.Module) -> tuple[str, tuple[str, ...]] | None:
    """Say where a block's feed-forward output matrix is, and all of its parts."""
    path = _first_path(layer, _LAYERS[type(layer).__name__][1])
    if path is None:
        return None
    if path == "output.dense":
        return path, ("intermediate", "output")
    return path, (path.rpartition(".")[0],)


def vision_root(model: nn.Module) -> tuple[str, Any]:
    """Find the tower that embeds image patches: its path and the module.

    A text tower has embeddings, too, but none of patches; a decoder has none.
    """
    for path, module in model.named_modules():
        embeddings = getattr(module, "embeddings", None)
        if embeddings is not None and first_of(
            embeddings, "patch_embeddings", "patch_embedding"
        ):
            return path, module
    return "", None


def first_of(module: Any, *names: str) -> Any:
    """Give the first attribute that exists, or None."""
    return next((getattr(module, n) for n in names if hasattr(module, n)), None)


def _first_path(layer: nn.Module, paths: tuple[str, ...]) -> str | None:
    for path in paths:
        try:
            layer.get_submodule(path)
        except AttributeError:
            continue
        return path
    return None
