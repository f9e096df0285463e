"""The slow form of hallucination: real maps, blended as the pictures they are.

Xu, Zhou, He, Li, Wang, "Vision Transformer with Attention Map Hallucination and FFN
Compaction", 2023, arXiv 2306.10875. The fused forms blend tokens instead, with
`manyheads.kernels.hallucinated.blend_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.base import in_parts, row_bytes
from manyheads.attention.softmax import masked_softmax
from manyheads.geometry import Grid

__all__ = [
    "Blend",
    "blend_maps",
    "hallucinated_maps",
    "hallucinated_rows",
    "shifted_deltas",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Blend:
    """How hallucinated maps come from real ones.

    Attributes:
        stage: Whether probabilities or logits are blended.
        scale: Factor on query-key products.
        pairing: The real head of each hallucinated one.
        over_queries: Factors over queries [hallucinated heads, terms, taps].
        over_keys: Factors over keys, of the same shape.
        cross: Weights across hallucinated maps, a row for each that is wanted, or None.
        prefix: Leading tokens that are blended with nothing.
        cells: Rows and columns over which to blend; None for the sequence.
    """

    stage: Literal["probabilities", "logits"]
    scale: float
    pairing: tuple[int, ...]
    over_queries: Float[Tensor, "L T taps"]
    over_keys: Float[Tensor, "L T taps"]
    cross: Float[Tensor, "W L"] | None
    prefix: int
    cells: Grid | None


def hallucinated_maps(
    q: Float[Tensor, "B N Hq K"],
    k: Float[Tensor, "B S Hq K"],
    kept: Bool[Tensor, "B S"] | None,
    blend: Blend,
) -> Float[Tensor, "B H N S"]:
    """Build the real maps and convolve them as pictures; O(H N S) memory."""
    base = _real(q, k, kept, blend)
    source = base[:, list(blend.pairing)]  # [B, derived heads, N, S]
    if kept is not None:
        source = source * kept[:, None, None, :]
        if q.shape[1] == k.shape[1]:
            source = source * kept[:, None, :, None]
    derived = blend_maps(
        source, blend.over_queries, blend.over_keys, blend.prefix, blend.cells
    )
    return _joined(base, derived, kept, blend)


def hallucinated_rows(
    q: Float[Tensor, "B N Hq K"],
    k: Float[Tensor, "B S Hq K"],
    kept: Bool[Tensor, "B S"] | None,
    blend: Blend,
    *,
    queries: Sequence[int],
    heads: Sequence[int],
) -> Float[Tensor, "B Mr Nr S"]:
    """Build some rows of some maps, from these rows of the real maps and those beside.

    A kernel reaches over a few queries, so a row needs the rows under its taps:

        row[n] = sum_t sum_tap  over_queries[t, tap] (over_keys[t] * real[n + tap])

    Cost: O(Mr Nr S) memory, and a few rows of the real heads that these maps are made
    of; with a mix across heads, of all hallucinated ones too.
    """
    real, blend, places = _narrowed(blend, q.shape[2], heads)
    q, k = q[:, :, real], k[:, :, real]

    def build(part: Sequence[int]) -> Tensor:
        return _few_rows(q, k, kept, blend, part)[:, places]

    passing = len(real) + len(blend.pairing)
    return in_parts(build, queries, row_bytes(q, k) * passing)


def _few_rows(
    q: Tensor, k: Tensor, kept: Tensor | None, blend: Blend, queries: Sequence[int]
) -> Tensor:
    """Build some rows of all maps of a blend, all at once."""
    under, inside = _under_taps(queries, q.shape[1], blend)  # [Nr, taps]
    # torch leaves this method without types.
    needed, places = under.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    base = _real(q[:, needed], k, kept, blend)
    source = base[:, list(blend.pairing)]  # [B, derived heads, U, S]
    if kept is not None:
        source = source * kept[:, None, None, :]
        if q.shape[1] == k.shape[1]:
            source = source * kept[:, None, needed, None]
    own = places[:, places.shape[1] // 2]
    derived = _blend_rows(source, places, inside, blend)
    # The rows of prefix tokens are blended over keys alone, by the first term.
    alone = torch.tensor([query < blend.prefix for query in queries])
    if alone.any():
        first = _over_keys(source[:, :, own[alone]], blend, term=0)
        derived[:, :, alone] = torch.cat(
            [source[:, :, own[alone], : blend.prefix], first], dim=3
        )
    return _joined(base[:, :, own], derived, kept, blend)


def _narrowed(
    blend: Blend, num_real: int, heads: Sequence[int]
) -> tuple[list[int], Blend, list[int]]:
    """Keep what some heads are made of.

    Returns:
        The real heads that are needed, the blend of the hallucinated ones from these,
        and where each head then is: real ones first.
    """
    every = range(num_real + len(blend.pairing))
    wanted = [every[head] for head in heads]
    made = sorted({head - num_real for head in wanted if head >= num_real})
    mixed = blend.cross is not None and bool(made)
    derived = list(range(len(blend.pairing))) if mixed else made
    partners = [blend.pairing[head] for head in derived]
    real = sorted({head for head in wanted if head < num_real} | {*partners})
    narrow = replace(
        blend,
        pairing=tuple(real.index(head) for head in partners),
        over_queries=blend.over_queries[derived],
        over_keys=blend.over_keys[derived],
        cross=blend.cross[made] if blend.cross is not None and made else None,
    )
    there = [*real, *(num_real + head for head in made)]
    return real, narrow, [there.index(head) for head in wanted]


def _real(
    q: Tensor, k: Tensor, kept: Tensor | None, blend: Blend
) -> Float[Tensor, "B Hq N S"]:
    scores = blend.scale * torch.einsum("bnhk,bmhk->bhnm", q, k)
    return scores if blend.stage == "logits" else masked_softmax(scores, kept)


def _joined(
    base: Tensor, derived: Tensor, kept: Tensor | None, blend: Blend
) -> Float[Tensor, "B H N S"]:
    """Mix hallucinated maps across heads, and put them behind the real ones."""
    if blend.cross is not None:
        derived = torch.einsum("jl,blnm->bjnm", blend.cross, derived)
    both = torch.cat([base, derived], dim=1)
    if blend.stage == "logits":
        return masked_softmax(both, kept)
    return both if kept is None else both * kept[:, None, None, :]


def _under_taps(
    queries: Sequence[int], num_queries: int, blend: Blend
) -> tuple[Tensor, Tensor]:
    """Give the query under each tap of each row, and whether there is one."""
    taps = blend.over_queries.shape[-1]
    device = blend.over_queries.device
    at = torch.tensor(list(queries), device=device)[:, None] - blend.prefix
    if blend.cells is None:
        patches = num_queries - blend.prefix
        there = at + torch.arange(taps, device=device) - taps // 2
        inside = (there >= 0) & (there < patches)
    else:
        side = math.isqrt(taps)
        rows, columns = blend.cells
        reach = torch.arange(side, device=device) - side // 2
        row = at // columns + reach.repeat_interleave(side)
        column = at % columns + reach.repeat(side)
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        there = row * columns + column
    # Taps of a prefix token, and those beyond the edge, stand on the row itself.
    inside = inside & (at >= 0)
    return torch.where(inside, there, at) + blend.prefix, inside


def _blend_rows(
    source: Float[Tensor, "B L U S"], places: Tensor, inside: Tensor, blend: Blend
) -> Float[Tensor, "B L Nr S"]:
    """Sum over terms and taps; columns of prefix tokens take the first term alone."""
    weights = blend.over_queries[:, :, None, :] * inside.to(source.dtype)
    parts = []
    for part in ("prefix", "patches"):
        terms = range(1 if part == "prefix" else blend.over_keys.shape[1])
        total: Tensor | None = None
        for term in terms:
            columns = source[..., : blend.prefix]
            if part == "patches":
                columns = _over_keys(source, blend, term)
            for tap in range(places.shape[1]):
                share = weights[:, term, :, tap, None]  # [L, Nr, 1]
                added = columns[:, :, places[:, tap]] * share
                total = added if total is None else total + added
        if total is not None:
            parts.append(total)
    return torch.cat(parts, dim=3)


def _over_keys(source: Tensor, blend: Blend, term: int) -> Tensor:
    """Blend the patches' part of every row over keys, by one term."""
    along = _along if blend.cells is None else partial(_around, cells=blend.cells)
    return along(source[..., blend.prefix :], blend.over_keys[:, term])


