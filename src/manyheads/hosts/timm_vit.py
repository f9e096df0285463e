"""timm models built on `timm.layers.attention.Attention`: plain ViT and relatives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.attention import AttentionSpec, Mechanism, Softmax
from manyheads.errors import CheckpointError, ImageSizeError, MaskRefused
from manyheads.ffn import CompactLinear, Pointwise
from manyheads.geometry import Geometry, Grid, fit_to_patches
from manyheads.hosts.base import (
    Host,
    ImageInput,
    Site,
    TokenGrid,
    mechanism_of,
    readable_mask,
)
from manyheads.hosts.heads import (
    build_core,
    first_rows,
    head_index,
    no_plain_matrix,
    permute_inputs,
    permute_outputs,
)
from manyheads.hosts.timm_reasons import already_linear, why_refused

__all__ = ["TimmAttention", "TimmViT"]

# What create_model takes beside the architecture's own arguments: a stranger's
# description may name none of them, because they read files and reach for the network.
_FORBIDDEN_ARGUMENTS = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "exportable",
        "no_jit",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
        "scriptable",
    }
)


class TimmAttention(nn.Module):
    """timm's attention layer with another mechanism between its projections.

    Children keep timm's names (`qkv`, `q_norm`, `k_norm`, `norm`, `gate`, `proj`), so
    that a checkpoint of the original loads into them strictly.

    Args:
        source: A `timm.layers.attention.Attention`, or one of these; its children
            move here.
        geometry: Sizes of the layer.
        spec: The mechanism to put between the projections.
    """

    qkv: nn.Linear
    core: Mechanism
    norm: nn.Module
    gate: nn.Linear | None
    proj: nn.Linear

    def __init__(self, source: Any, geometry: Geometry, spec: AttentionSpec) -> None:
        super().__init__()
        self.num_heads, self.head_dim = geometry.num_heads, geometry.head_dim
        self.attn_dim, self.scale = geometry.attention_dim, geometry.scale
        self.query_heads = spec.num_query_heads(geometry)
        self.qkv = self._projecting(source.qkv)
        self.q_norm, self.k_norm = source.q_norm, source.k_norm
        self.core = build_core(spec, geometry, self.qkv.weight)
        self.norm, self.gate = source.norm, source.gate
        self.proj, self.proj_drop = source.proj, source.proj_drop
        self.token_grid: TokenGrid | None = None

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "B N Cout"]:
        """Project, mix, project; `attn_mask` broadcasts to [B, H, N, N], as in torch.

        Raises:
            MaskRefused: The mechanism cannot honour the mask, or `is_causal` is set.
        """
        B, N, _ = x.shape
        mask = _causal_mask(x) if is_causal else attn_mask
        if mask is not None:
            # Torch reads two dimensions as [N, N]; a mechanism would as [B, N].
            mask = mask[None, None] if mask.ndim == 2 else mask
            mask = readable_mask(mask, self.core)
            self._refuse_additive(mask)
        query_dim = self.query_heads * self.head_dim
        parts = self.qkv(x).split([query_dim, query_dim, self.attn_dim], dim=-1)
        q, k, v = (part.reshape(B, N, -1, self.head_dim) for part in parts)
        grid = self.token_grid() if self.token_grid is not None else None
        mixed = self.core(self.q_norm(q), self.k_norm(k), v, mask, grid)
        mixed = self.norm(mixed.reshape(B, N, self.attn_dim))
        if self.gate is not None:
            mixed = mixed * self.gate(x).sigmoid()
        projected: Tensor = self.proj_drop(self.proj(mixed))
        return projected

    def _projecting(self, qkv: nn.Linear) -> nn.Linear:
        """Keep the first heads of queries and keys, as many as the mechanism takes."""
        query_dim = self.query_heads * self.head_dim
        if qkv.out_features == 2 * query_dim + self.attn_dim:
            return qkv
        runs = ((0, query_dim), (self.attn_dim, query_dim))
        return first_rows(qkv, (*runs, (2 * self.attn_dim, self.attn_dim)))

    def _refuse_additive(self, mask: Tensor) -> None:
        if mask.dtype is torch.bool or self.core.accepts_pair_mask:
            return
        raise MaskRefused(
            asked=f"attention was called with an additive mask {list(mask.shape)}",
            found=f"{type(self.core.spec).__name__} can only leave keys out",
            why="a bias on token pairs has no meaning where no pair meets",
            fix="Pass a boolean mask [B, 1, 1, N], True for real tokens, or keep "
            "Softmax() in the blocks that need this mask. NaFlexVit builds such masks "
            "with use_key_only_attn_mask=True.",
        )


class TimmViT(Host):
    """Hosts every timm model whose blocks hold `timm.layers.attention.Attention`."""

    name: ClassVar[str] = "timm"

    def recognises(self, model: nn.Module) -> bool:
        """Look at the class's module only, so that timm need not be imported."""
        return any(kind.__module__.startswith("timm.") for kind in type(model).__mro__)

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """List attention layers in the order of `named_modules`."""
        found = [
            (path, module)
            for path, module in model.named_modules()
            if _is_attention(module)
        ]
        return tuple(
            _site(model, index, path, module)
            for index, (path, module) in enumerate(found)
        )

    def refusal(self, model: nn.Module) -> str:
        """Say what its attention does instead; the table is in `timm_reasons`."""
        return why_refused(model)

    def left_alone(self, model: nn.Module) -> tuple[str, ...]:
        """List class attention, attention pooling and channel attention."""
        return already_linear(model)

    def swap_attention(
        self, model: nn.Module, site: Site, spec: AttentionSpec
    ) -> nn.Module:
        """Wrap the projections that are there around the new mechanism."""
        source = model.get_submodule(site.attention_path)
        return TimmAttention(source, site.geometry, spec)

    def permute_heads(self, model: nn.Module, site: Site, order: Sequence[int]) -> None:
        """Reorder rows of the packed projection and the gate, columns of the output."""
        layer: Any = model.get_submodule(site.attention_path)
        index = head_index(order, site.geometry.head_dim)
        permute_outputs(layer.qkv, head_index(order, site.geometry.head_dim, parts=3))
        permute_outputs(layer.norm, index)
        if layer.gate is not None:
            permute_outputs(layer.gate, index)
        permute_inputs(layer.proj, index)

    def track_grid(self, model: Any) -> None:
        """Hook the patch embedding where a mechanism asks for the grid."""
        layers = [m for m in model.modules() if isinstance(m, TimmAttention)]
        waiting = [m for m in layers if m.core.needs_grid]
        known = next((m.token_grid for m in layers if m.token_grid is not None), None)
        if waiting and known is None:
            known = TokenGrid()
            embed = _trunk(model).patch_embed
            embed.register_forward_pre_hook(known.watch_patches)
        for layer in waiting:
            layer.token_grid = known

    def image_input(self, model: nn.Module) -> ImageInput:
        """Read timm's data configuration, with the model's own size and channels."""
        from timm.data import resolve_data_config

        config = resolve_data_config(model=model)
        channels, height, width = _input_size(model)
        return ImageInput(
            channels=channels,
            size=(height, width),
            mean=_per_channel(config["mean"], channels),
            std=_per_channel(config["std"], channels),
            interpolation=config["interpolation"],
            crop=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )

    def resize(self, model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        """Resample the position embedding unless the model does so by itself."""
        native = _input_size(model)[1:]
        embed = getattr(model, "patch_embed", None)
        patch = getattr(embed, "patch_size", (1, 1))
        actual = fit_to_patches(image_size, tuple(patch))
        if actual == native or getattr(model, "dynamic_img_size", False):
            return actual
        # A model without positions of its own is convolutional and takes any size.
        positions = any(name.startswith("pos_embed") for name, _ in _own(model))
        if not positions:
            return actual
        if not hasattr(model, "set_input_size"):
            raise ImageSizeError(
                asked=f"image_size={image_size[0]}x{image_size[1]}",
                found=f"{type(model).__name__} is built for {native[0]}x{native[1]}",
                why="its position embedding cannot be resampled",
                fix=f"Use image_size={native}, or build it with another img_size.",
            )
        model.set_input_size(img_size=actual)
        return actual

    def free_size(self, model: Any) -> Grid | None:
        """Set what `dynamic_img_size=True` sets when a plain ViT is built."""
        from timm.layers import Format, PatchEmbed

        embed: Any = getattr(model, "patch_embed", None)
        if type(embed) is not PatchEmbed or not hasattr(model, "dynamic_img_size"):
            return None
        model.dynamic_img_size = True
        embed.strict_img_size = embed.flatten = False
        embed.output_fmt = Format.NHWC
        rows, columns = embed.patch_size
        return rows, columns

    def labels(self, model: Any) -> tuple[str, ...]:
        """Give the recorded names, ImageNet's where the count tells, else numbers."""
        from timm.data import ImageNetInfo, infer_imagenet_subset

        count = int(getattr(model, "num_classes", 0))
        config = getattr(model, "pretrained_cfg", None) or {}
        names = config.get("label_names")
        subset = infer_imagenet_subset(model)
        if not names and subset:
            names = ImageNetInfo(subset).label_descriptions()
        if names and len(names) == count:
            return tuple(names)
        return tuple(map(str, range(count)))

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Give the registered name and the arguments that timm recorded."""
        from timm.models import get_model_args

        config = getattr(model, "pretrained_cfg", None) or {}
        architecture = config.get("architecture")
        arguments = get_model_args(model)
        try:
            arguments = json.loads(json.dumps(arguments))
        except TypeError as error:
            architecture, reason = None, f"an argument is no JSON value: {error}"
        else:
            reason = "timm did not record how it was built"
        if not architecture:
            raise CheckpointError(
                asked=f"saving a {type(model).__name__}",
                found=reason,
                why="a checkpoint holds data only, so the model must be built by name",
                fix="Build it with timm.create_model(name, ...) and plain arguments.",
            )
        tag = config.get("tag")
        name = f"{architecture}.{tag}" if tag else architecture
        return {"architecture": name, "arguments": arguments}

    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Build by registered name; arguments that load files are refused."""
        import timm

        name = description.get("architecture")
        arguments = description.get("arguments")
        forbidden = _FORBIDDEN_ARGUMENTS & set(arguments or {})
        known = isinstance(name, str) and timm.is_model(name)
        if not known or not isinstance(arguments, dict) or forbidden:
            raise CheckpointError(
                asked=f"building {name!r} with {arguments!r:.200}",
                found=f"the argument {sorted(forbidden)[0]!r} is not allowed"
                if forbidden
                else f"timm {timm.__version__} registers no such model",
                why="a checkpoint may name architectures, not files or addresses",
                fix="Load only checkpoints written by manyheads.save(), with a timm "
                "that has the model.",
            )
        try:
            model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise CheckpointError(
                asked=f"building {name!r} with {arguments!r:.200}",
                found=f"timm {timm.__version__} refuses: {error}",
                fix="Load only checkpoints written by manyheads.save().",
            ) from error
        return model


def _is_attention(module: nn.Module) -> bool:
    """Match by exact class: a subclass may compute something else."""
    kind = type(module)
    if kind is TimmAttention:
        return True
    return kind.__module__ == "timm.layers.attention" and kind.__name__ == "Attention"


def _site(model: nn.Module, index: int, path: str, attention: Any) -> Site:
    core = mechanism_of(attention)
    block_path = path.rpartition(".")[0]
    ffn_path = _output_path(model, block_path)
    output = model.get_submodule(ffn_path) if ffn_path else None
    return Site(
        index=index,
        path=block_path,
        attention_path=path,
        ffn_path=ffn_path,
        geometry=core.geometry if core else _geometry(model, attention),
        attention=core.spec if core else Softmax(),
        ffn=output.spec if isinstance(output, CompactLinear) else None,
        fixed_query_heads=no_plain_matrix(attention, "qkv", "proj"),
    )


def _trunk(model: Any) -> Any:
    """Look through timm's wrapper for features (`features_only=True`)."""
    wrapper = type(model).__name__ == "FeatureGetterNet"
    return model.model if wrapper else model


def _geometry(model: nn.Module, attention: Any) -> Geometry:
    model = _trunk(model)
    embed = getattr(model, "patch_embed", None)
    plain = hasattr(model, "blocks") and hasattr(embed, "grid_size")
    grid = getattr(embed, "grid_size", None) if plain else None
    return Geometry(
        dim=attention.qkv.in_features,
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        num_prefix_tokens=getattr(model, "num_prefix_tokens", 0),
        grid=tuple(grid) if grid else None,
        scale=attention.scale,
        attention_dropout=attention.attn_drop.p,
    )


def _output_path(model: nn.Module, block_path: str) -> str | None:
    """Find the output matrix of the feed-forward layer beside an attention layer."""
    # Blocks with parallel branches keep the layers in two lists, paired by position.
    home = block_path.replace(".attns.", ".ffns.")
    for name, module in model.get_submodule(home).named_children():
        kind = type(module)
        feed_forward = kind.__module__ == "timm.layers.mlp" and kind.__name__ in {
            "Mlp",
            "GluMlp",
            "SwiGLU",
        }
        if feed_forward and isinstance(module.fc2, Pointwise | CompactLinear):
            return f"{home}.{name}.fc2"
    return None


def _own(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(recurse=False))


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    from timm.models import get_model_input_config

    channels, height, width = get_model_input_config(model)["input_size"]
    return channels, height, width


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Repeat or average a three-channel statistic for another number of channels."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


def _causal_mask(x: Float[Tensor, "B N C"]) -> Tensor:
    N = x.shape[1]
    return torch.ones(1, 1, N, N, dtype=torch.bool, device=x.device).tril()
