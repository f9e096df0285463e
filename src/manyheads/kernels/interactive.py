"""Interactive attention's core: landmarks first, so that no pair of tokens meets.

The slow twin is `manyheads.attention.interactive.interactive_maps`.

Kang, Yang, Ryu, "Interactive Multi-Head Self-Attention with Linear Complexity", 2024,
arXiv 2402.17507.

Plain operators only, so that `torch.compile`, `torch.export`, autocast and the FLOP
counter see them truly; no operator of our own is needed. What is won here is won by
order: values are gathered at the landmarks before any query is looked at, and where no
gradient is wanted the queries are served in portions that stay in the caches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.geometry import Grid

__all__ = [
    "APART",
    "Mixes",
    "attend",
    "cell_means",
    "find_landmarks",
    "tokens_at_once",
]


class Mixes(NamedTuple):
    """Head-by-head matrices [H, H], row = new head; None leaves the heads apart.

    Attributes:
        before_queries: On the scores of queries against landmarks.
        after_queries: On the weights of queries over landmarks.
        before_keys: On the scores of landmarks against keys.
        after_keys: On the weights of landmarks over keys.
    """

    before_queries: Tensor | None = None
    after_queries: Tensor | None = None
    before_keys: Tensor | None = None
    after_keys: Tensor | None = None


APART = Mixes()
"""No head hears of another."""


def tokens_at_once(weights_per_token: int, like: Tensor) -> int | None:
    """Say how many tokens are served at a time; None for all of them.

    A portion's weights, a megabyte, fit a CPU's caches and are a small share of the
    memory elsewhere. With gradients
    everything is kept anyway, and a traced program must not depend on the count.

    Args:
        weights_per_token: Images times heads times landmarks.
        like: A tensor on the device in question.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    portion = 2**18 if like.device.type in ("cpu", "meta") else 2**26
    return max(16, portion // weights_per_token)


def attend(
    q: Float[Tensor, "B N H K"],
    k: Float[Tensor, "B N H K"],
    v: Float[Tensor, "B N H K"],
    q_marks: Float[Tensor, "B L H K"],
    k_marks: Float[Tensor, "B L H K"],
    *,
    scale: float,
    mixes: Mixes,
    kept: Bool[Tensor, "B N"] | None = None,
    marked: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B N H K"]:
    """Gather values at the landmarks, then let every query read the landmarks.

        summary = mix(softmax_n(q_marks k^T * scale)) v          [B, H, L, K]
        out     = mix(softmax_l(q k_marks^T * scale)) summary

    Cost: O(N L H (K + H)) time. Without mixes two fused calls hold no weights at all.
    With mixes and without gradients one stack [B, H, L, N] is held (two while heads
    are mixed before the softmax), plus a portion; with gradients autograd keeps four.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        q_marks: Landmarks of the queries.
        k_marks: Landmarks of the keys, in the same order.
        scale: Factor on query-key products.
        mixes: How the heads talk.
        kept: True for keys that count.
        marked: True for landmarks that stand for at least one such token.
    """
    heads_q, heads_k, heads_v = (x.transpose(1, 2) for x in (q, k, v))
    from_marks, to_marks = (x.transpose(1, 2) for x in (q_marks, k_marks))
    if all(mix is None for mix in mixes) and kept is None:
        summary = F.scaled_dot_product_attention(
            from_marks, heads_k, heads_v, scale=scale
        )
        mixed = F.scaled_dot_product_attention(heads_q, to_marks, summary, scale=scale)
        return mixed.transpose(1, 2)
    step = tokens_at_once(q.shape[0] * q_marks.shape[1] * q.shape[2], q)
    over_tokens = _weights(
        from_marks * scale, heads_k, mixes.before_keys, _over_rows(kept)
    )
    gathered = [
        _mix(mixes.after_keys, weights).to(v.dtype) @ values
        for weights, values in zip(
            _split(over_tokens, step, dim=3), _split(heads_v, step, dim=2), strict=True
        )
    ]
    summary = torch.stack(gathered).sum(dim=0) if len(gathered) > 1 else gathered[0]
    del over_tokens, gathered
    to_marks = to_marks * scale

    def read(queries: Tensor) -> Tensor:
        weights = _weights(queries, to_marks, mixes.before_queries, _over_rows(marked))
        read = _mix(mixes.after_queries, weights).to(v.dtype) @ summary
        return read.transpose(1, 2)

    if step is None:
        return read(heads_q)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    parts = zip(_split(heads_q, step, dim=2), _split(out, step, dim=1), strict=True)
    for queries, place in parts:
        place.copy_(read(queries))
    return out


def find_landmarks(
    q: Float[Tensor, "B N H K"],
    k: Float[Tensor, "B N H K"],
    grid: Grid,
    cells: Grid,
    kept: Bool[Tensor, "B N"] | None = None,
) -> tuple[
    Float[Tensor, "B L H K"], Float[Tensor, "B L H K"], Bool[Tensor, "B L"] | None
]:
    """Give the prefix tokens as they are, then the averages of the cells.

    Args:
        q: Queries: prefix tokens, then the tokens of the grid row by row.
        k: Keys, in the same order.
        grid: Rows and columns of tokens.
        cells: Rows and columns of cells.
        kept: True for tokens that count; the others leave the averages.

    Returns:
        Landmarks of the queries, of the keys, and which of them stand for a token
        that counts (None for all).
    """
    prefix = q.shape[1] - grid[0] * grid[1]
    sides = _sides(grid, cells, q)
    if kept is None:
        means = [_means(x[:, prefix:].flatten(2), *sides) for x in (q, k)]
        marked = None
    else:
        wide = torch.float64 if q.dtype is torch.float64 else torch.float32
        sides = _sides(grid, cells, q.to(wide))
        weight = kept[:, prefix:, None]
        share = _means(weight.to(wide), *sides)
        marked = torch.cat([kept[:, :prefix], share[..., 0] > 0], dim=1)
        share = torch.where(share > 0, share, 1.0)
        patches = [x[:, prefix:].flatten(2).masked_fill(~weight, 0.0) for x in (q, k)]
        means = [(_means(x.to(wide), *sides) / share).to(q.dtype) for x in patches]
    q_marks, k_marks = (
        torch.cat([x[:, :prefix], mean.reshape(*mean.shape[:2], *x.shape[2:])], dim=1)
        for x, mean in zip((q, k), means, strict=True)
    )
    return q_marks, k_marks, marked


def cell_means(
    x: Float[Tensor, "B T D"], grid: Grid, cells: Grid
) -> Float[Tensor, "B L D"]:
    """Average the tokens of a grid over cells that cover it, whatever the two sizes.

    A token belongs to a cell if their shares of the side overlap, so cells of a side
    that does not divide evenly share their border tokens:

        tokens  |  0  |  1  |  2  |  3  |  4  |      5 tokens on 3 cells: {0, 1},
        cells   |    0    |    1    |    2    |      {1, 2, 3}, {3, 4}

    which is what adaptive average pooling does, written as products with matrices
    made from the sizes: pooling operators freeze the size when exported.

    Cost: O(columns T D) time; temporaries of the size of the cells' columns.

    Args:
        x: Tokens row by row, ``T = rows * columns`` of `grid`.
        grid: Rows and columns of tokens.
        cells: Rows and columns of cells.
    """
    return _means(x, *_sides(grid, cells, x))


def _means(
    x: Float[Tensor, "B T D"],
    of_rows: Float[Tensor, "I rows"],
    of_columns: Float[Tensor, "J columns"],
) -> Float[Tensor, "B L D"]:
    """Average over columns, then over rows, given who belongs to which cell."""
    B, _, D = x.shape
    (I, rows), (J, columns) = of_rows.shape, of_columns.shape
    # Columns first: a packed projection is then read in place, one row at a time.
    x = torch.bmm(
        of_columns.expand(B * rows, -1, -1), x.reshape(B * rows, columns, D)
    ) / of_columns.sum(dim=1, keepdim=True)
    x = torch.bmm(of_rows.expand(B, -1, -1), x.reshape(B, rows, J * D)) / of_rows.sum(
        dim=1, keepdim=True
    )
    return x.reshape(B, I * J, D)


def _sides(grid: Grid, cells: Grid, like: Tensor) -> tuple[Tensor, Tensor]:
    """Say which rows and which columns of tokens belong to those of the cells."""
    rows, columns = (
        _membership(tokens, count, like)
        for tokens, count in zip(grid, cells, strict=True)
    )
    return rows, columns


def _membership(tokens: int, cells: int, like: Tensor) -> Tensor:
    """Say which tokens of a side each cell overlaps, 1 or 0: [cells, tokens]."""
    cell = torch.arange(cells, device=like.device)[:, None]
    token = torch.arange(tokens, device=like.device)[None]
    starts_before_end = token * cells < (cell + 1) * tokens
    ends_after_start = (token + 1) * cells > cell * tokens
    return (starts_before_end & ends_after_start).to(like.dtype)


def _weights(
    rows: Float[Tensor, "B H I K"],
    columns: Float[Tensor, "B H J K"],
    before: Tensor | None,
    kept: Bool[Tensor, "B 1 1 J"] | None,
) -> Float[Tensor, "B H I J"]:
    """Softmax over columns; a row without any is zero.

    Half types leave here as float32, so that mixing heads rounds nothing.
    """
    scores = rows @ columns.mT
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    scores = _mix(before, scores)
    if kept is None:
        return _softmax(scores)
    scores = scores.masked_fill(~kept, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).masked_fill(~kept, 0.0)


def _softmax(scores: Float[Tensor, "B H I J"]) -> Float[Tensor, "B H I J"]:
    """Take the softmax in place where nobody needs the scores again."""
    free = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if free and scores.device.type == "cpu":
        return torch.softmax(scores, dim=-1, out=scores)
    return scores.softmax(dim=-1)


def _mix(
    matrix: Float[Tensor, "H H"] | None, x: Float[Tensor, "B H I J"]
) -> Float[Tensor, "B H I J"]:
    """Make every head a weighted sum of all heads, entry by entry."""
    if matrix is None:
        return x
    B, H, I, J = x.shape
    wide = matrix.to(x.dtype).expand(B, H, H)
    return torch.bmm(wide, x.reshape(B, H, I * J)).reshape(B, H, I, J)


def _split(x: Tensor, step: int | None, *, dim: int) -> tuple[Tensor, ...]:
    if step is None:
        return (x,)
    parts: tuple[Tensor, ...] = torch.split(x, step, dim)
    return parts


def _over_rows(kept: Bool[Tensor, "B J"] | None) -> Bool[Tensor, "B 1 1 J"] | None:
    return None if kept is None else kept[:, None, None]