def blend_maps(
    maps: Float[Tensor, "B L N S"],
    over_queries: Float[Tensor, "L T taps"],
    over_keys: Float[Tensor, "L T taps"],
    prefix: int,
    cells: Grid | None,
) -> Float[Tensor, "B L N S"]:
    """Convolve each map as the picture it is, with the kernel of its head.

    map   = [ corner | top  ]   corner: as it is     top: first term, over keys
            [ left   | body ]   left: first term, over queries    body: all terms
    """
    corner, top = maps[:, :, :prefix, :prefix], maps[:, :, :prefix, prefix:]
    left, body = maps[:, :, prefix:, :prefix], maps[:, :, prefix:, prefix:]
    if body.numel() == 0:
        return maps
    along = _along if cells is None else partial(_around, cells=cells)
    first_top = along(top, over_keys[:, 0])
    first_left = along(left.mT, over_queries[:, 0]).mT
    if cells is None:
        kernel = torch.einsum("hti,htj->hij", over_queries, over_keys)[:, None]
        half, heads = kernel.shape[-1] // 2, kernel.shape[0]
        blended = F.conv2d(body, kernel, padding=half, groups=heads)
    else:
        blended = torch.zeros_like(body)
        for first, second in zip(
            over_queries.unbind(1), over_keys.unbind(1), strict=True
        ):
            blended = blended + along(along(body, second).mT, first).mT
    rows = (torch.cat([corner, first_top], 3), torch.cat([first_left, blended], 3))
    return torch.cat(rows, dim=2)


def _along(maps: Tensor, kernel: Tensor) -> Tensor:
    """Convolve every row of a map with the kernel of its head, zeros beyond."""
    if maps.numel() == 0:
        return maps
    weight = kernel[:, None, None, :]
    half = kernel.shape[-1] // 2
    return F.conv2d(maps, weight, padding=(0, half), groups=kernel.shape[0])


def _around(maps: Tensor, kernel: Tensor, cells: Grid) -> Tensor:
    """Convolve every row of a map, laid out as the image, with a square kernel."""
    if maps.numel() == 0:
        return maps
    side = math.isqrt(kernel.shape[-1])
    weight = kernel.reshape(-1, 1, side, side)
    B, L, N, S = maps.shape
    pictures = maps.transpose(1, 2).reshape(B * N, L, *cells)
    blended = F.conv2d(pictures, weight, padding=side // 2, groups=kernel.shape[0])
    return blended.reshape(B, N, L, S).transpose(1, 2)


def shifted_deltas(terms: int, taps: int) -> Float[Tensor, "T taps"]:
    """Make one unit vector a term: the centre first, then its neighbours outwards."""
    order = sorted(range(taps), key=lambda tap: (abs(tap - taps // 2), tap))
    return torch.eye(taps)[order[:terms]]
