"""Blends attention maps as the pictures they are: the slow form of hallucination.

Xu, Zhou, He, Li, Wang, "Vision Transformer with Attention Map Hallucination and FFN
Compaction", 2023, arXiv 2306.10875. The fused forms blend tokens instead, with
`manyheads.kernels.hallucinated.blend_tokens`.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.geometry import Grid

__all__ = ["blend_maps"]


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
