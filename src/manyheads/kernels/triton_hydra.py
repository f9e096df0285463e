"""Hydra's core in Triton: what one pass can read is read once.

    forward    sum    k, v    -> one partial sum a program    } two passes over
               finish         -> summary [B, D]               } tokens
               gate   q       -> out
    backward   queries q, grad -> dq, and partial sums for t   t as the summary is in
               finish         -> t [B, D]                      `hydra_backward`
               keys   k, v    -> dk, dv

Every input is read once in each direction and every output written once. Programs own
runs of tokens; their partial sums are added in a fixed order, without atomics, so that
a call repeats bit for bit. Sums are float32 (float64 for float64). Offsets are 64 bits
wide. Strides are free: a packed projection is read in place.

Imported only where a kernel is launched; `manyheads.kernels.hydra` is the way in.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.launching import Plan, masked, on_device_of, share_out

__all__ = ["backward", "forward"]

# Few programs add the partial sums up, so each must have much on its way at a time.
_COLUMNS = 32
_SPLITS = 256


# The hook that checks types under test would hide the source from Triton.
@triton.jit
@no_type_check
def _inverse_length(x):
    """Invert the length of each row; a zero row gets zero, NaN stays NaN."""
    square = tl.sum(x * x, axis=1)
    is_zero = square == 0
    return tl.where(is_zero, 0.0, 1.0 / tl.sqrt(tl.where(is_zero, 1.0, square)))


@triton.jit
@no_type_check
def _sum_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    partial_ptr,
    N,
    D,
    run,
    splits,
    x_b,
    x_n,
    x_d,
    y_b,
    y_n,
    y_d,
    mask_b,
    mask_n,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum unit(x_n) * y_n over one run of tokens; what is masked is not even read."""
    image = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = cols < D
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=WIDE)
    for start in range(0, run, BLOCK_N):
        rows = split * run + start + tl.arange(0, BLOCK_N)
        alive = rows < N
        if MASKED:
            place = mask_ptr + image * mask_b + rows * mask_n
            alive = alive & (tl.load(place, mask=alive, other=0) != 0)
        here = alive[:, None] & inside[None, :]
        x_at = x_ptr + image * x_b + rows[:, None] * x_n + cols[None, :] * x_d
        y_at = y_ptr + image * y_b + rows[:, None] * y_n + cols[None, :] * y_d
        x = tl.load(x_at, mask=here, other=0.0).to(WIDE)
        y = tl.load(y_at, mask=here, other=0.0).to(WIDE)
        total += x * _inverse_length(x)[:, None] * y
    out_at = partial_ptr + tl.program_id(0).to(tl.int64) * D + cols
    tl.store(out_at, tl.sum(total, axis=0), mask=inside)


