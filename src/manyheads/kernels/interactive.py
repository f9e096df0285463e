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

    A portion's weights fit the caches on a CPU (measured: as fast as all at once for
    512 tokens and more) and a small share of the memory elsewhere. With gradients
    everything is kept anyway, and a traced program must not depend on the count.

    Args:
        weights_per_token: Images times heads times landmarks.
        like: A tensor on the device in question.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    portion = 2**20 if like.device.type in ("cpu", "meta") else 2**26
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
    parts = [
        (
            _mix(
                mixes.after_queries,
                _weights(part, to_marks, mixes.before_queries, _over_rows(marked)),
            ).to(v.dtype)
            @ summary
        ).transpose(1, 2)
        for part in _split(heads_q, step, dim=2)
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def find_landmarks(
    x: Float[Tensor, "B N H K"],
    grid: Grid,
    cells: Grid,
    kept: Bool[Tensor, "B N"] | None = None,
) -> tuple[Float[Tensor, "B L H K"], Bool[Tensor, "B L"] | None]:
    """Give the prefix tokens as they are, then the averages of the cells.

    Args:
        x: Prefix tokens, then the tokens of the grid row by row.
        grid: Rows and columns of tokens.
        cells: Rows and columns of cells.
        kept: True for tokens that count; the others leave the averages.

    Returns:
        The landmarks, and which of them stand for a token that counts (None for all).
    """
    B, N, H, K = x.shape
    prefix = N - grid[0] * grid[1]
    patches = x[:, prefix:].flatten(2)
    if kept is None:
        means = cell_means(patches, grid, cells)
        return torch.cat([x[:, :prefix], means.reshape(B, -1, H, K)], dim=1), None
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    weight = kept[:, prefix:, None]
    share = cell_means(weight.to(wide), grid, cells)
    means = cell_means(patches.masked_fill(~weight, 0.0).to(wide), grid, cells)
    means = (means / torch.where(share > 0, share, 1.0)).to(x.dtype)
    marked = torch.cat([kept[:, :prefix], share[..., 0] > 0], dim=1)
    return torch.cat([x[:, :prefix], means.reshape(B, -1, H, K)], dim=1), marked


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
    B, _, D = x.shape
    rows, columns = grid
    inside, count = _membership(columns, cells[1], x)
    # Columns first: a packed projection is then read in place, one row at a time.
    by_row = x.reshape(B * rows, columns, D)
    x = torch.bmm(inside.expand(B * rows, -1, -1), by_row) / count
    inside, count = _membership(rows, cells[0], x)
    x = torch.bmm(inside.expand(B, -1, -1), x.reshape(B, rows, cells[1] * D)) / count
    return x.reshape(B, cells[0] * cells[1], D)


def _membership(tokens: int, cells: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Say which tokens of a side each cell overlaps [cells, tokens], and how many."""
    cell = torch.arange(cells, device=like.device)[:, None]
    token = torch.arange(tokens, device=like.device)[None]
    starts_before_end = token * cells < (cell + 1) * tokens
    ends_after_start = (token + 1) * cells > cell * tokens
    inside = (starts_before_end & ends_after_start).to(like.dtype)
    return inside, inside.sum(dim=1, keepdim=True)


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
