"""Hallucinated attention's two tools: blended tokens, and values of any width.

The slow twins are `manyheads.attention.blending.blend_maps`, which convolves maps in
place of tokens, and `manyheads.attention.softmax.softmax_maps` applied to the values.

On probabilities the values are wider than the queries. torch's fused attention on CPU
refuses that and builds the whole map in silence; `choose_form` picks what does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import register_flop_formula

from manyheads.kernels.registration import register_autocast
from manyheads.kernels.tracing import fuses_attention
from manyheads.kernels.two_widths import two_width_attention

__all__ = [
    "Form",
    "attend",
    "blend_tokens",
    "choose_form",
    "neighbours",
    "wide_attention",
]

Form = Literal["fused", "chunked", "padded", "calls", "triton", "flex"]

_BLOCK_ELEMENTS = 2**20
_BLOCK_ROWS = (64, 256)
_FLASH_WIDTH = 256


def blend_tokens(
    x: Tensor, kernel: Tensor, prefix: int, cells: tuple[int, int] | None
) -> Tensor:
    """Convolve tokens along the sequence or around the grid, one kernel per lane.

        out[n] = sum_t kernel[t] x[n + t - centre]        zeros beyond the ends

    Prefix tokens pass through the first term and are absent from the others, so that
    the sum over terms holds them once.

    Cost: one multiply-add a tap and feature; the only buffer is the output.

    Args:
        x: Tokens [B, N, L, T, W]; L and T may be 1 and are then shared.
        kernel: Taps of each lane and term [L, T, taps].
        prefix: Tokens at the start that are not blended.
        cells: Rows and columns of the others; None for the sequence.

    Returns:
        Blended tokens [B, N, L, T, W].
    """
    weights = kernel.to(x.dtype)[..., None].unbind(2)  # taps of [L, T, 1]
    B, N = x.shape[:2]
    rows, columns = cells or (N - prefix, 1)
    if torch.compiler.is_exporting():
        width = 1 if cells is None else math.isqrt(len(weights))
        return _blend_padded(x, weights, prefix, (rows, columns), width)
    blended = x * weights[len(weights) // 2]
    picture = blended[:, prefix:].view(B, rows, columns, *blended.shape[2:])
    source = x[:, prefix:].reshape(B, rows, columns, *x.shape[2:])
    square = cells is not None
    for tap, here, there in neighbours(len(weights), rows, columns, square=square):
        picture[:, *here].addcmul_(source[:, *there], weights[tap])
    if prefix:
        blended[:, :prefix, :, :1] = x[:, :prefix, :, :1]
        if kernel.shape[1] > 1:
            blended[:, :prefix, :, 1:] = 0
    return blended


def _blend_padded(
    x: Tensor, weights: Sequence[Tensor], prefix: int, size: tuple[int, int], width: int
) -> Tensor:
    """Convolve without writing into parts of a tensor: a slow scatter to ONNX."""
    (rows, columns), height = size, len(weights) // width
    picture = torch.unflatten(x[:, prefix:], 1, size)
    down, right = height // 2, width // 2
    padded = F.pad(picture, (0, 0, 0, 0, 0, 0, right, right, down, down))
    shifted = [
        padded[:, row : row + rows, column : column + columns]
        for row in range(height)
        for column in range(width)
    ]
    terms = (part * weight for part, weight in zip(shifted, weights, strict=True))
    blended = functools.reduce(torch.add, terms).flatten(1, 2)
    if not prefix:
        return blended
    kept = x[:, :prefix].expand(-1, -1, *blended.shape[2:])
    others = torch.zeros_like(kept[:, :, :, 1:])
    return torch.cat([torch.cat([kept[:, :, :, :1], others], dim=3), blended], dim=1)


def neighbours(
    taps: int, rows: int, columns: int, *, square: bool
) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
    """Pair cells of a picture with those under each tap, the centre left out.

    Args:
        taps: Taps of the kernel: a run down the rows, or a square.
        rows: Rows of the picture.
        columns: Columns of the picture.
        square: Whether taps lie in a square.

    Yields:
        A tap, the cells that have something under it, and what is under it.
    """
    width = math.isqrt(taps) if square else 1
    height = taps // width
    for tap in range(taps):
        down, right = tap // width - height // 2, tap % width - width // 2
        if (down or right) and abs(down) < rows and abs(right) < columns:
            here = _span(-down, rows), _span(-right, columns)
            yield tap, here, (_span(down, rows), _span(right, columns))


def _span(shift: int, size: int) -> slice:
    """Places that are still inside after a shift."""
    return slice(max(0, shift), size + min(0, shift))


def choose_form(q: Tensor, v: Tensor) -> Form:
    """Pick how to attend, by device, type and widths.

    Not asked on CPU in inference unless there is a mask or `cross_map`: there
    `hallucinated_whole.takes_whole` picks one operator with the blends.

    - "fused", one call of torch's attention: equal widths anywhere; unequal ones on
      CUDA in float32, where the memory-efficient kernel takes them, and in ONNX.
    - "padded", queries and keys filled with zeros up to the values' width: half types
      on CUDA, where only equal widths reach the flash kernel, and exported programs,
      which have plain operators only and would build the map on CPU otherwise.
    - "chunked", plain products over blocks of queries: everywhere else, measured on CPU
      by the case `wide_values_d768` of `benchmarks.run`.
    - "calls", one fused call per run of value features; "triton", our own kernel with
      two widths; "flex", torch's FlexAttention: only by name, to be measured.
    """
    narrow, wide = q.shape[-1], v.shape[-1]
    if narrow == wide:
        return "fused"
    if torch.compiler.is_exporting():
        return "padded" if fuses_attention() else "fused"
    if q.device.type == "cuda":
        half = q.dtype in (torch.float16, torch.bfloat16)
        return "padded" if half and max(narrow, wide) <= _FLASH_WIDTH else "fused"
    return "chunked"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float,
    *,
    form: Form | None = None,
) -> Tensor:
    """Mix values of any width: ``softmax(scale q k^T) v``.

    Cost: O(N S) time per feature; memory O(N + S) in every form and on every device
    on which torch's fused attention is fused.

    Args:
        q: Queries [B, N, H, E].
        k: Keys [B, S, H, E].
        v: Values [B, S, H, V], of the same type as q and k.
        key_mask: True for keys that count [B, S], or None for all.
        scale: Factor on query-key products.
        form: See `choose_form`, which decides if this is None.

    Returns:
        Mixed values [B, N, H, V].
    """
    form = form or choose_form(q, v)
    if form == "chunked":
        mixed: Tensor = wide_attention(q, k, v, key_mask, scale)
        return mixed
    if form == "triton":
        served: Tensor = two_width_attention(q, k, v, key_mask, scale)[0]
        return served
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    pairs = None if key_mask is None else key_mask[:, None, None, :]
    if form == "padded":
        return _padded(*heads_first, pairs, scale)
    if form == "calls":
        return _calls(*heads_first, pairs, scale)
    if form == "flex":
        return _flex(*heads_first, key_mask, scale)
    fused: Tensor = _fused(*heads_first, pairs, scale).transpose(1, 2)
    return fused


def _fused(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor | None, scale: float) -> Any:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=scale)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, pairs: Tensor | None, scale: float
) -> Tensor:
    """Fill the narrower side with zeros: they add nothing to a product."""
    narrow, wide = q.shape[-1], v.shape[-1]
    width = max(narrow, wide)
    q, k = (F.pad(x, (0, width - narrow)) for x in (q, k))
    mixed: Tensor = _fused(q, k, F.pad(v, (0, width - wide)), pairs, scale)
    return mixed[..., :wide].transpose(1, 2)


def _calls(
    q: Tensor, k: Tensor, v: Tensor, pairs: Tensor | None, scale: float
) -> Tensor:
    """Mix the value features in runs of the queries' width, maps built each time."""
    width = q.shape[-1]
    runs = [v[..., start : start + width] for start in range(0, v.shape[-1], width)]
    mixed = [_padded(q, k, run, pairs, scale) for run in runs]
    return torch.cat(mixed, dim=-1)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> Tensor:
    """Let torch write the kernel; the first call of each size compiles it."""
    modify = None
    if key_mask is not None:

        def modify(
            score: Tensor, b: Tensor, _: Tensor, __: Tensor, m: Tensor
        ) -> Tensor:
            return torch.where(key_mask[b, m], score, -math.inf)

    mixed: Tensor = _compiled_flex()(q, k, v, score_mod=modify, scale=scale)
    return mixed.transpose(1, 2)


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@torch.library.custom_op(
    "manyheads::wide_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale) -> Tensor",
)
def wide_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> Tensor:
    """Mix values of any width over blocks of queries; see `attend`.

    Cost: the largest temporary holds one block of rows of the maps of one image, at
    most 256 rows.
    """
    B, N, H, _ = q.shape
    out = v.new_empty(B, N, H, v.shape[-1])
    buffer = _buffer(q, k)
    for image, rows in _blocks(q, k):
        kept = None if key_mask is None else key_mask[image]
        maps = _block_maps(q[image, rows], k[image], kept, scale, buffer)
        values = v[image].transpose(0, 1)  # [H, S, V]
        out[image, rows] = torch.bmm(maps.to(v.dtype), values).transpose(0, 1)
    return out


