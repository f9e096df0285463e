"""The landmarks' side of interactive attention in Triton: values gathered in two steps.

    normalise   k        -> log sums [B, H, L]         of exp(scores) over tokens
    gather      k, v     -> summary [B, H, L, K]       partial sums, then a fixed order

Mixing needs the weights of all heads of a token at the same time, and nothing else of
other tokens once the log sums are known. So a program holds one stack

    [heads, landmarks, tokens]    16 x 64 x 16 float32 at most: 64 KiB of registers

mixes it there, and no weight is ever written to memory. Sums over tokens are split into
runs whose parts are added in a fixed order, without atomics.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.launching import masked

__all__ = ["BLOCK_N", "alive_at", "blend", "gather", "matrices", "pick", "put"]

BLOCK_N = 16
"""Tokens of one stack."""

# Output heads of one program of the gathering kernel: their sums stay in registers.
_GROUP = 4
# Each run of tokens writes its part of the summary, H L K float32.
_LEAST_RUN = 128
_PROGRAMS = 264


# The hook that checks types under test would hide the source from Triton.
@triton.jit
@no_type_check
def pick(stack, heads, head):
    """Take one head's matrix out of a stack."""
    return tl.sum(tl.where(heads[:, None, None] == head, stack, 0.0), axis=0)


@triton.jit
@no_type_check
def blend(stack, heads, members, matrix_ptr, H):
    """Mix all heads of a stack into some new ones."""
    mixed = tl.zeros((members.shape[0], stack.shape[1], stack.shape[2]), tl.float32)
    for head in range(H):
        place = matrix_ptr + members * H + head
        column = tl.load(place, mask=members < H, other=0.0).to(tl.float32)
        mixed += column[:, None, None] * pick(stack, heads, head)[None, :, :]
    return mixed


@triton.jit
@no_type_check
def put(stack, scores, heads, head, matrix_ptr, H, MIX: tl.constexpr):
    """Add one head's scores to a stack: in its place, or to all heads it speaks to."""
    if MIX:
        place = matrix_ptr + heads * H + head
        column = tl.load(place, mask=heads < H, other=0.0).to(tl.float32)
        stack += column[:, None, None] * scores[None, :, :]
    else:
        stack = tl.where(heads[:, None, None] == head, scores[None, :, :], stack)
    return stack


@triton.jit
@no_type_check
def alive_at(mask_ptr, image, places, count, mask_b, mask_n, MASKED: tl.constexpr):
    """Say which places exist and count."""
    alive = places < count
    if MASKED:
        at = mask_ptr + image * mask_b + places * mask_n
        alive = alive & (tl.load(at, mask=alive, other=0) != 0)
    return alive


@triton.jit
@no_type_check
def _key_scores(
    marks_ptr,
    k_ptr,
    before_ptr,
    rows,
    alive,
    heads,
    marks,
    cols,
    L,
    H,
    K,
    scale,
    m_l,
    m_h,
    m_d,
    k_n,
    k_h,
    k_d,
    BEFORE: tl.constexpr,
):
    """Score landmarks against some keys, all heads: [heads, landmarks, tokens]."""
    stack = tl.zeros((heads.shape[0], marks.shape[0], rows.shape[0]), tl.float32)
    there = (marks < L)[:, None] & (cols < K)[None, :]
    here = (cols < K)[:, None] & alive[None, :]
    for head in range(H):
        m_at = marks_ptr + head * m_h + marks[:, None] * m_l + cols[None, :] * m_d
        k_at = k_ptr + head * k_h + rows[None, :] * k_n + cols[:, None] * k_d
        left = tl.load(m_at, mask=there, other=0.0)
        right = tl.load(k_at, mask=here, other=0.0)
        scores = tl.dot(left, right, input_precision="ieee") * scale
        stack = put(stack, scores, heads, head, before_ptr, H, BEFORE)
    return tl.where(alive[None, None, :], stack, float("-inf"))


