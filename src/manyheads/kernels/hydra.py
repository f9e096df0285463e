"""Hydra's core as one operator: few passes over memory, recomputing backward.

The slow twin is `manyheads.attention.hydra.hydra_attention` with the cosine kernel.

Bolya et al., "Hydra Attention: Efficient Attention with Many Heads", 2022,
arXiv 2209.07484.

The work is bound by memory, not by arithmetic: what counts is how often q, k and v are
read and how many fresh buffers are written. The lengths of the vectors are kept as
[B, N] scalars instead of dividing whole tensors, the sum over tokens is a
matrix-vector product with those scalars, and the output buffer serves as the only
full-size temporary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["hydra", "use_operator"]


def use_operator() -> bool:
    """Say whether the operator serves here; exported graphs get plain operators.

    An exported program must run where this package is not installed.
    """
    return not torch.compiler.is_exporting()


@torch.library.custom_op(
    "manyheads::hydra",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? key_mask) -> Tensor",
)
def hydra(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Let every token read one summary of the image, gated feature by feature.

        summary = sum_m unit(k_m) * v_m        out_n = unit(q_n) * summary

    Cost: O(B N D) time; one buffer of the output's size is written, twice.

    Args:
        q: Projected queries [B, N, D]; any strides, a packed projection is read in
            place.
        k: Projected keys [B, N, D].
        v: Projected values [B, N, D], of the same type as q and k.
        key_mask: True for tokens that enter the sum [B, N], or None for all.

    Returns:
        Mixed tokens [B, N, D], contiguous.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q_weight = _inverse_length(q, None)
    k_weight = _inverse_length(k, key_mask)
    summary = _weighted_sum(k, v, k_weight, out)
    return _gated(q, q_weight, summary, out)


@hydra.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op(
    "manyheads::hydra_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? key_mask)"
    " -> (Tensor, Tensor, Tensor)",
)
def hydra_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of `hydra`; lengths and summary are computed again.

    With a = unit(q), b = unit(k), s = summary and t = sum_n a_n * grad_n:

        dq = (grad * s - a <a, grad * s>) / |q|
        dk = (t * v - b <b, t * v>) / |k|           dv = t * b
    """
    q_weight = _inverse_length(q, None)
    k_weight = _inverse_length(k, key_mask)
    buffer = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    summary = _weighted_sum(k, v, k_weight, buffer)
    gathered = _weighted_sum(q, grad, q_weight, buffer)
    dq = _through_unit(grad, q, q_weight, summary)
    dk = _through_unit(v, k, k_weight, gathered)
    return dq, dk, _gated(k, k_weight, gathered, buffer)


@hydra_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    def fresh(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return fresh(q), fresh(k), fresh(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, key_mask = inputs
    ctx.save_for_backward(q, k, v, key_mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, key_mask = ctx.saved_tensors
    return *hydra_backward(grad, q, k, v, key_mask), None


hydra.register_autograd(_backward, setup_context=_setup_context)


def _inverse_length(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Invert the length of each vector; zero vectors and masked tokens get zero."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=wide)
    weight = length.reciprocal_()
    weight.masked_fill_(weight == torch.inf, 0.0)
    if key_mask is not None:
        weight.masked_fill_(~key_mask, 0.0)
    return weight


def _weighted_sum(x: Tensor, y: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Sum weight[n] * x[n] * y[n] over tokens, in the type of the weight: [B, D]."""
    if x.dtype is weight.dtype and x.shape == buffer.shape:
        product = torch.mul(x, y, out=buffer)
    else:
        product = x.to(weight.dtype) * y
    summed: Tensor = torch.matmul(weight[:, None], product)
    return summed[:, 0]


def _gated(x: Tensor, weight: Tensor, factor: Tensor, buffer: Tensor) -> Tensor:
    """Give weight[n] * x[n] * factor, in the buffer where the types allow it."""
    if x.dtype is weight.dtype:
        torch.mul(x, factor[:, None], out=buffer)
        buffer.mul_(weight[..., None])
        return buffer
    # In half types 1 / |x| alone may overflow; the product does not.
    return (weight[..., None] * x * factor[:, None]).to(x.dtype)


def _through_unit(grad: Tensor, x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """Pull ``grad * factor`` back through ``x / |x|``, weight being 1 / |x|."""
    wide = weight[..., None]
    pulled = grad.to(weight.dtype) * factor[:, None]  # [B, N, D]
    along = (pulled * x).sum(dim=-1, keepdim=True) * wide * wide
    return pulled.sub_(x * along).mul_(wide).to(x.dtype)


@register_flop_formula([torch.ops.manyheads.hydra])
def _flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    """One multiply-add a feature and key, one a feature and query, 2 FLOPs each."""
    B, N, D = q
    return 2 * int(B) * (int(N) + int(k[1])) * int(D)


@register_flop_formula([torch.ops.manyheads.hydra_backward])
def _backward_flops(grad: Any, q: Any, k: Any, *_: Any, **__: Any) -> int:
    """The sum again, its transpose, and the three gradients' gates."""
    B, N, D = grad
    return 2 * int(B) * (2 * int(N) + 3 * int(k[1])) * int(D)
