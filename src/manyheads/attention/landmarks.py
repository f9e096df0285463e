"""The slow form of interactive attention: two thin maps, multiplied out.

Kang, Yang, Ryu, "Interactive Multi-Head Self-Attention with Linear Complexity", 2024,
arXiv 2402.17507 (iMHSA). The fused forms are in `manyheads.kernels.interactive`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.geometry import Grid
from manyheads.kernels.interactive import APART, Mixes

__all__ = ["interactive_maps", "thin_maps"]


def interactive_maps(
    q: Float[Tensor, "B N H K"],
    k: Float[Tensor, "B N H K"],
    *,
    grid: Grid,
    landmarks: Grid = (7, 7),
    scale: float,
    mixes: Mixes = APART,
    key_mask: Bool[Tensor, "B N"] | None = None,
    queries: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Float[Tensor, "B Mr Nr N"]:
    """Build each head's map as the product of its two thin maps.

        maps[h] = A_Q[h] A_K[h]      of rank L at most; rows sum to one without mixes

    A row of a map needs its own row of A_Q and all of A_K.

    Cost: O(Mr Nr N L) time, O(H L N + Mr Nr N) memory for Nr rows of Mr maps; all
    rows of all maps are O(H N^2), for tests and small pictures.

    Args:
        q: Projected queries, prefix tokens first, then the grid row by row.
        k: Projected keys, in the same token order.
        grid: Rows and columns of patch tokens.
        landmarks: Rows and columns of cells to average over.
        scale: Factor on query-key products.
        mixes: Head-by-head matrices.
        key_mask: True for tokens that count.
        queries: Which rows; None for all.
        heads: Which maps; None for all.
    """
    over_marks, over_tokens = thin_maps(
        q,
        k,
        grid=grid,
        landmarks=landmarks,
        scale=scale,
        mixes=mixes,
        key_mask=key_mask,
        queries=queries,
    )
    if heads is not None:
        # Not before: mixing needs all heads.
        over_marks, over_tokens = (
            over_marks[:, list(heads)],
            over_tokens[:, list(heads)],
        )
    return over_marks @ over_tokens


def thin_maps(
    q: Float[Tensor, "B N H K"],
    k: Float[Tensor, "B N H K"],
    *,
    grid: Grid,
    landmarks: Grid,
    scale: float,
    mixes: Mixes,
    key_mask: Bool[Tensor, "B N"] | None,
    queries: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "B H Nr L"], Float[Tensor, "B H L N"]]:
    """Build both thin maps of every head, of some queries or of all.

    Landmarks are averaged cell by cell in a loop: independent of the fast form.
    """
    if key_mask is None:
        key_mask = q.new_ones(q.shape[:2], dtype=torch.bool)
    cells = _cells(grid, landmarks, num_tokens=q.shape[1])
    members = torch.stack([key_mask & cell.to(q.device) for cell in cells])  # [L, B, N]
    share = members.to(torch.promote_types(q.dtype, torch.float32))
    share = share / share.sum(dim=-1, keepdim=True).clamp_min(1)
    q, k = q.to(share.dtype), k.to(share.dtype)
    q_marks = torch.einsum("lbn,bnhk->blhk", share, q)
    k_marks = torch.einsum("lbn,bnhk->blhk", share, k)
    marked = members.any(dim=-1).T  # [B, L]
    before_queries, after_queries, before_keys, after_keys = mixes
    rows = q if queries is None else q[:, list(queries)]
    over_marks = _map(rows, k_marks, scale, before_queries, after_queries, marked)
    return over_marks, _map(q_marks, k, scale, before_keys, after_keys, key_mask)


def _map(
    rows: Float[Tensor, "B I H K"],
    columns: Float[Tensor, "B J H K"],
    scale: float,
    before: Tensor | None,
    after: Tensor | None,
    kept: Bool[Tensor, "B J"],
) -> Float[Tensor, "B H I J"]:
    """Build one thin map in so many words."""
    scores = scale * torch.einsum("bihk,bjhk->bhij", rows, columns)
    if before is not None:
        scores = torch.einsum("gh,bhij->bgij", before.to(scores.dtype), scores)
    left_out = ~kept[:, None, None]
    scores = scores.masked_fill(left_out, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).masked_fill(left_out, 0.0)
    if after is not None:
        weights = torch.einsum("gh,bhij->bgij", after.to(weights.dtype), weights)
    return weights


def _cells(grid: Grid, landmarks: Grid, num_tokens: int) -> list[Tensor]:
    """List who belongs to each landmark [N]: prefix tokens one each, then the cells."""
    (R, C), (rows, columns) = grid, landmarks
    prefix = num_tokens - R * C
    found = [torch.arange(num_tokens) == token for token in range(prefix)]
    for i in range(rows):
        for j in range(columns):
            cell = torch.zeros(R, C, dtype=torch.bool)
            top, bottom = i * R // rows, -(-(i + 1) * R // rows)
            left, right = j * C // columns, -(-(j + 1) * C // columns)
            cell[top:bottom, left:right] = True
            found.append(torch.cat([cell.new_zeros(prefix), cell.flatten()]))
    return found
