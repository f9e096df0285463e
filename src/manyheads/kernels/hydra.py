"""Hydra's core as one operator: few passes over memory, recomputing backward.

The slow twin is `manyheads.attention.hydra.hydra_attention` with the cosine kernel.

Bolya et al., "Hydra Attention: Efficient Attention with Many Heads", 2022,
arXiv 2209.07484.

The work is bound by memory, not by arithmetic: what counts is how often q, k and v are
read from it and how many fresh buffers are written. `choose_form` picks between two
forms that do the same. On a GPU Triton kernels read each input once, see
`manyheads.kernels.triton_hydra`. Elsewhere few passes of plain operators do: the
lengths of the vectors are kept as one number per token instead of dividing whole
tensors, the sum over tokens is a matrix-vector product with those numbers, and the
product of k and v is made in the memory of the output. Half types need a float32
buffer instead: that of one tile.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from manyheads.kernels.registration import has_triton, register_autocast

__all__ = ["Form", "choose_form", "hydra", "hydra_into", "tiles", "use_operator"]

Form = Literal["triton", "passes"]

# One tile of the Triton kernels holds a whole token.
_WIDEST = 8192
# Bytes of one float32 tile: it bounds the buffer, and is so large that six operations
# a tile cost nothing beside it.
_TILE_BYTES = 64 * 2**20
# Long images go by in tiles that stay in the caches of the threads from one operation
# to the next; shorter ones fit the last cache as a whole. The price is paid on a busy
# machine, where the threads wait for each other after every operation.
_CACHED_TILE_BYTES, _CACHED_FROM_BYTES = 2**19, 2**22

_Tile = tuple[slice, slice]


def use_operator() -> bool:
    """Say whether the operator serves here; exported graphs get plain operators.

    An exported program must run where this package is not installed.
    """
    return not torch.compiler.is_exporting()


def tiles(x: Tensor) -> list[_Tile]:
    """Choose the formulation: which images and tokens are worked on at a time.

    A tile is several whole images, or a run of tokens where one image is too long.
    `benchmarks/tile_sizes.py` measures which size wins on a machine.

    Args:
        x: A tensor [B, N, D].
    """
    B, N, D = x.shape
    cached = torch.get_num_threads() * _CACHED_TILE_BYTES
    num_bytes = cached if 4 * N * D > _CACHED_FROM_BYTES else _TILE_BYTES
    num_tokens = max(1, num_bytes // (4 * max(1, D)))
    length = max(1, min(N, num_tokens))
    group = num_tokens // length
    return [
        (slice(b, min(b + group, B)), slice(n, min(n + length, N)))
        for b in range(0, B, group)
        for n in range(0, N, length)
    ]


def choose_form(q: Tensor) -> Form:
    """Pick who does the work, by device and width.

    - "triton", kernels that read each input once: on CUDA, for widths up to 8,192.
    - "passes", plain operators: everywhere else, and where Triton is not installed.
    """
    if q.device.type == "cuda" and q.shape[-1] <= _WIDEST and has_triton():
        return "triton"
    return "passes"


def hydra(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Let every token read one summary of the image, gated feature by feature.

        summary = sum_m unit(k_m) * v_m        out_n = unit(q_n) * summary

    Cost: O(B N D) time. Nothing large is allocated but the output, and, for half types
    off the GPU, one tile in float32 beside it. Backward keeps the inputs and the
    summary, one vector an image; lengths are computed again.

    Args:
        q: Projected queries [B, N, D]; any strides, a packed projection is read in
            place.
        k: Projected keys [B, S, D].
        v: Projected values [B, S, D], of the same type as q and k.
        key_mask: True for tokens that enter the sum [B, S], or None for all.

    Returns:
        Mixed tokens [B, N, D], contiguous.
    """
    out: Tensor = hydra_and_summary(q, k, v, key_mask)[0]
    return out


