"""Hallucinated attention on probabilities as one operator, image by image.

`manyheads.kernels.hallucinated` has the same in pieces, which autograd can follow: a
blend of all values, one attention, a blend of all outputs. Between the pieces lie
copies as large as the batch. Here every step takes one image, whose tensors stay in the
cache, and writes where the next one reads. The slow twin is
`manyheads.attention.blending.hallucinated_maps` applied to the values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from manyheads.kernels.hallucinated import neighbours
from manyheads.kernels.registration import register_autocast

__all__ = ["hallucinated_attention", "takes_whole"]

_BLOCK_ELEMENTS = 2**19


def takes_whole(*tensors: Tensor) -> bool:
    """Say whether one operator serves this call, or the pieces must.

    It does on CPU where no gradient is asked for: it was faster than the pieces at
    every size that was measured. An exported program must run where this package is
    not installed, and a GPU has attention kernels of its own.
    """
    if torch.compiler.is_exporting() or tensors[0].device.type != "cpu":
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


@torch.library.custom_op(
    "manyheads::hallucinated_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor query_kernel, Tensor key_kernel,"
    " int[] served, int prefix, int[]? cells, float scale) -> Tensor",
)
def hallucinated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_kernel: Tensor,
    key_kernel: Tensor,
    served: Sequence[int],
    prefix: int,
    cells: Sequence[int] | None,
    scale: float,
) -> Tensor:
    """Mix values by real maps and by blends of them; there is no gradient.

    Cost: O(N S) time per feature. The largest temporaries are one image's widened
    values and outputs, and one block of at most two MiB of maps in float32.

    Args:
        q: Queries [B, N, real heads, E].
        k: Keys [B, S, real heads, E].
        v: Values [B, S, H, V], those of the real heads first.
        query_kernel: Taps over queries [hallucinated heads, terms, taps].
        key_kernel: Taps over keys, of the same shape.
        served: How many hallucinated heads each real one serves: the first so many
            the first, and so on.
        prefix: Tokens at the start that are not blended.
        cells: Rows and columns of the others; None for the sequence.
        scale: Factor on query-key products.

    Returns:
        Mixed values [B, N, H, V].
    """
    real = q.shape[2]
    out = v.new_empty(*q.shape[:2], *v.shape[2:])
    for run in _runs(served):
        room = _make_room(q, v, run, query_kernel.shape[1])
        widen = _plans(key_kernel.flip(-1), v, run, v.shape[1] - prefix, cells)
        narrow = _plans(query_kernel, v, run, q.shape[1] - prefix, cells)
        shape = run.num_heads, run.each
        behind = slice(real + run.derived.start, real + run.derived.stop)
        for image in range(len(q)):
            source = torch.unflatten(v[image, :, behind], 1, shape)
            room.values[:, :, 0] = v[image, :, run.heads]
            for term, plan in enumerate(widen):
                lane = room.lanes[:, :, :, term]
                if prefix:
                    lane[:prefix] = 0 if term else source[:prefix]
                _blend(lane[prefix:], source[prefix:], plan, add=False)
            _attend(q[image, :, run.heads], k[image, :, run.heads], room, scale)
            goal = torch.unflatten(out[image, :, behind], 1, shape)
            out[image, :, run.heads] = room.mixed[:, :, 0]
            if prefix:
                goal[:prefix] = room.mixed_lanes[:prefix, :, :, 0]
            for term, plan in enumerate(narrow):
                lane = room.mixed_lanes[prefix:, :, :, term]
                _blend(goal[prefix:], lane, plan, add=term > 0)
    return out


@hallucinated_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(*q.shape[:2], *v.shape[2:])


register_autocast("hallucinated_attention", projected=3)


@register_flop_formula([torch.ops.manyheads.hallucinated_attention])
def _flops(q: Any, k: Any, v: Any, query_kernel: Any, *_: Any, **__: Any) -> int:
    """One product makes the real maps, one applies them to values and lanes."""
    B, N, real, width = q
    features = real * (width + v[-1]) + query_kernel[0] * query_kernel[1] * v[-1]
    return 2 * int(B * N * k[1] * features)


class _Run(NamedTuple):
    """Real heads in a row that serve as many hallucinated ones each, with those."""

    heads: slice
    derived: slice
    each: int

    @property
    def num_heads(self) -> int:
        return int(self.heads.stop - self.heads.start)


def _runs(served: Sequence[int]) -> Iterator[_Run]:
    first = behind = 0
    for each, members in itertools.groupby(served):
        count = len(list(members))
        derived = slice(behind, behind + count * each)
        yield _Run(slice(first, first + count), derived, each)
        first, behind = first + count, derived.stop


class _Room(NamedTuple):
    """Memory for one image, used again for the next: fresh memory faults in by pages.

    Attributes:
        wide: Values with their lanes [heads, S, (1 + lanes) V], as products take them.
        values: The same by token [S, heads, 1 + lanes, V].
        lanes: The lanes among them [S, heads, hallucinated heads of each, terms, V].
        out: What the maps make of `wide` [heads, N, (1 + lanes) V].
        mixed: The same by token.
        mixed_lanes: The lanes among them.
        scores: One block of maps.
    """

    wide: Tensor
    values: Tensor
    lanes: Tensor
    out: Tensor
    mixed: Tensor
    mixed_lanes: Tensor
    scores: Tensor


def _make_room(q: Tensor, v: Tensor, run: _Run, terms: int) -> _Room:
    lanes = 1 + run.each * terms
    wide, out = (
        v.new_empty(run.num_heads, tokens, lanes, v.shape[-1])
        for tokens in (v.shape[1], q.shape[1])
    )
    values, mixed = wide.transpose(0, 1), out.transpose(0, 1)
    heads, rows = _block(run.num_heads, q.shape[1], v.shape[1])
    beside = run.each, terms
    return _Room(
        wide=wide.flatten(2),
        values=values,
        lanes=torch.unflatten(values[:, :, 1:], 2, beside),
        out=out.flatten(2),
        mixed=mixed,
        mixed_lanes=torch.unflatten(mixed[:, :, 1:], 2, beside),
        scores=q.new_empty(heads * rows * v.shape[1]),
    )


def _block(heads: int, queries: int, keys: int) -> tuple[int, int]:
    """Say of how many heads, and of how many queries, maps are built at a time.

    Whole maps of several heads where they are small, some rows of one where they are
    large.
    """
    fitting = _BLOCK_ELEMENTS // max(1, queries * keys)
    if fitting:
        return min(heads, fitting), queries
    return 1, max(1, _BLOCK_ELEMENTS // keys)


def _attend(q: Tensor, k: Tensor, room: _Room, scale: float) -> None:
    """Mix the values of one image, block by block of its maps; softmax in float32."""
    (N, H), S = q.shape[:2], len(k)
    queries, keys = q.transpose(0, 1), k.permute(1, 2, 0)
    heads, rows = _block(H, N, S)
    for head, row in itertools.product(range(0, H, heads), range(0, N, rows)):
        at = slice(head, head + heads), slice(row, row + rows)
        some = queries[at]
        shape = *some.shape[:2], S
        scores = room.scores[: math.prod(shape)].view(shape)
        torch.baddbmm(scores, some, keys[at[0]], beta=0, alpha=scale, out=scores)
        maps = scores if scores.dtype is torch.float64 else scores.float()
        torch.softmax(maps, dim=-1, out=maps)
        torch.bmm(maps.to(q.dtype), room.wide[at[0]], out=room.out[at])


class _Plan(NamedTuple):
    """How one term blends a picture: shifted copies, each with a weight a feature.

    Attributes:
        size: Rows and columns of the picture.
        centre: Weight of what stays in its place.
        shifts: Weights, where they act, and what they act on.
    """

    size: tuple[int, int]
    centre: Tensor
    shifts: list[tuple[Tensor, tuple[slice, slice], tuple[slice, slice]]]


def _plans(
    kernel: Tensor, v: Tensor, run: _Run, tokens: int, cells: Sequence[int] | None
) -> list[_Plan]:
    """Spread each term's taps over the features, which is faster than to broadcast."""
    rows, columns = cells or (tokens, 1)
    of_run = kernel[run.derived].to(v.dtype)[..., None]
    spread = of_run.expand(-1, -1, -1, v.shape[-1]).contiguous()
    plans = []
    for taps in torch.unflatten(spread, 0, (run.num_heads, run.each)).unbind(2):
        weights = taps.unbind(2)
        found = neighbours(len(weights), rows, columns, square=cells is not None)
        shifts = [(weights[tap], here, there) for tap, here, there in found]
        plans.append(_Plan((rows, columns), weights[len(weights) // 2], shifts))
    return plans


def _blend(out: Tensor, x: Tensor, plan: _Plan, *, add: bool) -> None:
    """Convolve tokens [N, ..., V] by one term, into or onto `out`."""
    if add:
        out.addcmul_(x, plan.centre)
    else:
        torch.mul(x, plan.centre, out=out)
    goal, source = (torch.unflatten(y, 0, plan.size) for y in (out, x))
    for weight, here, there in plan.shifts:
        goal[here].addcmul_(source[there], weight)