@triton.jit
@no_type_check
def _finish_kernel(
    partial_ptr,
    more_ptr,
    total_ptr,
    D,
    splits,
    MORE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the partial sums of one image in the order of the tokens."""
    image = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    inside = cols < D
    total = tl.zeros((BLOCK_S, BLOCK_D), dtype=WIDE)
    for start in range(0, splits, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)
        place = partial_ptr + (image * splits + rows)[:, None] * D + cols[None, :]
        here = (rows < splits)[:, None] & inside[None, :]
        total += tl.load(place, mask=here, other=0.0)
    result = tl.sum(total, axis=0)
    if MORE:
        result += tl.load(more_ptr + image * D + cols, mask=inside, other=0.0)
    tl.store(total_ptr + image * D + cols, result, mask=inside)


@triton.jit
@no_type_check
def _gate_kernel(
    x_ptr,
    factor_ptr,
    out_ptr,
    N,
    D,
    run,
    splits,
    x_b,
    x_n,
    x_d,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write unit(x_n) * factor for one run of tokens."""
    image = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = cols < D
    factor = tl.load(factor_ptr + image * D + cols, mask=inside, other=0.0)
    for start in range(0, run, BLOCK_N):
        rows = split * run + start + tl.arange(0, BLOCK_N)
        here = (rows < N)[:, None] & inside[None, :]
        x_at = x_ptr + image * x_b + rows[:, None] * x_n + cols[None, :] * x_d
        x = tl.load(x_at, mask=here, other=0.0).to(WIDE)
        out = x * _inverse_length(x)[:, None] * factor[None, :]
        out_at = out_ptr + (image * N + rows)[:, None] * D + cols[None, :]
        tl.store(out_at, out, mask=here)


@triton.jit
@no_type_check
def _queries_kernel(
    q_ptr,
    grad_ptr,
    summary_ptr,
    dq_ptr,
    partial_ptr,
    N,
    D,
    run,
    splits,
    q_b,
    q_n,
    q_d,
    g_b,
    g_n,
    g_d,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Give dq and sum unit(q_n) * grad_n over one run of tokens, in one reading."""
    image = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = cols < D
    summary = tl.load(summary_ptr + image * D + cols, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=WIDE)
    for start in range(0, run, BLOCK_N):
        rows = split * run + start + tl.arange(0, BLOCK_N)
        here = (rows < N)[:, None] & inside[None, :]
        q_at = q_ptr + image * q_b + rows[:, None] * q_n + cols[None, :] * q_d
        g_at = grad_ptr + image * g_b + rows[:, None] * g_n + cols[None, :] * g_d
        q = tl.load(q_at, mask=here, other=0.0).to(WIDE)
        grad = tl.load(g_at, mask=here, other=0.0).to(WIDE)
        inverse = _inverse_length(q)
        total += q * inverse[:, None] * grad
        pulled = grad * summary[None, :]
        along = tl.sum(q * pulled, axis=1) * inverse * inverse
        dq = (pulled - q * along[:, None]) * inverse[:, None]
        dq_at = dq_ptr + (image * N + rows)[:, None] * D + cols[None, :]
        tl.store(dq_at, dq, mask=here)
    out_at = partial_ptr + tl.program_id(0).to(tl.int64) * D + cols
    tl.store(out_at, tl.sum(total, axis=0), mask=inside)


@triton.jit
@no_type_check
def _keys_kernel(
    k_ptr,
    v_ptr,
    mask_ptr,
    gathered_ptr,
    dk_ptr,
    dv_ptr,
    N,
    D,
    run,
    splits,
    k_b,
    k_n,
    k_d,
    v_b,
    v_n,
    v_d,
    mask_b,
    mask_n,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Give dk and dv for one run of tokens; zero where the key is masked."""
    image = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = cols < D
    gathered = tl.load(gathered_ptr + image * D + cols, mask=inside, other=0.0)
    for start in range(0, run, BLOCK_N):
        rows = split * run + start + tl.arange(0, BLOCK_N)
        alive = rows < N
        there = alive[:, None] & inside[None, :]
        if MASKED:
            place = mask_ptr + image * mask_b + rows * mask_n
            alive = alive & (tl.load(place, mask=alive, other=0) != 0)
        here = alive[:, None] & inside[None, :]
        k_at = k_ptr + image * k_b + rows[:, None] * k_n + cols[None, :] * k_d
        v_at = v_ptr + image * v_b + rows[:, None] * v_n + cols[None, :] * v_d
        k = tl.load(k_at, mask=here, other=0.0).to(WIDE)
        v = tl.load(v_at, mask=here, other=0.0).to(WIDE)
        inverse = _inverse_length(k)
        pulled = v * gathered[None, :]
        along = tl.sum(k * pulled, axis=1) * inverse * inverse
        dk = (pulled - k * along[:, None]) * inverse[:, None]
        dv = k * inverse[:, None] * gathered[None, :]
        out_at = (image * N + rows)[:, None] * D + cols[None, :]
        tl.store(dk_ptr + out_at, dk, mask=there)
        tl.store(dv_ptr + out_at, dv, mask=there)


def forward(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None
) -> Tensor:
    """Fill `out` [B, N, D], contiguous, and return the summary [B, D].

    Cost: reads q, k and v once and writes the output once, besides partial sums of at
    most ``1 / (4 BLOCK_N)`` of the keys' elements.
    """
    with on_device_of(q):
        plan = share_out(k)
        partial = plan.room(k)
        _sum(plan, k, v, key_mask, partial)
        summary = _finish(plan, partial, None)
        plan = share_out(q)
        if plan.programs:
            _gate_kernel[(plan.programs,)](
                q, summary, out, *plan.sizes, *q.stride(), **plan.options
            )
    return summary


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    grad_summary: Tensor,
    summary: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of q, k and v, contiguous; lengths are computed again.

    Args:
        grad: Gradient of the output.
        q: As for `forward`.
        k: As for `forward`.
        v: As for `forward`.
        key_mask: As for `forward`.
        grad_summary: Gradient of the summary [B, D], contiguous.
        summary: What `forward` returned, contiguous.
    """
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)
    )
    with on_device_of(q):
        plan = share_out(q)
        partial = plan.room(q)
        if plan.programs:
            strides = (*q.stride(), *grad.stride())
            _queries_kernel[(plan.programs,)](
                q, grad, summary, dq, partial, *plan.sizes, *strides, **plan.options
            )
        gathered = _finish(plan, partial, grad_summary)
        plan = share_out(k)
        if plan.programs:
            mask, mask_strides = masked(key_mask, k)
            strides = (*k.stride(), *v.stride(), *mask_strides)
            _keys_kernel[(plan.programs,)](
                k,
                v,
                mask,
                gathered,
                dk,
                dv,
                *plan.sizes,
                *strides,
                MASKED=key_mask is not None,
                **plan.options,
            )
    return dq, dk, dv


def _sum(
    plan: Plan, x: Tensor, y: Tensor, key_mask: Tensor | None, partial: Tensor
) -> None:
    if not plan.programs:
        return
    mask, mask_strides = masked(key_mask, x)
    strides = (*x.stride(), *y.stride(), *mask_strides)
    _sum_kernel[(plan.programs,)](
        x,
        y,
        mask,
        partial,
        *plan.sizes,
        *strides,
        MASKED=key_mask is not None,
        **plan.options,
    )


def _finish(plan: Plan, partial: Tensor, more: Tensor | None) -> Tensor:
    (_, D, _, splits), B = plan.sizes, plan.images
    total = partial.new_empty(B, D)
    if total.numel():
        _finish_kernel[(B, triton.cdiv(D, _COLUMNS))](
            partial,
            partial if more is None else more,
            total,
            D,
            splits,
            MORE=more is not None,
            WIDE=plan.options["WIDE"],
            BLOCK_S=min(_SPLITS, triton.next_power_of_2(max(1, splits))),
            BLOCK_D=_COLUMNS,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return total
