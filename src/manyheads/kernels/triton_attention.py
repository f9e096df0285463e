"""Softmax attention in Triton for values of another width than queries.

    forward    q, k, v      -> out, and the log of each row's sum
    backward   queries      -> dq, and each row's <out, grad>
               keys         -> dk, dv

The online softmax of Dao et al., "FlashAttention", 2022, arXiv 2205.14135, with two
widths: products with values cost their own width, products of queries and keys theirs,
where filling up to equal widths makes both cost the wider one. Every gradient has one
program that sums it in a fixed order, without atomics.

Imported only where a kernel is launched; `manyheads.kernels.two_widths` is the way in.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.launching import masked, on_device_of

__all__ = ["backward", "forward"]

_LOG2_E = 1.4426950408889634


# The hook that checks types under test would hide the source from Triton.
@triton.jit
@no_type_check
def _tile(x_ptr, rows, cols, num_rows, width, x_n, x_d):
    """Load rows of one head; zeros outside."""
    inside = (rows < num_rows)[:, None] & (cols < width)[None, :]
    place = x_ptr + rows.to(tl.int64)[:, None] * x_n + cols[None, :] * x_d
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
@no_type_check
def _put(out_ptr, value, image, head, rows, cols, num_rows, H, width):
    """Store rows of one head of a contiguous tensor [B, N, H, width]."""
    inside = (rows < num_rows)[:, None] & (cols < width)[None, :]
    row = (image * num_rows + rows.to(tl.int64)) * H + head
    tl.store(out_ptr + row[:, None] * width + cols[None, :], value, mask=inside)


@triton.jit
@no_type_check
def _scores(q, k, mask_ptr, keys, S, mask_n, scale, MASKED: tl.constexpr):
    """Score queries against keys in powers of two; -inf where a key does not count."""
    alive = keys < S
    if MASKED:
        alive = alive & (tl.load(mask_ptr + keys * mask_n, mask=alive, other=0) != 0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where(alive[None, :], scores, float("-inf"))


@triton.jit
@no_type_check
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    log_ptr,
    N,
    S,
    H,
    E,
    V,
    scale,
    blocks,
    q_b,
    q_n,
    q_h,
    q_d,
    k_b,
    k_n,
    k_h,
    k_d,
    v_b,
    v_n,
    v_h,
    v_d,
    mask_b,
    mask_n,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    place = (tl.program_id(0) // blocks).to(tl.int64)
    image, head = place // H, place % H
    rows = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    narrow, wide = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_V)
    q = _tile(q_ptr + image * q_b + head * q_h, rows, narrow, N, E, q_n, q_d)
    k_ptr += image * k_b + head * k_h
    v_ptr += image * v_b + head * v_h
    mask_ptr += image * mask_b
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    mixed = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, S, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        k = _tile(k_ptr, keys, narrow, S, E, k_n, k_d)
        scores = _scores(q, k, mask_ptr, keys, S, mask_n, scale, MASKED)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, axis=1)
        v = _tile(v_ptr, keys, wide, S, V, v_n, v_d)
        mixed *= shrink[:, None]
        mixed += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    known = total > 0
    total = tl.where(known, total, 1.0)
    mixed = mixed / total[:, None]
    _put(out_ptr, mixed, image, head, rows, wide, N, H, V)
    log = tl.where(known, top + tl.log2(total), 0.0)
    tl.store(log_ptr + place * N + rows, log, mask=rows < N)


@triton.jit
@no_type_check
def _queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    grad_ptr,
    log_ptr,
    inner_ptr,
    dq_ptr,
    N,
    S,
    H,
    E,
    V,
    scale,
    blocks,
    q_b,
    q_n,
    q_h,
    q_d,
    k_b,
    k_n,
    k_h,
    k_d,
    v_b,
    v_n,
    v_h,
    v_d,
    g_b,
    g_n,
    g_h,
    g_d,
    mask_b,
    mask_n,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    place = (tl.program_id(0) // blocks).to(tl.int64)
    image, head = place // H, place % H
    rows = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    narrow, wide = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_V)
    q = _tile(q_ptr + image * q_b + head * q_h, rows, narrow, N, E, q_n, q_d)
    grad = _tile(grad_ptr + image * g_b + head * g_h, rows, wide, N, V, g_n, g_d)
    out_at = out_ptr + (image * N * H + head) * V
    out = _tile(out_at, rows, wide, N, V, H * V, 1)
    inner = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    tl.store(inner_ptr + place * N + rows, inner, mask=rows < N)
    log = tl.load(log_ptr + place * N + rows, mask=rows < N, other=0.0)
    k_ptr += image * k_b + head * k_h
    v_ptr += image * v_b + head * v_h
    mask_ptr += image * mask_b
    dq = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in range(0, S, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        k = _tile(k_ptr, keys, narrow, S, E, k_n, k_d)
        v = _tile(v_ptr, keys, wide, S, V, v_n, v_d)
        scores = _scores(q, k, mask_ptr, keys, S, mask_n, scale, MASKED)
        weights = tl.exp2(scores - log[:, None])
        pulled = tl.dot(grad, tl.trans(v), input_precision="ieee")
        pulled = weights * (pulled - inner[:, None])
        dq += tl.dot(pulled.to(k.dtype), k, input_precision="ieee")
    # The scale carries log2(e), which belongs to the power and not to its gradient.
    dq *= scale * 0.6931471805599453
    _put(dq_ptr, dq, image, head, rows, narrow, N, H, E)


@triton.jit
@no_type_check
def _keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    grad_ptr,
    log_ptr,
    inner_ptr,
    dk_ptr,
    dv_ptr,
    N,
    S,
    H,
    E,
    V,
    scale,
    blocks,
    q_b,
    q_n,
    q_h,
    q_d,
    k_b,
    k_n,
    k_h,
    k_d,
    v_b,
    v_n,
    v_h,
    v_d,
    g_b,
    g_n,
    g_h,
    g_d,
    mask_b,
    mask_n,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    place = (tl.program_id(0) // blocks).to(tl.int64)
    image, head = place // H, place % H
    keys = (tl.program_id(0) % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    narrow, wide = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_V)
    k = _tile(k_ptr + image * k_b + head * k_h, keys, narrow, S, E, k_n, k_d)
    v = _tile(v_ptr + image * v_b + head * v_h, keys, wide, S, V, v_n, v_d)
    q_ptr += image * q_b + head * q_h
    grad_ptr += image * g_b + head * g_h
    mask_ptr += image * mask_b
    dk = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        q = _tile(q_ptr, rows, narrow, N, E, q_n, q_d)
        grad = _tile(grad_ptr, rows, wide, N, V, g_n, g_d)
        log = tl.load(log_ptr + place * N + rows, mask=rows < N, other=0.0)
        inner = tl.load(inner_ptr + place * N + rows, mask=rows < N, other=0.0)
        scores = _scores(q, k, mask_ptr, keys, S, mask_n, scale, MASKED)
        weights = tl.exp2(scores - log[:, None])
        # Rows beyond the last have weights too; their gradient and query are zero.
        turned = tl.trans(weights.to(grad.dtype))
        dv += tl.dot(turned, grad, input_precision="ieee")
        pulled = tl.dot(grad, tl.trans(v), input_precision="ieee")
        pulled = weights * (pulled - inner[:, None])
        dk += tl.dot(tl.trans(pulled.to(q.dtype)), q, input_precision="ieee")
    dk *= scale * 0.6931471805599453
    _put(dk_ptr, dk, image, head, keys, narrow, S, H, E)
    _put(dv_ptr, dv, image, head, keys, wide, S, H, V)


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Mix values, see `manyheads.kernels.hallucinated.attend`.

    Returns:
        Mixed values [B, N, H, V], and the base-2 log of each row's sum [B, H, N].
    """
    B, N, H, _ = q.shape
    out = torch.empty((B, N, H, v.shape[3]), dtype=v.dtype, device=v.device)
    log = torch.zeros((B, H, N), dtype=torch.float32, device=v.device)
    if out.numel() == 0:
        return out, log
    sizes, options = _launch(q, k, v, scale, 128)
    blocks = triton.cdiv(N, options["BLOCK_N"])
    mask, mask_strides = masked(key_mask, k)
    strides = (*q.stride(), *k.stride(), *v.stride(), *mask_strides)
    with on_device_of(q):
        _forward_kernel[(B * H * blocks,)](
            q,
            k,
            v,
            mask,
            out,
            log,
            *sizes,
            blocks,
            *strides,
            MASKED=key_mask is not None,
            **options,
        )
    return out, log


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    log: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of q, k and v, contiguous; weights are made again, twice."""
    dq, dk, dv = (
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)
    )
    if out.numel() == 0 or k.numel() == 0:
        return dq, dk, dv
    (B, N, H, _), S = q.shape, k.shape[1]
    sizes, options = _launch(q, k, v, scale, 64)
    inner = torch.empty_like(log)
    mask, mask_strides = masked(key_mask, k)
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride(), *mask_strides)
    options["MASKED"] = key_mask is not None
    with on_device_of(q):
        blocks = triton.cdiv(N, options["BLOCK_N"])
        given = (q, k, v, mask, out, grad, log, inner, dq)
        _queries_kernel[(B * H * blocks,)](*given, *sizes, blocks, *strides, **options)
        blocks = triton.cdiv(S, options["BLOCK_S"])
        given = (q, k, v, mask, grad, log, inner, dk, dv)
        _keys_kernel[(B * H * blocks,)](*given, *sizes, blocks, *strides, **options)
    return dq, dk, dv


def _launch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, most: int
) -> tuple[tuple[int | float, ...], dict[str, Any]]:
    """Choose blocks by widths: wide values and float32 leave room for fewer rows."""
    (_, N, H, E), S, V = q.shape, k.shape[1], v.shape[3]
    room = triton.next_power_of_2(max(E, V)) * q.dtype.itemsize
    rows = most if room <= 256 else max(32, most // 2)
    options = {
        "BLOCK_N": min(rows, max(16, triton.next_power_of_2(N))),
        "BLOCK_S": min(64 if room <= 256 else 32, max(16, triton.next_power_of_2(S))),
        "BLOCK_E": max(16, triton.next_power_of_2(E)),
        "BLOCK_V": max(16, triton.next_power_of_2(V)),
        "num_warps": 8,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }
    return (N, S, H, E, V, scale * _LOG2_E), options