@torch.library.custom_op(
    "manyheads::hydra",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? key_mask) -> (Tensor, Tensor)",
)
def hydra_and_summary(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Do what `hydra` does and give the summary [B, D] too, in the type of sums."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, _fill(out, q, k, v, key_mask)


@hydra_and_summary.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    summary = torch.empty(
        (k.shape[0], k.shape[2]), dtype=_wide(q.dtype), device=q.device
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, summary


def hydra_into(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None
) -> Tensor:
    """Do what `hydra` does in memory that is there already: no gradient, no operator.

    Fresh memory is not free: tensors above 32 MiB go back to the system when they are
    dropped (glibc's limit), and each new one faults in page by page.

    Args:
        out: Contiguous [B, N, D] of the type of q, sharing memory with none of the
            others; overwritten, and returned.
        q: As for `hydra`.
        k: As for `hydra`.
        v: As for `hydra`.
        key_mask: As for `hydra`.
    """
    _fill(out, q, k, v, key_mask)
    return out


def _fill(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None
) -> Tensor:
    """Write the mixed tokens to `out` and give the summary [B, D]."""
    if choose_form(q) == "triton":
        # With the kernels comes Triton, which not every device and user has.
        from manyheads.kernels import triton_hydra

        return triton_hydra.forward(out, q, k, v, key_mask)
    buffer = _buffer(out, q, k)
    summary = _summary(k, v, key_mask, buffer)
    _gate(q, summary, None, buffer, out)
    return summary.squeeze(1)


@torch.library.custom_op(
    "manyheads::hydra_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor grad_summary, Tensor q, Tensor k, Tensor v, "
    "Tensor? key_mask, Tensor summary) -> (Tensor, Tensor, Tensor)",
)
def hydra_backward(
    grad: Tensor,
    grad_summary: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    summary: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of `hydra_and_summary`; lengths are computed again.

    With a = unit(q), b = unit(k), s = summary and t = grad_s + sum_n a_n * grad_n:

        dq = (grad * s - a <a, grad * s>) / |q|
        dk = (t * v - b <b, t * v>) / |k|           dv = t * b
    """
    if choose_form(q) == "triton":
        from manyheads.kernels import triton_hydra

        sums = grad_summary.contiguous(), summary.contiguous()
        return triton_hydra.backward(grad, q, k, v, key_mask, *sums)
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)
    )
    buffer = _buffer(dv, q, k)
    gathered = _summary(q, grad, None, buffer).add_(grad_summary[:, None])
    _through_unit(grad, q, summary[:, None], None, buffer, dq)
    _through_unit(v, k, gathered, key_mask, buffer, dk)
    _gate(k, gathered, key_mask, buffer, dv)
    return dq, dk, dv


@hydra_backward.register_fake
def _(
    grad: Tensor,
    grad_summary: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    summary: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    def fresh(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return fresh(q), fresh(k), fresh(v)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, key_mask = inputs
    ctx.save_for_backward(q, k, v, key_mask, output[1])


def _backward(
    ctx: Any, grad: Tensor, grad_summary: Tensor
) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, key_mask, summary = ctx.saved_tensors
    return *hydra_backward(grad, grad_summary, q, k, v, key_mask, summary), None


hydra_and_summary.register_autograd(_backward, setup_context=_setup_context)
register_autocast("hydra", projected=3)


def _summary(x: Tensor, y: Tensor, key_mask: Tensor | None, buffer: Tensor) -> Tensor:
    """Sum unit(x_n) * y_n over tokens, in the buffer's type: [B, 1, D]."""
    summary = buffer.new_zeros(x.shape[0], 1, x.shape[2])
    for tile in tiles(x):
        part = x[tile]
        room = _room(buffer, part)
        if room.dtype is part.dtype:
            # The product streams both in, and the lengths then find x in the cache; the
            # other way round is slower.
            product = torch.mul(part, y[tile], out=room)
            weight = _inverse_length(part, key_mask, tile)
        else:
            weight = _inverse_length(room.copy_(part), key_mask, tile)
            product = room.mul_(y[tile])
        if key_mask is not None:
            # What is masked may hold anything, and zero times infinity is not zero.
            product.masked_fill_(~key_mask[tile][..., None], 0.0)
        summary[tile[0]].baddbmm_(weight[:, None], product)
    return summary


def _gate(
    x: Tensor,
    factor: Tensor,
    key_mask: Tensor | None,
    buffer: Tensor,
    out: Tensor,
) -> None:
    """Write unit(x_n) * factor to `out`."""
    for tile in tiles(x):
        # In half types 1 / |x| alone may overflow; the product, in `room`, does not.
        wide = out[tile]
        if wide.dtype is not buffer.dtype:
            wide = _room(buffer, wide)
        # A copy streams x in fastest; what follows finds it in the cache.
        weight = _inverse_length(wide.copy_(x[tile]), key_mask, tile)
        wide.mul_(factor[tile[0]]).mul_(weight[..., None])
        if out.dtype is not wide.dtype:
            out[tile].copy_(wide)


def _through_unit(
    grad: Tensor,
    x: Tensor,
    factor: Tensor,
    key_mask: Tensor | None,
    buffer: Tensor,
    out: Tensor,
) -> None:
    """Pull grad * factor back through ``x / |x|`` and write it to `out`."""
    for tile in tiles(x):
        room = _room(buffer, x[tile])
        wide = x[tile].to(room.dtype)
        pulled = out[tile] if out.dtype is room.dtype else room
        torch.mul(grad[tile], factor[tile[0]], out=pulled)
        weight = _inverse_length(wide, key_mask, tile)
        along = torch.linalg.vecdot(wide, pulled).mul_(weight).mul_(weight)
        pulled.addcmul_(wide, along[..., None], value=-1).mul_(weight[..., None])
        if pulled is room:
            out[tile].copy_(room)


def _inverse_length(x: Tensor, key_mask: Tensor | None, tile: _Tile) -> Tensor:
    """Invert the length of each vector; zero vectors and masked tokens get zero."""
    weight: Tensor = torch.linalg.vector_norm(x, dim=-1).reciprocal_()
    weight.nan_to_num_(nan=math.nan, posinf=0.0)
    if key_mask is not None:
        weight.masked_fill_(~key_mask[tile], 0.0)
    return weight


def _buffer(out: Tensor, *tensors: Tensor) -> Tensor:
    """Find room for one tile in the type of sums: what is overwritten last, or new."""
    sizes = (x[tile].numel() for x in tensors for tile in tiles(x)[:1])
    largest = max(sizes, default=0)
    if out.dtype in (torch.float32, torch.float64) and out.numel() >= largest:
        return out.view(-1)
    return torch.empty(largest, dtype=_wide(out.dtype), device=out.device)


def _room(buffer: Tensor, x: Tensor) -> Tensor:
    """Shape the front of the buffer like one tile."""
    return buffer[: x.numel()].view(x.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Name the type of sums."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@register_flop_formula([torch.ops.manyheads.hydra])
def _flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    """One multiply-add a feature and key, one a feature and query, 2 FLOPs each."""
    B, N, D = q
    return 2 * int(B) * (int(N) + int(k[1])) * int(D)


@register_flop_formula([torch.ops.manyheads.hydra_backward])
def _backward_flops(grad: Any, _: Any, q: Any, k: Any, *__: Any, **___: Any) -> int:
    """The transposed sum, and the gates of the three gradients."""
    B, N, D = grad
    return 2 * int(B) * (2 * int(N) + 2 * int(k[1])) * int(D)
