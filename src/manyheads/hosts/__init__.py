"""The libraries whose models can be converted, one file each."""

from collections.abc import Sequence

from torch import Tensor, nn

from manyheads.errors import UnknownHost
from manyheads.hosts.base import (
    CropMode,
    Host,
    ImageInput,
    Site,
    is_random,
    mechanism_of,
    replace_module,
    token_count,
)
from manyheads.hosts.by_path import ByPath
from manyheads.hosts.heads import RealHeads
from manyheads.hosts.hf_vit import HuggingFaceViT
from manyheads.hosts.own import OwnBackbone
from manyheads.hosts.timm_nextvit import TimmNextViT
from manyheads.hosts.timm_pvt import TimmPVT
from manyheads.hosts.timm_rope import TimmRope
from manyheads.hosts.timm_vit import TimmViT
from manyheads.hosts.torchvision_vit import TorchvisionViT
from manyheads.hosts.wrappers import why_wrapped

__all__ = [
    "HOSTS",
    "CropMode",
    "Host",
    "ImageInput",
    "RealHeads",
    "Site",
    "find_host",
    "host_named",
    "host_of",
    "is_random",
    "mechanism_of",
    "replace_module",
    "respond",
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
    host = host_of(model)
    sites = host.sites(model)
    if not sites:
        raise _unknown(model, host.refusal(model))
    return host, sites


def host_of(model: nn.Module) -> Host:
    """Give the host that recognises a model, without a look at its blocks.

    Raises:
        UnknownHost: No host does, or the model is inside a wrapper.
    """
    if wrapped := why_wrapped(model):
        raise _unknown(model, *wrapped)
    for host in HOSTS:
        if host.recognises(model):
            return host
    raise _unknown(model, "no library this version knows built it")


def respond(model: nn.Module, images: Tensor) -> Tensor:
    """Show images to a hosted model and give the tensor by which it is judged.

    Raises:
        UnknownHost: No host knows the model.
        ManyheadsError: What the model returns holds no such tensor.
    """
    host = host_of(model)
    return host.output(host.feed(model, images))


def host_named(name: str) -> Host | None:
    """Give the host of that name, or None."""
    return next((host for host in HOSTS if host.name == name), None)


_SUPPORTED = (
    "Supported: every timm model whose attention is timm.layers.Attention, "
    "AttentionRope or EvaAttention (ViT, DeiT, DeiT-III, SigLIP, CLIP, DINOv2 and "
    "relatives), timm's PVT-v2 and Next-ViT; ViT, DeiT, DINOv2, DINOv3, SigLIP, "
    "SigLIP 2, CLIP vision, I-JEPA and ViT-MAE of transformers; torchvision's "
    "VisionTransformer. In a model of your own, name the layers: "
    "convert(model, recipe, paths=[...])."
)


def _unknown(model: nn.Module, reason: str, fix: str = _SUPPORTED) -> UnknownHost:
    kind = type(model)
    return UnknownHost(
        asked=f"a model of class {kind.__module__}.{kind.__qualname__}",
        found=reason,
        why="a block that is not understood exactly is never touched",
        fix=fix,
    )
