"""timm models with rotary embeddings: EVA-02, DINOv3, Perception Encoder and relatives.

Queries and keys are rotated first, as the library does, and then given to the
mechanism. What that means: a rotated softmax score depends on where two tokens stand
to each other, because both rotations meet in one inner product. With Hydra no pair
meets; its summary holds rotated keys and its gate is a rotated query, so each feature
product still depends on both places, but no longer on their difference alone. That is
well defined and untested in the papers; expect healing to have more to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention import AttentionSpec, Mechanism, Softmax
from manyheads.errors import SwapRefused
from manyheads.ffn import CompactLinear
from manyheads.geometry import Geometry, fit_to_patches
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
from manyheads.hosts.timm_vit import TimmViT, _output_path, _trunk

__all__ = ["TimmRope", "TimmRopeAttention"]

_CLASSES = frozenset(
    {
        ("timm.models.eva", "EvaAttention"),
        ("timm.layers.attention", "AttentionRope"),
    }
)
_PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj", "proj")
_TIMM = TimmViT()


class TimmRopeAttention(nn.Module):
    """timm's rotary attention with another mechanism after the rotation.

    Everything keeps timm's names and its parameters themselves: one packed projection
    or three, the separate query and value biases of EVA, grouped keys and values. A
    mechanism with fewer query heads keeps the groups of keys that these read.

    Args:
        source: An `EvaAttention`, an `AttentionRope` or one of these; its children
            move here.
        geometry: Sizes of the layer.
        spec: The mechanism to put after the rotation.
    """

    qkv: nn.Linear | None
    q_bias: nn.Parameter | None
    k_bias: Tensor | None
    v_bias: nn.Parameter | None
    core: Mechanism

    def __init__(self, source: Any, geometry: Geometry, spec: AttentionSpec) -> None:
        super().__init__()
        self.num_heads, self.head_dim = geometry.num_heads, geometry.head_dim
        self.scale = geometry.scale
        self.num_kv_groups = getattr(source, "num_kv_groups", 1)
        self.num_prefix_tokens = source.num_prefix_tokens
        self.rotate_half = getattr(source, "rotate_half", False)
        self.query_heads = spec.num_query_heads(geometry)
        # Query head h reads key head h // num_kv_groups, as in timm.
        self.key_heads = -(-self.query_heads // self.num_kv_groups)
        self._take_projections(source)
        self.q_norm, self.k_norm = source.q_norm, source.k_norm
        self.proj, self.proj_drop = source.proj, source.proj_drop
        self.core = build_core(spec, geometry, self.proj.weight)
        self.norm, self.gate = source.norm, source.gate
        self.token_grid: TokenGrid | None = None

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Project, rotate, mix, project; `attn_mask` means what it means in timm.

        Raises:
            MaskRefused: The mechanism cannot honour the mask, or `is_causal` is set.
        """
        N = x.shape[1]
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotated(q, rope, v), self._rotated(k, rope, v)
        if self.num_kv_groups > 1:
            k = k.repeat_interleave(self.num_kv_groups, dim=1)[:, : self.query_heads]
            v = v.repeat_interleave(self.num_kv_groups, dim=1)
        mask = attn_mask
        if is_causal:
            mask = torch.ones(1, 1, N, N, dtype=torch.bool, device=x.device).tril()
        elif mask is not None and mask.ndim == 2:
            mask = mask[None, None]
        if mask is not None:
            mask = readable_mask(mask, self.core)
        grid = self.token_grid() if self.token_grid is not None else None
        token_major = (t.transpose(1, 2) for t in (q, k, v))
        mixed = self.norm(self.core(*token_major, mask, grid).flatten(2))
        if self.gate is not None:
            mixed = mixed * self.gate(x).sigmoid()
        projected: Tensor = self.proj_drop(self.proj(mixed))
        return projected

    def _take_projections(self, source: Any) -> None:
        """Keep the first heads of queries and keys, as many as the mechanism takes."""
        query_dim, key_dim, dim = (
            heads * self.head_dim
            for heads in (self.query_heads, self.key_heads, self.num_heads)
        )
        qkv, q_proj, k_proj = source.qkv, source.q_proj, source.k_proj
        q_bias = getattr(source, "q_bias", None)
        # Keys have no bias; timm keeps zeros for them that no checkpoint holds.
        k_bias = getattr(source, "k_bias", None)
        if qkv is not None and qkv.out_features > 2 * query_dim + dim:
            qkv = first_rows(qkv, ((0, query_dim), (dim, query_dim), (2 * dim, dim)))
        elif q_proj is not None and q_proj.out_features > query_dim:
            q_proj = first_rows(q_proj, ((0, query_dim),))
            k_proj = first_rows(k_proj, ((0, key_dim),))
        if q_bias is not None and k_bias is not None and len(q_bias) > query_dim:
            kept = q_bias.detach()[:query_dim].clone()
            q_bias = nn.Parameter(kept, requires_grad=q_bias.requires_grad)
            k_bias = k_bias[:query_dim].clone()
        self.qkv, self.q_proj, self.k_proj = qkv, q_proj, k_proj
        self.v_proj = source.v_proj
        self.q_bias, self.v_bias = q_bias, getattr(source, "v_bias", None)
        self.register_buffer("k_bias", k_bias, persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Fill the zero bias again when timm builds a model without memory first."""
        if self.k_bias is not None:
            nn.init.zeros_(self.k_bias)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give queries, keys and values head-major, [B, H, N, K], as rotation wants."""
        parts: tuple[Tensor, ...]
        if self.qkv is None:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        elif self.q_bias is None or self.k_bias is None or self.v_bias is None:
            parts = torch.split(self.qkv(x), self._sizes(), dim=-1)
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            packed = F.linear(x, self.qkv.weight, bias)
            parts = torch.split(packed, self._sizes(), dim=-1)
        heads = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in parts)
        q, k, v = (part.transpose(1, 2) for part in heads)
        return q, k, v

    def _sizes(self) -> list[int]:
        query_dim = self.query_heads * self.head_dim
        return [query_dim, query_dim, self.num_heads * self.head_dim]

    def _rotated(self, x: Tensor, rope: Tensor, like: Tensor) -> Tensor:
        """Rotate patch tokens; class and register tokens stand nowhere."""
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        P = self.num_prefix_tokens
        # [N, 2 K], [H, N, 2 K], or of NaFlex batches [B, 1 or H, N, 2 K].
        if rope.ndim > 2:
            rope = rope[..., : x.shape[1], :, :]
        patches = apply_rot_embed_cat(x[:, :, P:], rope, half=self.rotate_half)
        return torch.cat([x[:, :, :P], patches], dim=2).type_as(like)