@wide_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[-1])


@torch.library.custom_op(
    "manyheads::wide_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale)"
    " -> (Tensor, Tensor, Tensor)",
)
def wide_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of `wide_attention`; maps are built again, in blocks.

    With the map's rows p and their gradient g = grad v^T:

        dv = p^T grad    ds = scale p (g - <p, g>)    dq = ds k    dk = ds^T q
    """
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=_wide(k.dtype), device=k.device)
    dv = torch.zeros(v.shape, dtype=_wide(v.dtype), device=v.device)
    buffer = _buffer(q, k)
    for image, rows in _blocks(q, k):
        kept = None if key_mask is None else key_mask[image]
        maps = _block_maps(q[image, rows], k[image], kept, scale, buffer)
        above = grad[image, rows].transpose(0, 1)  # [H, n, V]
        narrow = maps.to(v.dtype)
        dv[image] += torch.bmm(narrow.transpose(1, 2), above).transpose(0, 1)
        pulled = torch.bmm(above, v[image].permute(1, 2, 0)).to(maps.dtype)
        inner = (maps * pulled).sum(dim=-1, keepdim=True)
        scores = pulled.sub_(inner).mul_(maps).mul_(scale).to(q.dtype)
        dq[image, rows] = torch.bmm(scores, k[image].transpose(0, 1)).transpose(0, 1)
        queries = q[image, rows].transpose(0, 1)
        dk[image] += torch.bmm(scores.transpose(1, 2), queries).transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@wide_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, key_mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, key_mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    q, k, v, key_mask = ctx.saved_tensors
    return *wide_attention_backward(grad, q, k, v, key_mask, ctx.scale), None, None


wide_attention.register_autograd(_backward, setup_context=_setup_context)
register_autocast("wide_attention", projected=3)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice]]:
    """Cut the queries of every image into blocks whose maps stay in the cache."""
    B, N = q.shape[:2]
    rows = _block_rows(q, k)
    for image in range(B):
        for start in range(0, N, rows):
            yield image, slice(start, min(N, start + rows))


def _block_rows(q: Tensor, k: Tensor) -> int:
    least, most = _BLOCK_ROWS
    return max(least, min(most, _BLOCK_ELEMENTS // max(1, q.shape[2] * k.shape[1])))


def _buffer(q: Tensor, k: Tensor) -> Tensor:
    """Make room for one block of maps, once: fresh memory costs a page fault a page."""
    rows = min(q.shape[1], _block_rows(q, k))
    return q.new_empty(q.shape[2] * rows * k.shape[1])


def _block_maps(
    q: Tensor, k: Tensor, kept: Tensor | None, scale: float, buffer: Tensor
) -> Tensor:
    """Build some rows of every head's map, [H, n, S]; softmax in float32 at least."""
    shape = q.shape[1], q.shape[0], k.shape[0]
    scores = buffer[: math.prod(shape)].view(shape)
    queries, keys = q.transpose(0, 1), k.permute(1, 2, 0)
    torch.baddbmm(scores, queries, keys, beta=0, alpha=scale, out=scores)
    scores = scores.to(_wide(scores.dtype))
    if kept is not None:
        scores.masked_fill_(~kept, torch.finfo(scores.dtype).min)
    maps = torch.softmax(scores, dim=-1, out=scores)
    return maps if kept is None else maps.masked_fill_(~kept, 0.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _pairs(q: Any, k: Any) -> int:
    B, N, H, _ = q
    return int(B) * int(N) * int(H) * int(k[1])


@register_flop_formula([torch.ops.manyheads.wide_attention])
def _flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """One product makes the maps, one applies them; two FLOPs a multiply-add."""
    return 2 * _pairs(q, k) * (int(q[-1]) + int(v[-1]))


@register_flop_formula([torch.ops.manyheads.wide_attention_backward])
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """The maps again, and two products for each of the two that forward made."""
    return 2 * _pairs(q, k) * (3 * int(q[-1]) + 2 * int(v[-1]))
