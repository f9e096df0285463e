"""Moves whole heads inside projections: what hosts need to reorder or drop some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention import AttentionSpec, Mechanism
from manyheads.geometry import Geometry

__all__ = [
    "RealHeads",
    "build_core",
    "first_rows",
    "head_index",
    "no_plain_matrix",
    "permute_inputs",
    "permute_outputs",
]


def build_core(spec: AttentionSpec, geometry: Geometry, like: Tensor) -> Mechanism:
    """Make a mechanism whose parameters have the type and device of a projection."""
    return spec.build(geometry).to(device=like.device, dtype=like.dtype)


def first_rows(linear: nn.Linear, rows: Sequence[tuple[int, int]]) -> nn.Linear:
    """Keep some output features of a projection, given as (start, count) runs.

    Args:
        linear: The projection; it is not changed, its tensors are not shared.
        rows: Runs of output features, in the order in which they are to stand.
    """
    size = sum(count for _, count in rows)
    made = nn.Linear(
        linear.in_features, size, bias=linear.bias is not None, device="meta"
    )
    for name, tensor in linear.named_parameters():
        kept = torch.cat([tensor.detach().narrow(0, *run) for run in rows])
        setattr(made, name, nn.Parameter(kept, requires_grad=tensor.requires_grad))
    return made.train(linear.training)


class RealHeads(nn.Module):
    """A projection of the first heads only, padded with zeros to all of them.

    For libraries that cut what comes out by a number of heads of their own. The
    padding passes their reshapes and rotations and is cut off before the mechanism.
    Parameters have the names they have in the `nn.Linear` it stands for.

    Args:
        linear: The projection of all heads, or one of these; it is not changed.
        kept: Output features of the real heads.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: Any, kept: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kept = kept
        for name in ("weight", "bias"):
            whole = getattr(linear, name)
            part = None
            if whole is not None:
                part = nn.Parameter(
                    whole.detach()[:kept].clone(), requires_grad=whole.requires_grad
                )
            self.register_parameter(name, part)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Project, and leave zeros where hallucinated heads would be."""
        projected = F.linear(x, self.weight, self.bias)
        return F.pad(projected, (0, self.out_features - self.kept))

    def extra_repr(self) -> str:
        """Show sizes as `nn.Linear` does, and how many outputs are real."""
        return f"{self.in_features}, {self.out_features}, real={self.kept}"


def no_plain_matrix(layer: Any, *names: str) -> str:
    """Say which projection is more than a matrix, if one is; else give nothing.

    Rows of a low-rank adapter, a normalised or a quantised weight are no heads that
    could be kept, dropped or reordered one by one.
    """
    for name in names:
        part = getattr(layer, name, None)
        if part is not None and type(part) not in (nn.Linear, RealHeads):
            return f"its {name} is a {type(part).__name__}, no plain nn.Linear"
    return ""


def head_index(order: Sequence[int], width: int, *, parts: int = 1) -> Tensor:
    """Give the feature order that puts heads in this order, in each of some parts.

    A packed projection [Q, K, V] has three parts, each with all heads side by side.
    """
    heads = torch.as_tensor(order)[:, None] * width + torch.arange(width)
    size = len(order) * width
    return torch.cat([heads.flatten() + part * size for part in range(parts)])


@torch.no_grad()
def permute_outputs(module: nn.Module, index: Tensor) -> None:
    """Reorder in place what a layer puts out: rows of a matrix, entries of a norm."""
    for tensor in module.parameters():
        if tensor.shape[0] == len(index):
            tensor.copy_(tensor[index.to(tensor.device)].clone())


@torch.no_grad()
def permute_inputs(linear: nn.Linear, index: Tensor) -> None:
    """Reorder in place what a projection takes in: the columns of its matrix."""
    weight = linear.weight
    weight.copy_(weight[:, index.to(weight.device)].clone())