class TimmRope(Host):
    """Hosts timm models whose blocks hold a rotary attention; the rest is `TimmViT`."""

    name: ClassVar[str] = "timm-rope"

    def recognises(self, model: nn.Module) -> bool:
        """Ask for a timm model with at least one such layer."""
        return _TIMM.recognises(model) and any(map(_is_rotary, model.modules()))

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """List rotary attention layers in the order of `named_modules`."""
        found = [(path, m) for path, m in model.named_modules() if _is_rotary(m)]
        return tuple(
            _site(model, index, path, module)
            for index, (path, module) in enumerate(found)
        )

    def refusal(self, model: nn.Module) -> str:
        """Say what `TimmViT` says."""
        return _TIMM.refusal(model)

    def left_alone(self, model: nn.Module) -> tuple[str, ...]:
        """List what `TimmViT` lists."""
        return _TIMM.left_alone(model)

    def swap_attention(
        self, model: nn.Module, site: Site, spec: AttentionSpec
    ) -> nn.Module:
        """Wrap the projections that are there around rotation and mechanism."""
        source = model.get_submodule(site.attention_path)
        return TimmRopeAttention(source, site.geometry, spec)

    def permute_heads(self, model: nn.Module, site: Site, order: Sequence[int]) -> None:
        """Reorder rows of the projections with their biases, columns of the output.

        Raises:
            SwapRefused: Heads share keys, or each has a rotation of its own.
        """
        layer: Any = model.get_submodule(site.attention_path)
        own_rotation = type(getattr(_encoder(model), "rope", None)).__name__
        if _groups(layer) or own_rotation == "RotaryEmbeddingMixed":
            shared = "heads share keys in groups"
            raise SwapRefused(
                asked=f"choosing the real heads of block {site.index} from images",
                found=shared if _groups(layer) else "each head has its own rotation",
                where=site.attention_path,
                why="heads would part from the keys or the rotation they belong to",
                fix="Convert without images: the first half of the heads is real then.",
            )
        index = head_index(order, site.geometry.head_dim)
        if layer.qkv is not None:
            triple = head_index(order, site.geometry.head_dim, parts=3)
            permute_outputs(layer.qkv, triple)
        for part in (layer.q_proj, layer.k_proj, layer.v_proj, layer.norm, layer.gate):
            if part is not None:
                permute_outputs(part, index)
        for name in ("q_bias", "v_bias"):
            bias = getattr(layer, name, None)
            if bias is not None:
                with torch.no_grad():
                    bias.copy_(bias[index.to(bias.device)].clone())
        permute_inputs(layer.proj, index)

    def track_grid(self, model: Any) -> None:
        """Hook the patch embedding where a mechanism asks for the grid."""
        layers = [m for m in model.modules() if isinstance(m, TimmRopeAttention)]
        waiting = [m for m in layers if m.core.needs_grid]
        known = next((m.token_grid for m in layers if m.token_grid is not None), None)
        if waiting and known is None:
            known = TokenGrid()
            _patch_embed(model).register_forward_pre_hook(known.watch_patches)
        for layer in waiting:
            layer.token_grid = known

    def image_input(self, model: nn.Module) -> ImageInput:
        """Read timm's data configuration."""
        return _TIMM.image_input(model)

    def resize(self, model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        """Have timm compute rotations, and positions if there are any, for a size."""
        embed = _patch_embed(model)
        if embed is None:
            return _TIMM.resize(model, image_size)
        # Encoders of language models merge squares of patches at their end.
        merged = getattr(_encoder(model), "merge_size", 1)
        cell = (merged * embed.patch_size[0], merged * embed.patch_size[1])
        actual = fit_to_patches(image_size, cell)
        native = tuple(embed.img_size or actual)
        trunk: Any = _trunk(model)
        fixed = hasattr(trunk, "set_input_size") and not trunk.dynamic_img_size
        if fixed and actual != native:
            trunk.set_input_size(img_size=actual)
        return actual

    def free_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Set what `dynamic_img_size=True` sets when the model is built."""
        cell = _TIMM.free_size(model)
        encoder = _encoder(model)
        if cell is not None and getattr(encoder, "rope", None) is not None:
            encoder.rope = _free_rotation(encoder.rope)
        return cell

    def labels(self, model: nn.Module) -> tuple[str, ...]:
        """Give the recorded names, ImageNet's where the count tells, else numbers."""
        return _TIMM.labels(model)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Give the registered name and the arguments that timm recorded."""
        return _TIMM.describe(model)

    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Build by registered name."""
        return _TIMM.rebuild(description)


class _FreeRotation(nn.Module):
    """DINOv3's rotation for any grid: timm's own turns the sides into constants.

    timm divides positions by `float(side)`, which a tracer can only read as the number
    that the side has in its example; the side itself stays a side.

    Args:
        rope: A `RotaryEmbeddingDinoV3` that scales each axis by its own side.
    """

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope

    def get_embed(
        self, shape: Sequence[int], dtype: torch.dtype | None = None
    ) -> Tensor:
        """Give sines and cosines for this grid, [N, 2 K], as timm does."""
        order = reversed(shape) if self.rope.grid_indexing == "xy" else shape
        axes = [
            (torch.arange(0.5, side, dtype=torch.float32) + self.rope.grid_offset)
            / side
            for side in order
        ]
        grid = torch.meshgrid(*axes, indexing=self.rope.grid_indexing)
        places = (2.0 * torch.stack(grid, dim=-1) - 1.0).flatten(0, -2)
        both = torch.cat(self.rope._get_pos_embed_from_coords(places), dim=-1)
        return both if dtype is None else both.to(dtype)


def _free_rotation(rope: Any) -> nn.Module:
    """Have the rotation computed for every grid, where timm keeps one grid's."""
    separate = getattr(rope, "normalize_coords", "") == "separate"
    if type(rope).__name__ == "RotaryEmbeddingDinoV3" and separate:
        return _FreeRotation(rope)
    if hasattr(rope, "_use_cached_embed"):
        rope._use_cached_embed = False
    free: nn.Module = rope
    return free


def _is_rotary(module: nn.Module) -> bool:
    kind = type(module)
    return kind is TimmRopeAttention or (kind.__module__, kind.__name__) in _CLASSES


def _site(model: nn.Module, index: int, path: str, attention: nn.Module) -> Site:
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
        fixed_query_heads=no_plain_matrix(attention, *_PROJECTIONS),
    )


def _groups(attention: nn.Module) -> bool:
    return getattr(attention, "num_kv_groups", 1) > 1


def _encoder(model: Any) -> Any:
    """Find what embeds patches: the model, or the encoder that a classifier wraps."""
    trunk = _trunk(model)
    if hasattr(trunk, "patch_embed") or hasattr(trunk, "embeds"):
        return trunk
    return trunk.encoder


def _patch_embed(model: Any) -> Any:
    """Find the patch embedding; a NaFlexVit has none, its `embeds` take any grid."""
    return getattr(_encoder(model), "patch_embed", None)


def _geometry(model: Any, attention: Any) -> Geometry:
    first = attention.qkv if attention.qkv is not None else attention.q_proj
    grid = getattr(_patch_embed(model), "grid_size", None)
    return Geometry(
        dim=first.in_features,
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        num_prefix_tokens=attention.num_prefix_tokens,
        grid=tuple(grid) if grid else None,
        scale=attention.scale,
        attention_dropout=attention.attn_drop.p,
    )
