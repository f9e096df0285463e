"""Interactive attention's core in Triton: all heads of a few tokens in one program.

    gather      k, v     -> summary [B, H, L, K]       see `triton_gather`
    read        q        -> out

Products of half types are summed in float32; float32 inputs are multiplied as float32,
not as tf32.

Imported only where a kernel is launched; `manyheads.kernels.interactive` is the way in.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.launching import masked, on_device_of
from manyheads.kernels.thin_maps import Mixes
from manyheads.kernels.triton_gather import (
    BLOCK_N,
    alive_at,
    blend,
    gather,
    matrices,
    pick,
    put,
)

__all__ = ["forward"]


# The hook that checks types under test would hide the source from Triton.
@triton.jit
@no_type_check
def _read_kernel(
    q_ptr,
    marks_ptr,
    summary_ptr,
    before_ptr,
    after_ptr,
    mask_ptr,
    out_ptr,
    N,
    L,
    H,
    K,
    scale,
    blocks,
    q_b,
    q_n,
    q_h,
    q_d,
    m_b,
    m_l,
    m_h,
    m_d,
    mask_b,
    mask_l,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    MASKED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Let a few queries read the landmarks' summary, all heads."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N
    rows = start + tl.arange(0, BLOCK_N)
    heads = tl.arange(0, HEADS)
    marks = tl.arange(0, BLOCK_L)
    cols = tl.arange(0, BLOCK_K)
    alive = alive_at(mask_ptr, image, marks, L, mask_b, mask_l, MASKED)
    here = (rows < N)[:, None] & (cols < K)[None, :]
    there = (cols < K)[:, None] & (marks < L)[None, :]
    stack = tl.zeros((HEADS, BLOCK_N, BLOCK_L), tl.float32)
    for head in range(H):
        q_at = q_ptr + image * q_b + head * q_h
        q_at += rows[:, None] * q_n + cols[None, :] * q_d
        m_at = marks_ptr + image * m_b + head * m_h
        m_at += marks[None, :] * m_l + cols[:, None] * m_d
        left = tl.load(q_at, mask=here, other=0.0)
        right = tl.load(m_at, mask=there, other=0.0)
        scores = tl.dot(left, right, input_precision="ieee") * scale
        stack = put(stack, scores, heads, head, before_ptr, H, BEFORE)
    stack = tl.where(alive[None, None, :], stack, float("-inf"))
    top = tl.max(stack, axis=2)
    top = tl.where(top == float("-inf"), 0.0, top)
    stack = tl.exp(stack - top[:, :, None])
    total = tl.sum(stack, axis=2)
    stack = stack / tl.where(total == 0, 1.0, total)[:, :, None]
    if AFTER:
        stack = blend(stack, heads, heads, after_ptr, H)
    for head in range(H):
        weights = pick(stack, heads, head)
        s_at = summary_ptr + (image * H + head) * L * K
        s_at += marks[:, None] * K + cols[None, :]
        known = (marks < L)[:, None] & (cols < K)[None, :]
        summary = tl.load(s_at, mask=known, other=0.0)
        out = tl.dot(weights.to(summary.dtype), summary, input_precision="ieee")
        out_at = out_ptr + ((image * N + rows[:, None]) * H + head) * K + cols[None, :]
        tl.store(out_at, out, mask=here)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_marks: Tensor,
    k_marks: Tensor,
    scale: float,
    mixes: Mixes,
    kept: Tensor | None,
    marked: Tensor | None,
) -> Tensor:
    """Gather and read, see `manyheads.kernels.interactive.attend`.

    Cost: O(N L H (K + H)) time; besides the output, one summary [H, L, K] in float32
    for each run of at least 128 tokens.
    """
    B, N, H, K = q.shape
    L = q_marks.shape[1]
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if out.numel() == 0:
        return out
    sizes = (N, L, H, K, scale)
    options: dict[str, Any] = {
        "HEADS": triton.next_power_of_2(H),
        "BLOCK_L": max(16, triton.next_power_of_2(L)),
        "BLOCK_K": max(16, triton.next_power_of_2(K)),
        "BLOCK_N": BLOCK_N,
        "num_warps": 16,
        "enable_fp_fusion": True,
    }
    with on_device_of(q):
        keys = (q_marks, k, v, mixes.before_keys, mixes.after_keys, kept)
        summary = gather(*keys, sizes, options)
        before, after, flags = matrices(mixes.before_queries, mixes.after_queries, q)
        mask, mask_strides = masked(marked, q)
        blocks = triton.cdiv(N, BLOCK_N)
        _read_kernel[(B * blocks,)](
            q,
            k_marks,
            summary,
            before,
            after,
            mask,
            out,
            *sizes,
            blocks,
            *q.stride(),
            *k_marks.stride(),
            *mask_strides,
            MASKED=marked is not None,
            **flags,
            **options,
        )
    return out
