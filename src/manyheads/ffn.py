"""Compact feed-forward layers: the output matrix as two thin ones.

Xu, Zhou, He, Li, Wang, "Vision Transformer with Attention Map Hallucination and FFN
Compaction", 2023, arXiv 2306.10875; this file is its second half (cFFN).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InvalidOption
from manyheads.specs import Spec

__all__ = ["FEED_FORWARDS", "Compact", "CompactLinear", "FeedForwardSpec"]


@dataclass(frozen=True, kw_only=True, repr=False)
class FeedForwardSpec(Spec):
    """What a feed-forward layer's output matrix becomes, by name and options."""

    @abstractmethod
    def problem(self, output: nn.Linear) -> str | None:
        """Say in one clause why this matrix cannot be swapped, or None if it can."""

    @abstractmethod
    def build(self, output: nn.Linear) -> nn.Module:
        """Make what stands in the place of the output matrix, started from it."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Compact(FeedForwardSpec):
    """A feed-forward layer whose output matrix has a low rank.

        y = U (V h) + b        V [R, F], U [D, R], no nonlinearity between

    `rank` is a share of the output width D when it is a float and an absolute rank
    when it is an int; the default, half of D, is the only simple rule with which
    DeiT, PVT and Next-ViT all save what the paper reports.

    Note:
        The paper does not fix the rank or the start; ours is the best rank-R
        approximation of the trained matrix (truncated singular value decomposition),
        split evenly between both factors.

    Raises:
        InvalidOption: The rank is not a positive share or count.
    """

    rank: float | int = 0.5

    def __post_init__(self) -> None:
        share = isinstance(self.rank, float) and 0 < self.rank <= 1
        count = type(self.rank) is int and self.rank > 0
        if not share and not count:
            raise InvalidOption(
                asked=f"Compact(rank={self.rank!r})",
                found="it is neither a share of the width in (0, 1] nor a positive int",
                fix="Use Compact(rank=0.5) for half of the width or Compact(rank=192).",
            )

    def rank_for(self, width: int) -> int:
        """Give the absolute rank for an output of `width` features, at least 1."""
        if isinstance(self.rank, int):
            return self.rank
        return max(1, round(self.rank * width))

    def problem(self, output: nn.Linear) -> str | None:
        """Refuse ranks above what the matrix has."""
        rank, full = self.rank_for(output.out_features), min(output.weight.shape)
        if rank > full:
            return f"rank {rank} exceeds the {full} that the matrix has"
        return None

    def build(self, output: nn.Linear) -> CompactLinear:
        """Factorise the output matrix; the bias stays as it is."""
        return CompactLinear.from_linear(
            self, output, self.rank_for(output.out_features)
        )


FEED_FORWARDS: tuple[type[FeedForwardSpec], ...] = (Compact,)


class CompactLinear(nn.Module):
    """A linear layer of rank R, as two factors that are never merged.

    Cost: ``R (F + D)`` multiply-adds a token in place of ``F D``.
    """

    def __init__(
        self,
        spec: FeedForwardSpec,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.spec = spec
        self.in_features, self.out_features = in_features, out_features
        self.rank = rank
        self.inner = nn.Linear(in_features, rank, bias=False, **place)
        self.outer = nn.Linear(rank, out_features, bias=bias, **place)

    @classmethod
    def from_linear(
        cls, spec: FeedForwardSpec, linear: nn.Linear, rank: int
    ) -> CompactLinear:
        """Start from the best approximation of that rank of a trained matrix."""
        weight = linear.weight
        made = cls(
            spec,
            linear.in_features,
            linear.out_features,
            rank,
            bias=linear.bias is not None,
            device=torch.device("meta"),
            dtype=weight.dtype,
        ).to_empty(device=weight.device)
        if weight.device.type == "meta":
            return made
        with torch.no_grad():
            u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
            root = s[:rank].sqrt()
            made.outer.weight.copy_(u[:, :rank] * root)
            made.inner.weight.copy_(root[:, None] * vh[:rank])
            if linear.bias is not None:
                made.outer.bias.copy_(linear.bias)
        return made.train(linear.training)

    def forward(self, x: Float[Tensor, "*B F"]) -> Float[Tensor, "*B D"]:
        """Apply both factors."""
        y: Tensor = self.outer(self.inner(x))
        return y
