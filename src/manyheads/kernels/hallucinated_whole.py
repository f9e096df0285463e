"""Hallucinated attention on probabilities as one operator, lot by lot.

`manyheads.kernels.hallucinated` has the same in pieces, which autograd can follow: a
blend of all values, one attention, a blend of all outputs. Between the pieces lie
copies as large as the batch. Here every step takes one lot, the heads of an image or
one head of all images, whose tensors stay in the cache, and writes where the next one
reads. The slow twin is
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

# Elements of maps that a thread builds at a time: whole ones up to the first, rows of
# one up to the second. With 2**19 for both, and one map at a time for all threads, 577
# tokens took 1.05 and 8,161 tokens 1.2 times as long (two threads, 6 and 3 real heads).
_WHOLE_ELEMENTS, _ROWS_ELEMENTS = 2**19, 2**21


def takes_whole(*tensors: Tensor) -> bool:
    """Say whether one operator serves this call, or the pieces must.

    Where the pieces serve, `manyheads.kernels.hallucinated.choose_form` picks how.
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

    Cost: O(N S) time per feature. The largest temporaries are one lot's widened values
    and outputs, and a block of maps: at most eight MiB a thread in float32.

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
    out = v.new_empty(*q.shape[:2], *v.shape[2:])
    for run in _runs(served, q.shape[2]):
        lots = _by_lot(run, q, k, v, out)
        room = _make_room(lots, run.each, query_kernel.shape[1])
        among, to = v.shape[1] - prefix, q.shape[1] - prefix
        wideners = _plans(key_kernel, run, lots, among, cells, mirrored=True)
        narrowers = _plans(query_kernel, run, lots, to, cells)
        for lot, (widen, narrow) in enumerate(zip(wideners, narrowers, strict=True)):
            room.values.copy_(lots.v[lot])
            _widen(room.lanes, lots.source[lot], widen, prefix)
            _attend(lots.q[lot], lots.k[lot], room, scale)
            lots.out[lot].copy_(room.mixed)
            _narrow(lots.goal[lot], room.mixed_lanes, narrow, prefix)
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
    behind: slice
    each: int

    @property
    def num_heads(self) -> int:
        return int(self.heads.stop - self.heads.start)


def _runs(served: Sequence[int], real: int) -> Iterator[_Run]:
    first = derived = 0
    for each, members in itertools.groupby(served):
        count = len(list(members))
        stop = derived + count * each
        behind = slice(real + derived, real + stop)
        yield _Run(slice(first, first + count), slice(derived, stop), behind, each)
        first, derived = first + count, stop


class _Lots(NamedTuple):
    """Views by lot: the heads of one image, or one head of all images.

    Attributes:
        q: Queries [lots, maps, N, E].
        k: Keys [lots, maps, S, E].
        v: Values of the real heads [lots, maps, S, V].
        source: Values of those that each real head serves [lots, maps, S, each, V].
        out: Where the real heads write [lots, maps, N, V].
        goal: Where the others do [lots, maps, N, each, V].
        by_head: Whether a lot is a head.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    source: Tensor
    out: Tensor
    goal: Tensor
    by_head: bool


def _by_lot(run: _Run, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> _Lots:
    """Make lots that fill the threads: images, or heads where there are fewer.

    Three real heads on two threads take as long as four. With eight images of 197
    tokens a lot for each head took 0.73 of the time of a lot for each image; with six
    real heads, 1.05 of it.
    """
    uneven = run.num_heads % torch.get_num_threads() != 0
    by_head = uneven and len(q) > run.num_heads
    first = (2, 0, 1) if by_head else (0, 2, 1)
    shape = run.num_heads, run.each
    plain = (x[:, :, run.heads].permute(*first, 3) for x in (q, k, v, out))
    served = (
        torch.unflatten(x[:, :, run.behind], 2, shape).permute(*first, 3, 4)
        for x in (v, out)
    )
    queries, keys, values, own = plain
    source, goal = served
    return _Lots(queries, keys, values, source, own, goal, by_head)


class _Room(NamedTuple):
    """Memory for one lot, used again for the next: fresh memory faults in by pages.

    Attributes:
        wide: Values with their lanes [maps, S, (1 + lanes) V], as products take them.
        values: The real heads' own [maps, S, V].
        lanes: The lanes among them [maps, S, hallucinated heads of each, terms, V].
        out: What the maps make of `wide` [maps, N, (1 + lanes) V].
        mixed: The real heads' own [maps, N, V].
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


def _make_room(lots: _Lots, each: int, terms: int) -> _Room:
    q, v = lots.q[0], lots.v[0]
    (maps, N), (S, width) = q.shape[:2], v.shape[1:]
    wide, out = (v.new_empty(maps, n, 1 + each * terms, width) for n in (S, N))
    at_once, rows = _block(maps, N, S)
    beside = each, terms
    return _Room(
        wide=wide.flatten(2),
        values=wide[:, :, 0],
        lanes=torch.unflatten(wide[:, :, 1:], 2, beside),
        out=out.flatten(2),
        mixed=out[:, :, 0],
        mixed_lanes=torch.unflatten(out[:, :, 1:], 2, beside),
        scores=q.new_empty(at_once * rows * S),
    )


