"""The libraries whose models can be converted, one file each."""

from collections.abc import Sequence

from torch import nn

from manyheads.errors import UnknownHost
from manyheads.hosts.base import (
    Host,
    ImageInput,
    Site,
    mechanism_of,
    replace_module,
    token_count,
)
from manyheads.hosts.by_path import ByPath
from manyheads.hosts.hf_vit import HuggingFaceViT
from manyheads.hosts.own import OwnBackbone
from manyheads.hosts.timm_nextvit import TimmNextViT
from manyheads.hosts.timm_pvt import TimmPVT
from manyheads.hosts.timm_rope import TimmRope
from manyheads.hosts.timm_vit import TimmViT
from manyheads.hosts.torchvision_vit import TorchvisionViT

__all__ = [
    "HOSTS",
    "Host",
    "ImageInput",
    "Site",
    "find_host",
    "host_named",
    "mechanism_of",
    "replace_module",
    "token_count",
]

HOSTS: tuple[Host, ...] = (
    TimmRope(),
    TimmPVT(),
    TimmNextViT(),
    TimmViT(),
    HuggingFaceViT(),
    TorchvisionViT(),
    OwnBackbone(),
    ByPath(),
)


def find_host(
    model: nn.Module, paths: Sequence[str] | None = None
) -> tuple[Host, tuple[Site, ...]]:
    """Give the host that knows this model, with the model's blocks.

    Args:
        model: Any model.
        paths: Attention layers of a model of one's own; None to ask the libraries.

    Raises:
        NothingToConvert: A path leads nowhere.
        SwapRefused: A layer at a path does what a swap could not carry.
        UnknownHost: No host does, or the one that recognises it finds no attention
            that could be converted; the message says which attention it has.
    """
    if paths is not None:
        named = ByPath(paths)
        named.verify(model)
        return named, named.sites(model)
    for host in HOSTS:
        if host.recognises(model):
            sites = host.sites(model)
            if sites:
                return host, sites
            raise _unknown(model, host.refusal(model))
    raise _unknown(model, "no library this version knows built it")


def host_named(name: str) -> Host | None:
    """Give the host of that name, or None."""
    return next((host for host in HOSTS if host.name == name), None)


def _unknown(model: nn.Module, reason: str) -> UnknownHost:
    kind = type(model)
    return UnknownHost(
        asked=f"a model of class {kind.__module__}.{kind.__qualname__}",
        found=reason,
        why="a block that is not understood exactly is never touched",
        fix="Supported: every timm model whose attention is timm.layers.Attention, "
        "AttentionRope or EvaAttention "
        "(ViT, DeiT, DeiT-III, SigLIP, CLIP, DINOv2 and relatives), timm's PVT-v2 and "
        "Next-ViT; ViT, DeiT, DINOv2, DINOv3, SigLIP, SigLIP 2, CLIP vision, I-JEPA "
        "and ViT-MAE of transformers; torchvision's VisionTransformer. In a model of "
        "your own, name the layers: convert(model, recipe, paths=[...]).",
    )
