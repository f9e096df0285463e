"""Softmax attention with values of another width than queries, as one Triton operator.

Its slow twin is `manyheads.attention.softmax.softmax_maps` applied to the values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from manyheads.kernels.registration import register_autocast, require_triton

__all__ = ["two_width_attention"]


@torch.library.custom_op(
    "manyheads::two_width_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale)"
    " -> (Tensor, Tensor)",
)
def two_width_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Mix values of any width in one pass over the keys, by Triton.

    Cost: O(N S) time per feature, memory O(N + S). Made for half types: float32 is
    multiplied as float32, without the matrix units.

    Args:
        q: Queries [B, N, H, E]; any strides.
        k: Keys [B, S, H, E].
        v: Values [B, S, H, V], of the same type as q and k.
        key_mask: True for keys that count [B, S], or None for all.
        scale: Factor on query-key products.

    Returns:
        Mixed values [B, N, H, V], contiguous, and the base-2 log of each row's sum of
        exponentials [B, H, N], which backward needs and which has no gradient.

    Raises:
        InvalidOption: Triton cannot run on this device.
    """
    require_triton(q, 'attend(form="triton")')
    from manyheads.kernels import triton_attention

    return triton_attention.forward(q, k, v, key_mask, scale)


@two_width_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    log = torch.empty((B, H, N), dtype=torch.float32, device=v.device)
    return v.new_empty(B, N, H, v.shape[3]), log


@torch.library.custom_op(
    "manyheads::two_width_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor out, "
    "Tensor log, float scale) -> (Tensor, Tensor, Tensor)",
)
def two_width_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    log: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of `two_width_attention`; the weights are made again."""
    from manyheads.kernels import triton_attention

    return triton_attention.backward(grad, q, k, v, key_mask, out, log, scale)


@two_width_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, key_mask, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, key_mask, *output)


def _backward(
    ctx: Any, grad: Tensor, _: Tensor
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    saved = ctx.saved_tensors
    found = two_width_attention_backward(grad, *saved, ctx.scale)
    return *found, None, None


two_width_attention.register_autograd(_backward, setup_context=_setup_context)
register_autocast("two_width_attention", projected=3)


def _pairs(q: Any, k: Any) -> int:
    B, N, H, _ = q
    return int(B) * int(N) * int(H) * int(k[1])


@register_flop_formula([torch.ops.manyheads.two_width_attention])
def _flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """One product makes the maps, one applies them; two FLOPs a multiply-add."""
    return 2 * _pairs(q, k) * (int(q[-1]) + int(v[-1]))


@register_flop_formula([torch.ops.manyheads.two_width_attention_backward])
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """The maps again, and two products for each of the two that forward made."""
    return 2 * _pairs(q, k) * (3 * int(q[-1]) + 2 * int(v[-1]))