def _block(maps: int, queries: int, keys: int) -> tuple[int, int]:
    """Say how many maps, and how many of their queries, are built at a time.

    Several whole maps a thread where they are small, some rows of one where they are
    large. An odd one out would leave threads idle: three maps on two threads take as
    long as four.
    """
    threads = torch.get_num_threads()
    whole = _WHOLE_ELEMENTS // max(1, queries * keys)
    if whole:
        return min(maps, whole * threads), queries
    return min(maps, threads), min(queries, max(1, _ROWS_ELEMENTS // keys))


def _attend(q: Tensor, k: Tensor, room: _Room, scale: float) -> None:
    """Mix the values of one lot, block by block of its maps; softmax in float32."""
    (lot, N), S = q.shape[:2], k.shape[1]
    keys = k.mT
    maps, rows = _block(lot, N, S)
    for first, row in itertools.product(range(0, lot, maps), range(0, N, rows)):
        some = slice(first, first + maps)
        queries, out = q[some, row : row + rows], room.out[some, row : row + rows]
        shape = *queries.shape[:2], S
        scores = room.scores[: math.prod(shape)].view(shape)
        torch.baddbmm(scores, queries, keys[some], beta=0, alpha=scale, out=scores)
        wide = scores if scores.dtype is torch.float64 else scores.float()
        torch.softmax(wide, dim=-1, out=wide)
        torch.bmm(wide.to(q.dtype), room.wide[some], out=out)


class _Plan(NamedTuple):
    """How one term blends pictures: shifted copies, each with a weight a feature.

    Attributes:
        size: Rows and columns of a picture.
        centre: Weight of what stays in its place.
        shifts: Weights, where they act, and what they act on.
    """

    size: tuple[int, int]
    centre: Tensor
    shifts: Sequence[tuple[Tensor, tuple[slice, ...], tuple[slice, ...]]]


def _plans(
    kernel: Tensor,
    run: _Run,
    lots: _Lots,
    tokens: int,
    cells: Sequence[int] | None,
    *,
    mirrored: bool = False,
) -> list[list[_Plan]]:
    """Plan the terms of every lot.

    Each tap is spread over the features, which is faster than to broadcast it.

    Args:
        kernel: Taps [hallucinated heads, terms, taps].
        run: Which heads.
        lots: What is blended.
        tokens: How many are.
        cells: Rows and columns of them; None for the sequence.
        mirrored: Whether the taps go the other way, as those over keys do on values.
    """
    rows, columns = cells or (tokens, 1)
    width = lots.v.shape[-1]
    spread = kernel[run.derived].to(lots.v.dtype).permute(1, 2, 0)[..., None]
    spread = spread.expand(-1, -1, -1, width).contiguous()
    # Pictures are [maps, rows, columns, each, V].
    spread = spread.view(*spread.shape[:2], run.num_heads, 1, 1, run.each, width)
    terms = [term.unbind() for term in spread.unbind()]
    if mirrored:
        terms = [taps[::-1] for taps in terms]
    found = [
        (tap, (slice(None), *here), (slice(None), *there))
        for tap, here, there in neighbours(
            kernel.shape[-1], rows, columns, square=cells is not None
        )
    ]

    def plan(taps: Sequence[Tensor]) -> _Plan:
        shifts = [(taps[tap], here, there) for tap, here, there in found]
        return _Plan((rows, columns), taps[len(taps) // 2], shifts)

    if not lots.by_head:
        return [[plan(taps) for taps in terms]] * len(lots.q)
    by_head = [zip(*(tap.unbind() for tap in taps), strict=True) for taps in terms]
    return [[plan(taps) for taps in of_head] for of_head in zip(*by_head, strict=True)]


def _widen(lanes: Tensor, source: Tensor, plans: Sequence[_Plan], prefix: int) -> None:
    """Blend values [maps, S, each, V] into a lane for each term."""
    for term, plan in enumerate(plans):
        lane = lanes[:, :, :, term]
        if prefix:
            lane[:, :prefix] = 0 if term else source[:, :prefix]
        _blend(lane[:, prefix:], source[:, prefix:], plan, add=False)


def _narrow(goal: Tensor, lanes: Tensor, plans: Sequence[_Plan], prefix: int) -> None:
    """Blend what the maps made of each lane, and add up the terms."""
    if prefix:
        goal[:, :prefix] = lanes[:, :prefix, :, 0]
    for term, plan in enumerate(plans):
        _blend(goal[:, prefix:], lanes[:, prefix:, :, term], plan, add=term > 0)


def _blend(out: Tensor, x: Tensor, plan: _Plan, *, add: bool) -> None:
    """Convolve tokens [maps, N, each, V] by one term, into or onto `out`."""
    goal, source = (torch.unflatten(y, 1, plan.size) for y in (out, x))
    if add:
        goal.addcmul_(source, plan.centre)
    else:
        torch.mul(source, plan.centre, out=goal)
    for weight, here, there in plan.shifts:
        goal[here].addcmul_(source[there], weight)
