"""Ordinary attention: the starting point of every conversion and the identity swap.

Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.base import AttentionSpec, CoreCost, Mechanism, apply_maps
from manyheads.geometry import Geometry, Grid

__all__ = ["Softmax", "SoftmaxAttention", "masked_softmax", "softmax_maps"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Softmax(AttentionSpec):
    """Ordinary scaled dot-product attention, with the host's heads.

        maps = softmax(q k^T * scale)      out = maps v

    Swapping it in must leave a model's logits unchanged; every host is tested so. It
    has no options.
    """

    takes_reduced_keys: ClassVar[bool] = True

    def problem(self, geometry: Geometry) -> str | None:
        """Every layer of a host can be served."""
        return None

    def build(self, geometry: Geometry) -> SoftmaxAttention:
        """Make the module; it has no parameters."""
        return SoftmaxAttention(self, geometry)

    def core_cost(self, geometry: Geometry, num_tokens: int) -> CoreCost:
        """Count ``2 N S D``: one product makes the maps, one applies them."""
        pairs = num_tokens * (geometry.reduced_keys or num_tokens)
        return CoreCost(attention=2 * pairs * geometry.attention_dim)


class SoftmaxAttention(Mechanism):
    """Fused softmax attention through torch's own kernels.

    Cost: O(N S D) time; memory O(N D) with the fused kernels, O(H N S) for ``maps``.
    """

    accepts_pair_mask = True

    def forward(
        self,
        q: Float[Tensor, "B N H K"],
        k: Float[Tensor, "B S H K"],
        v: Float[Tensor, "B S H K"],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B N H K"]:
        """Mix the values; any mask that broadcasts to [B, H, N, N] is honoured."""
        dropout = self.geometry.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=_pair_mask(mask),
            dropout_p=dropout,
            scale=self.geometry.scale,
        )
        return mixed.transpose(1, 2)

    def maps(
        self,
        q: Float[Tensor, "B N H K"],
        k: Float[Tensor, "B S H K"],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B H N S"]:
        """Build the maps; a query whose keys are all masked attends to nothing."""
        return softmax_maps(q, k, self.geometry.scale, mask)

    def rows(
        self,
        q: Float[Tensor, "B N H K"],
        k: Float[Tensor, "B S H K"],
        *,
        queries: Sequence[int],
        heads: Sequence[int],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B Mr Nr S"]:
        """Build some rows of some maps: each row needs its own query only."""
        pairs = _pair_mask(mask)
        if pairs is not None and pairs.ndim == 4 and pairs.shape[1] > 1:
            pairs = pairs[:, list(heads)]
        if pairs is not None and pairs.ndim > 1 and pairs.shape[-2] > 1:
            pairs = pairs[..., list(queries), :]
        chosen = q[:, list(queries)][:, :, list(heads)]
        return softmax_maps(chosen, k[:, :, list(heads)], self.geometry.scale, pairs)

    def reference(
        self,
        q: Float[Tensor, "B N H K"],
        k: Float[Tensor, "B S H K"],
        v: Float[Tensor, "B S H K"],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B N H K"]:
        """Do what ``forward`` does outside of training (no map entry is dropped)."""
        return apply_maps(self.maps(q, k, mask, grid), v)


def softmax_maps(
    q: Float[Tensor, "B N H K"],
    k: Float[Tensor, "B S H K"],
    scale: float,
    mask: Tensor | None = None,
) -> Float[Tensor, "B H N S"]:
    """Build every head's map, rows over queries and columns over keys.

        maps[h, n, m] = softmax_m(scale * <q[n, h], k[m, h]>)

    Cost: O(H N S K) time, O(H N S) memory.
    """
    scores = scale * torch.einsum("bnhk,bmhk->bhnm", q, k)
    return masked_softmax(scores, mask)


def masked_softmax(
    scores: Float[Tensor, "B H N S"], mask: Tensor | None
) -> Float[Tensor, "B H N S"]:
    """Make maps of scores; what is masked weighs nothing, even where all of it is."""
    pairs = _pair_mask(mask)
    if pairs is None:
        return scores.softmax(dim=-1)
    if pairs.dtype is not torch.bool:
        return (scores + pairs).softmax(dim=-1)
    lowest = torch.finfo(scores.dtype).min
    kept = scores.masked_fill(~pairs, lowest).softmax(dim=-1)
    return kept.masked_fill(~pairs, 0.0)


def _pair_mask(mask: Tensor | None) -> Tensor | None:
    """Shape a [B, N] key mask so that it broadcasts over heads and queries."""
    return mask[:, None, None, :] if mask is not None and mask.ndim == 2 else mask
