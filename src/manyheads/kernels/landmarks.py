"""Landmarks: averages of queries and keys over cells of the grid, by plain products."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.geometry import Grid

__all__ = ["cell_means", "find_landmarks"]


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
