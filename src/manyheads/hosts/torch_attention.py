"""A drop-in for `torch.nn.MultiheadAttention` with another mechanism inside.

torchvision's transformers are built from that layer, and so are many people's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention import AttentionSpec, Mechanism
from manyheads.errors import GeometryMismatch, MaskRefused
from manyheads.geometry import Geometry, Grid
from manyheads.hosts.base import TokenGrid, mechanism_of
from manyheads.hosts.heads import (
    build_core,
    first_rows,
    head_index,
    permute_inputs,
    permute_outputs,
)

__all__ = [
    "TorchAttention",
    "multihead_geometry",
    "multihead_problem",
    "permute_multihead",
]


class TorchAttention(nn.Module):
    """Multi-head attention as torch calls it, with a mechanism between projections.

    The packed `in_proj_weight` becomes the weight of `qkv`, row for row, and
    `out_proj` becomes `proj`; both hold the original parameters, not copies. Weights
    are never returned, whatever `need_weights` says: the second output is None.

    Args:
        source: A `torch.nn.MultiheadAttention` that `multihead_problem` accepts, or
            one of these; its parameters move here.
        geometry: Sizes of the layer.
        spec: The mechanism to put between the projections.
    """

    # torch.nn.TransformerEncoder reads these and `in_proj_weight`, `out_proj` to choose
    # its fused path; with no in_proj_bias it calls this layer instead.
    in_proj_bias: None = None
    _qkv_same_embed_dim = True

    batch_first: bool
    qkv: nn.Linear
    core: Mechanism
    proj: nn.Linear

    def __init__(
        self,
        source: nn.MultiheadAttention | TorchAttention,
        geometry: Geometry,
        spec: AttentionSpec,
    ) -> None:
        super().__init__()
        self.embed_dim = geometry.dim
        self.num_heads, self.head_dim = geometry.num_heads, geometry.head_dim
        self.query_heads = spec.num_query_heads(geometry)
        self.batch_first = source.batch_first
        if isinstance(source, TorchAttention):
            self.qkv, self.proj = self._projecting(source.qkv), source.proj
        else:
            self.qkv = self._projecting(
                _linear(source.in_proj_weight, source.in_proj_bias)
            )
            self.proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.core = build_core(spec, geometry, self.qkv.weight)
        self.token_grid: TokenGrid | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend; masks mean what they mean in torch: True leaves a key out.

        Raises:
            GeometryMismatch: The input is not batched or is a nested tensor, or
                queries and keys are tokens of different sequences (cross-attention).
            MaskRefused: The mechanism cannot honour the mask, or `is_causal` is set
                and there is none.
        """
        self._require_one_sequence(query, key, value)
        if is_causal and attn_mask is None:
            raise _mask_missing()
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        mask = _kept(key_padding_mask, attn_mask, self.core)
        mixed = self.core(q, k, v, mask, self._grid())
        out: Tensor = self.proj(mixed.flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None

    @property
    def in_proj_weight(self) -> Tensor:
        """Give the packed projection under torch's name."""
        return self.qkv.weight

    @property
    def out_proj(self) -> nn.Linear:
        """Give the output projection under torch's name."""
        return self.proj

    def _projecting(self, qkv: nn.Linear) -> nn.Linear:
        """Keep the first heads of queries and keys, as many as the mechanism takes."""
        query_dim, dim = (
            self.query_heads * self.head_dim,
            self.num_heads * self.head_dim,
        )
        if qkv.out_features == 2 * query_dim + dim:
            return qkv
        return first_rows(qkv, ((0, query_dim), (dim, query_dim), (2 * dim, dim)))

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = self.query_heads * self.head_dim
        sizes = [width, width, self.num_heads * self.head_dim]
        if query is key and key is value:
            parts = self.qkv(query).split(sizes, dim=-1)
        else:
            weights = torch.split(self.qkv.weight, sizes)
            biases = (
                (None, None, None)
                if self.qkv.bias is None
                else torch.split(self.qkv.bias, sizes)
            )
            parts = tuple(
                F.linear(x, weight, bias)
                for x, weight, bias in zip(
                    (query, key, value), weights, biases, strict=True
                )
            )
        B, N = parts[0].shape[:2]
        q, k, v = (part.reshape(B, N, -1, self.head_dim) for part in parts)
        return q, k, v

    def _grid(self) -> Grid | None:
        return self.token_grid() if self.token_grid is not None else None

    def _require_one_sequence(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise _nested(self.core)
        if query.ndim == 3 and query.shape == key.shape == value.shape:
            return
        raise GeometryMismatch(
            asked="attention was called with query, key, value of shapes "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}",
            found=f"a layer converted to {self.core.spec} mixes the tokens of one "
            "batched sequence",
            why="these mechanisms are defined for self-attention only",
            fix="Leave cross-attention layers out, and add a batch axis to the input.",
        )


def permute_multihead(layer: Any, geometry: Geometry, order: Sequence[int]) -> None:
    """Put the heads of a layer, torch's or ours, in another order, in place."""
    index = head_index(order, geometry.head_dim)
    packed = head_index(order, geometry.head_dim, parts=3)
    if isinstance(layer, TorchAttention):
        permute_outputs(layer.qkv, packed)
        permute_inputs(layer.proj, index)
        return
    permute_outputs(_linear(layer.in_proj_weight, layer.in_proj_bias), packed)
    permute_inputs(layer.out_proj, index)


def multihead_problem(layer: nn.MultiheadAttention) -> str | None:
    """Say in one clause what such a layer does that `TorchAttention` cannot."""
    if layer.in_proj_weight is None:
        return f"keys and values have widths of their own ({layer.kdim}, {layer.vdim})"
    if layer.bias_k is not None or layer.add_zero_attn:
        return "it appends keys that are no tokens (add_bias_kv or add_zero_attn)"
    return None


def multihead_geometry(
    layer: nn.MultiheadAttention | TorchAttention,
    *,
    num_prefix_tokens: int = 0,
    grid: Grid | None = None,
) -> Geometry:
    """Read the sizes off a layer; what its surroundings know is passed in."""
    core = mechanism_of(layer)
    if core is not None:
        return core.geometry
    return Geometry(
        dim=layer.embed_dim,
        num_heads=layer.num_heads,
        head_dim=layer.head_dim,
        num_prefix_tokens=num_prefix_tokens,
        grid=grid,
        scale=layer.head_dim**-0.5,
        attention_dropout=getattr(layer, "dropout", 0.0),
    )


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """Make a linear layer that holds these very parameters."""
    made: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight, made.bias = weight, bias
    return cast("nn.Linear", made)


def _kept(
    padding: Tensor | None, pairs: Tensor | None, core: Mechanism
) -> Tensor | None:
    """Turn torch's masks, where True leaves out, into ours, where True keeps."""
    per_key = None if padding is None else _kept_keys(padding)
    if pairs is None:
        return per_key
    if not core.accepts_pair_mask:
        raise MaskRefused(
            asked=f"attention was called with attn_mask {list(pairs.shape)}",
            found=f"{core.spec} knows no pairs of tokens, only keys that count or not",
            why="a mask on token pairs would be silently ignored",
            fix="Pass key_padding_mask, or keep Softmax() in the blocks that need it.",
        )
    allowed = ~pairs if pairs.dtype is torch.bool else pairs
    if allowed.ndim == 2:
        # Torch reads two dimensions as [N, N]; a mechanism would as [B, N].
        allowed = allowed[None, None]
    if allowed.ndim == 3:  # [B * H, N, N]
        allowed = allowed.reshape(-1, core.geometry.num_heads, *allowed.shape[1:])
    if per_key is None:
        return allowed
    rows = per_key[:, None, None, :]
    if allowed.dtype is torch.bool:
        return allowed & rows
    return allowed.masked_fill(~rows, -torch.inf)


def _kept_keys(padding: Tensor) -> Tensor:
    """Read a padding mask, boolean or of zeros and minus infinity."""
    if padding.dtype is torch.bool:
        return ~padding
    kept = padding == 0
    if not bool((kept | (padding == -torch.inf)).all()):
        raise MaskRefused(
            asked=f"attention was called with a {padding.dtype} key_padding_mask",
            found="some of its entries are neither 0 nor minus infinity",
            why="a key counts or does not count; there is nothing between",
            fix="Pass a boolean key_padding_mask with True for padding.",
        )
    return kept


def _mask_missing() -> MaskRefused:
    return MaskRefused(
        asked="attention was called with is_causal=True",
        found="attn_mask is None",
        why="to torch is_causal is a hint about the mask and makes none",
        fix="Pass attn_mask=torch.nn.Transformer.generate_square_subsequent_mask(N) as "
        "well.",
    )


def _nested(core: Mechanism) -> GeometryMismatch:
    return GeometryMismatch(
        asked="attention was called with a nested tensor",
        found=f"a layer converted to {core.spec} takes batches [B, N, C] with a mask",
        why="torch.nn.TransformerEncoder packs padded batches so for its fused layers "
        "while it evaluates",
        fix="Build it with torch.nn.TransformerEncoder(..., "
        "enable_nested_tensor=False), or set encoder.use_nested_tensor = False on the "
        "one that is there.",
    )
