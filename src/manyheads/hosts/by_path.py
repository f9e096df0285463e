"""Attention layers of a model that no library built, named by their module paths."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manyheads.attention import AttentionSpec, Softmax
from manyheads.errors import (
    CheckpointError,
    MaskRefused,
    NothingToConvert,
    SwapRefused,
    UnknownHost,
    nearest,
)
from manyheads.geometry import Geometry
from manyheads.hosts.base import Host, ImageInput, Site, mechanism_of
from manyheads.hosts.heads import no_plain_matrix
from manyheads.hosts.timm_vit import TimmAttention
from manyheads.hosts.torch_attention import (
    TorchAttention,
    multihead_geometry,
    multihead_problem,
)

__all__ = ["ByPath"]

_OURS = (TorchAttention, TimmAttention)
_WIDEST_ERROR = 1e-4
# Images and tokens on which a layer is tried: a band, a window or a choice of keys
# shows only beyond its reach. Both counts are odd and squares, should a layer ask.
_TRIED = ((2, 9), (1, 225))
# Parts of a layer like timm's that a swap carries over, where they are there.
_CARRIED = ("q_norm", "k_norm", "norm", "proj_drop")


class ByPath(Host):
    """Hosts the layers that its user names in a model of the user's own.

    Two kinds are understood: `torch.nn.MultiheadAttention` itself, and layers like
    timm's, with `qkv`, `proj` and `num_heads`, called with tokens [B, N, C] and giving
    tokens. Of the second kind only the names are known, so each is run beside its
    identity swap on random tokens before it is taken, must hold nothing that the swap
    would drop, and may not be called with masks afterwards.

    Where patches lie is not known here: mechanisms that need the token grid say so.

    Args:
        paths: Module paths, in the order in which an image meets the layers; None for
            the layers that are converted already.
    """

    name: ClassVar[str] = "by-path"

    def __init__(self, paths: Sequence[str] | None = None) -> None:
        self.paths = None if paths is None else tuple(paths)

    def recognises(self, model: nn.Module) -> bool:
        """Take models of one's own once something in them was converted."""
        return any(isinstance(module, _OURS) for module in model.modules())

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """List the named layers; blocks are numbered in that order."""
        paths = self.paths
        if paths is None:
            paths = tuple(n for n, m in model.named_modules() if isinstance(m, _OURS))
        return tuple(_site(model, index, path) for index, path in enumerate(paths))

    def verify(self, model: nn.Module) -> None:
        """Check that every path leads to a layer that is understood exactly.

        Raises:
            NothingToConvert: A path does not exist, or none is given.
            UnknownHost: A layer is of no known kind.
            SwapRefused: Its identity swap computes something else.
        """
        _require_named(model, self.paths or ())
        for path in self.paths or ():
            layer = model.get_submodule(path)
            _verify_layer(layer, path)
            _require_single(model, layer, path)

    def refusal(self, model: nn.Module) -> str:
        """Say that nothing was named."""
        return "no layer was named"

    def swap_attention(
        self, model: nn.Module, site: Site, spec: AttentionSpec
    ) -> nn.Module:
        """Build the drop-in of the layer's kind."""
        return _swapped(model.get_submodule(site.attention_path), site.geometry, spec)

    def track_grid(self, model: nn.Module) -> None:
        """Nothing to hook: where patches lie is not known."""

    def image_input(self, model: nn.Module) -> ImageInput:
        """Assume 224 x 224 pixels and ImageNet's statistics: the model cannot say.

        Give `image_size` where another size is meant; the number of channels is read
        off the first convolution.
        """
        convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
        first = next(convolutions, None)
        return ImageInput(
            channels=first.in_channels if first is not None else 3,
            size=(224, 224),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            interpolation="bicubic",
            crop=1.0,
        )

    def resize(self, model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
        """Feed the size as it is: whether the model takes it shows when it runs."""
        return image_size

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Refuse: a checkpoint holds data only, and this model is code."""
        raise CheckpointError(
            asked=f"saving a {type(model).__name__}",
            found="no library can build it again by name",
            why="a checkpoint runs nobody's code",
            fix="Save student.state_dict(); later build the model, convert it with the "
            "same recipe and paths, and load_state_dict() it.",
        )

    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Refuse, for the same reason."""
        raise CheckpointError(
            asked=f"building {description!r:.200}",
            found="models of one's own are not built from data",
            fix="Build the model, convert it, and load_state_dict() its weights.",
        )


def _require_named(model: nn.Module, paths: Sequence[str]) -> None:
    """Check that there is at least one path, each leads somewhere, and each once."""
    known = dict(model.named_modules(remove_duplicate=False))
    strangers = [path for path in paths if not path or path not in known]
    twice = [path for path in dict.fromkeys(paths) if paths.count(path) > 1]
    if paths and not strangers and not twice:
        return
    # One string is a sequence of letters, and easily given for a list of one.
    meant = "".join(paths) if all(len(path) == 1 for path in paths) else ""
    is_string = bool(meant) and meant in known
    if is_string:
        found, fix = f"{meant!r} is one string", f"Use paths=[{meant!r}]."
    elif strangers:
        found = f"the model has no module {strangers[0]!r}"
        fix = nearest(strangers[0], _candidates(model))
    elif twice:
        found, fix = f"{twice[0]!r} is named twice", "Name every layer once."
    else:
        found = "no path is given"
        fix = 'Name layers: convert(model, recipe, paths=["encoder.0.attn"]).'
    raise NothingToConvert(
        asked=f"paths={meant!r}" if is_string else f"paths={list(paths)}",
        found=found,
        fix=fix,
    )


def _require_single(model: nn.Module, layer: nn.Module, path: str) -> None:
    """Check that the layer stands in one place: only that one would be swapped."""
    modules = model.named_modules(remove_duplicate=False)
    others = [name for name, module in modules if module is layer and name != path]
    if others:
        raise SwapRefused(
            asked=f"converting the {type(layer).__name__} at {path}",
            found=f"the same layer also stands at {', '.join(others)}",
            where=path,
            why="it would be swapped in one place and stay in the others",
            fix="Give every place a layer of its own, or leave it out of paths.",
        )


def _site(model: nn.Module, index: int, path: str) -> Site:
    layer = model.get_submodule(path)
    core = mechanism_of(layer)
    return Site(
        index=index,
        path=path.rpartition(".")[0] or path,
        attention_path=path,
        ffn_path=None,
        geometry=_geometry(layer),
        attention=core.spec if core else Softmax(),
        ffn=None,
        renamed=core is not None,
        fixed_query_heads=no_plain_matrix(layer, "qkv", "proj"),
    )


def _geometry(layer: Any) -> Geometry:
    core = mechanism_of(layer)
    if core is not None:
        return core.geometry
    if isinstance(layer, nn.MultiheadAttention):
        return multihead_geometry(layer)
    head_dim = layer.qkv.out_features // (3 * layer.num_heads)
    return Geometry(
        dim=layer.qkv.in_features,
        num_heads=layer.num_heads,
        head_dim=head_dim,
        num_prefix_tokens=0,
        grid=None,
        scale=float(getattr(layer, "scale", head_dim**-0.5)),
        attention_dropout=getattr(getattr(layer, "attn_drop", None), "p", 0.0),
    )


def _swapped(layer: Any, geometry: Geometry, spec: AttentionSpec) -> nn.Module:
    if isinstance(layer, nn.MultiheadAttention | TorchAttention):
        return TorchAttention(layer, geometry, spec)
    parts = {name: getattr(layer, name, nn.Identity()) for name in _CARRIED}
    gate = getattr(layer, "gate", None)
    source = SimpleNamespace(qkv=layer.qkv, proj=layer.proj, gate=gate, **parts)
    made = TimmAttention(source, geometry, spec)
    ours = type(layer) is TimmAttention
    checked = _tokens_only in layer._forward_pre_hooks.values()
    if checked or not (ours or type(layer).__module__ == "timm.layers.attention"):
        made.register_forward_pre_hook(_tokens_only, with_kwargs=True)
    return made


def _tokens_only(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: what a mask means to somebody's own layer is not known."""
    given = [x for x in (*args, *kwargs.values()) if x is not None]
    if len(given) != 1:
        names = [*(f"argument {n + 1}" for n in range(1, len(args))), *kwargs]
        raise MaskRefused(
            asked="a layer named by its path was called with more than tokens",
            found=f"it was given {', '.join(names) or 'nothing'}",
            why="what a mask means to a layer of one's own is not known",
            fix="Leave layers that are given masks out of paths.",
        )
    return (given[0],), {}


def _is_like_timm(layer: Any) -> bool:
    return (
        isinstance(getattr(layer, "qkv", None), nn.Linear)
        and isinstance(getattr(layer, "proj", None), nn.Linear)
        and isinstance(getattr(layer, "num_heads", None), int)
        and layer.qkv.out_features % (3 * layer.num_heads) == 0
    )


def _verify_layer(layer: nn.Module, path: str) -> None:
    if isinstance(layer, _OURS):
        return
    if type(layer) is nn.MultiheadAttention:
        reason = multihead_problem(layer)
    elif _is_like_timm(layer):
        reason = _left_behind(layer) or _difference(layer)
    else:
        raise UnknownHost(
            asked=f"converting a {type(layer).__module__}.{type(layer).__qualname__}",
            found="it is neither torch.nn.MultiheadAttention itself nor has it qkv, "
            "proj (nn.Linear) and num_heads like timm's attention",
            where=path,
            why="a layer that is not understood exactly is never touched",
            fix="Name the module that holds the projections.",
        )
    if reason:
        raise SwapRefused(
            asked=f"converting a {type(layer).__name__}",
            found=reason,
            where=path,
            why="what cannot be carried exactly is never changed in silence",
            fix="Leave this layer out of paths.",
        )


def _left_behind(layer: Any) -> str | None:
    """Say what the layer holds that a swap would drop: it may start as zeros."""
    carried = {"qkv", "proj", "gate", *_CARRIED}
    held = [name for name, _ in layer.named_parameters()]
    held += [name for name, _ in layer.named_buffers() if name != "scale"]
    dropped = [name for name in held if name.partition(".")[0] not in carried]
    if dropped:
        return f"it holds {', '.join(dropped)}, which a swap would drop: it does more"
    scale = getattr(layer, "scale", None)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        return f"its scale has {scale.numel()} values, and only one can be carried"
    return None


@torch.no_grad()
def _difference(layer: Any) -> str | None:
    """Run the layer beside its identity swap on random tokens."""
    weight = layer.qkv.weight
    if weight.device.type == "meta":
        return "on the meta device it cannot be compared with its identity swap"
    ours = copy.deepcopy(layer).eval()
    swapped = _swapped(ours, _geometry(ours), Softmax()).eval()
    chance = torch.Generator().manual_seed(0)
    for images, count in _TRIED:
        tokens = torch.randn(images, count, weight.shape[1], generator=chance)
        reason = _other_answer(ours, swapped, tokens.to(weight))
        if reason:
            return f"with {count} tokens {reason}"
    return None


def _other_answer(layer: Any, swapped: nn.Module, tokens: Tensor) -> str | None:
    try:
        expected = layer(tokens)
    except Exception as error:
        return f"it cannot be called with tokens [B, N, C] alone: {error}"
    if not isinstance(expected, Tensor) or expected.ndim != 3:
        return f"it returns {type(expected).__name__}, not tokens [B, N, C]"
    actual = swapped(tokens)
    difference = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    limit = _WIDEST_ERROR if tokens.dtype in (torch.float32, torch.float64) else 0.05
    if bool(difference <= limit):
        return None
    return f"its identity swap differs by {float(difference):.1e}: it does more"


def _candidates(model: nn.Module) -> list[str]:
    found = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.MultiheadAttention or _is_like_timm(module)
    ]
    return found or [path for path, _ in model.named_modules() if path]