@triton.jit
@no_type_check
def _normalise_kernel(
    marks_ptr,
    k_ptr,
    before_ptr,
    mask_ptr,
    log_ptr,
    N,
    L,
    H,
    K,
    scale,
    run,
    splits,
    m_b,
    m_l,
    m_h,
    m_d,
    k_b,
    k_n,
    k_h,
    k_d,
    mask_b,
    mask_n,
    BEFORE: tl.constexpr,
    MASKED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Give the log of the sum of exp(scores) over one run of tokens."""
    image = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    heads = tl.arange(0, HEADS)
    marks = tl.arange(0, BLOCK_L)
    cols = tl.arange(0, BLOCK_K)
    top = tl.full((HEADS, BLOCK_L), float("-inf"), tl.float32)
    total = tl.zeros((HEADS, BLOCK_L), tl.float32)
    for start in range(0, run, BLOCK_N):
        rows = split * run + start + tl.arange(0, BLOCK_N)
        alive = alive_at(mask_ptr, image, rows, N, mask_b, mask_n, MASKED)
        stack = _key_scores(
            marks_ptr + image * m_b,
            k_ptr + image * k_b,
            before_ptr,
            rows,
            alive,
            heads,
            marks,
            cols,
            L,
            H,
            K,
            scale,
            m_l,
            m_h,
            m_d,
            k_n,
            k_h,
            k_d,
            BEFORE,
        )
        higher = tl.maximum(top, tl.max(stack, axis=2))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe)
        total += tl.sum(tl.exp(stack - safe[:, :, None]), axis=2)
        top = higher
    known = total > 0
    log = tl.where(known, top + tl.log(tl.where(known, total, 1.0)), float("-inf"))
    place = (tl.program_id(0).to(tl.int64) * H + heads[:, None]) * L + marks[None, :]
    tl.store(log_ptr + place, log, mask=(heads < H)[:, None] & (marks < L)[None, :])


@triton.jit
@no_type_check
def _gather_kernel(
    marks_ptr,
    k_ptr,
    v_ptr,
    before_ptr,
    after_ptr,
    mask_ptr,
    log_ptr,
    partial_ptr,
    N,
    L,
    H,
    K,
    scale,
    run,
    splits,
    m_b,
    m_l,
    m_h,
    m_d,
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
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    MASKED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum weighted values over one run of tokens, for a group of heads."""
    image = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    first = tl.program_id(1) * GROUP
    heads = tl.arange(0, HEADS)
    group = tl.arange(0, GROUP)
    marks = tl.arange(0, BLOCK_L)
    cols = tl.arange(0, BLOCK_K)
    known = (heads < H)[:, None] & (marks < L)[None, :]
    log_at = log_ptr + (image * H + heads[:, None]) * L + marks[None, :]
    log = tl.load(log_at, mask=known, other=0.0)
    log = tl.where(log == float("-inf"), 0.0, log)
    total = tl.zeros((GROUP, BLOCK_L, BLOCK_K), tl.float32)
    for start in range(0, run, BLOCK_N):
        rows = split * run + start + tl.arange(0, BLOCK_N)
        alive = alive_at(mask_ptr, image, rows, N, mask_b, mask_n, MASKED)
        stack = _key_scores(
            marks_ptr + image * m_b,
            k_ptr + image * k_b,
            before_ptr,
            rows,
            alive,
            heads,
            marks,
            cols,
            L,
            H,
            K,
            scale,
            m_l,
            m_h,
            m_d,
            k_n,
            k_h,
            k_d,
            BEFORE,
        )
        stack = tl.exp(stack - log[:, :, None])
        members = group
        if AFTER:
            stack = blend(stack, heads, first + group, after_ptr, H)
        else:
            members = heads - first
        here = alive[:, None] & (cols < K)[None, :]
        for member in range(GROUP):
            if first + member < H:
                weights = pick(stack, members, member)
                head = (first + member).to(tl.int64)
                v_at = v_ptr + image * v_b + head * v_h
                v_at += rows[:, None] * v_n + cols[None, :] * v_d
                v = tl.load(v_at, mask=here, other=0.0)
                part = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
                mine = group[:, None, None] == member
                total += tl.where(mine, part[None, :, :], 0.0)
    new = (first + group)[:, None, None]
    marks_at, cols_at = marks[None, :, None], cols[None, None, :]
    place = (tl.program_id(0).to(tl.int64) * H + new) * L + marks_at
    inside = (new < H) & (marks_at < L) & (cols_at < K)
    tl.store(partial_ptr + place * K + cols_at, total, mask=inside)


def gather(
    q_marks: Tensor,
    k: Tensor,
    v: Tensor,
    before_keys: Tensor | None,
    after_keys: Tensor | None,
    kept: Tensor | None,
    sizes: tuple[int | float, ...],
    options: dict[str, Any],
) -> Tensor:
    """Give the landmarks' summary of the values [B, H, L, K], in the values' type.

    Cost: reads k twice and v once from memory, and k again from the caches for every
    group of four heads; writes one summary in float32 for each run of tokens.
    """
    B, N, H, K = k.shape
    L = q_marks.shape[1]
    run, splits, groups = _runs(B, N, H)
    before, after, flags = matrices(before_keys, after_keys, k)
    mask, mask_strides = masked(kept, k)
    log = k.new_empty(B, splits, H, L, dtype=torch.float32)
    partial = k.new_empty(B, splits, H, L, K, dtype=torch.float32)
    _normalise_kernel[(B * splits,)](
        q_marks,
        k,
        before,
        mask,
        log,
        *sizes,
        run,
        splits,
        *q_marks.stride(),
        *k.stride(),
        *mask_strides,
        BEFORE=flags["BEFORE"],
        MASKED=kept is not None,
        **options,
    )
    _gather_kernel[(B * splits, groups)](
        q_marks,
        k,
        v,
        before,
        after,
        mask,
        log.logsumexp(dim=1),
        partial,
        *sizes,
        run,
        splits,
        *q_marks.stride(),
        *k.stride(),
        *v.stride(),
        *mask_strides,
        MASKED=kept is not None,
        GROUP=_GROUP,
        **flags,
        **options,
    )
    return partial.sum(dim=1).to(v.dtype)


def _runs(B: int, N: int, H: int) -> tuple[int, int, int]:
    """Share tokens out: tokens a run, runs an image, groups of heads."""
    groups = triton.cdiv(H, _GROUP)
    wanted = min(triton.cdiv(N, _LEAST_RUN), triton.cdiv(_PROGRAMS, B * groups))
    run = BLOCK_N * triton.cdiv(triton.cdiv(N, BLOCK_N), wanted)
    return run, triton.cdiv(N, run), groups


def matrices(
    before: Tensor | None, after: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor, dict[str, bool]]:
    """Lay the mixes out for the kernels; what lacks is a pointer never followed."""
    flags = {"BEFORE": before is not None, "AFTER": after is not None}
    first = like if before is None else before.contiguous()
    second = like if after is None else after.contiguous()
    return first, second, flags
