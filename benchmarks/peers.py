"""Other people's attention, for comparison in the same run.

Packages come with ``pip install "manyheads[bench]"``. They are timed as they are, at
the level of a whole layer with its projections; their weights are random.

============================  ==================================================
name                          what it is
============================  ==================================================
nystrom-attention             Nyström approximation, 49 landmarks, no residual
                              convolution (arXiv 2102.03902)
performer-pytorch             random features for softmax, its own default count
                              (arXiv 2009.14794)
linformer                     keys and values projected to 49 along the sequence
                              (arXiv 2006.04768); one token count per instance
text-book Hydra               normalise, multiply, sum: three lines, eager
============================  ==================================================
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from manyheads.errors import MissingExtra

__all__ = [
    "CORES",
    "LAYERS",
    "TextbookHydra",
    "make_layer",
    "multiply_adds",
    "textbook_hydra",
]

# As many as Interactive() has: 7 x 7.
_LANDMARKS = 49


def textbook_hydra(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mix tokens as people write Hydra down: every step a tensor of its own.

    Args:
        q: Projected queries [B, N, D].
        k: Projected keys [B, N, D].
        v: Projected values [B, N, D].
    """
    q = q / q.norm(dim=-1, keepdim=True)
    k = k / k.norm(dim=-1, keepdim=True)
    kv = (k * v).sum(dim=-2, keepdim=True)
    return q * kv


class TextbookHydra(nn.Module):
    """A layer with packed projections around `textbook_hydra`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Project, mix, project."""
        mixed: Tensor = self.proj(textbook_hydra(*self.qkv(x).chunk(3, dim=-1)))
        return mixed


def _nystrom(dim: int, num_heads: int, num_tokens: int) -> nn.Module:
    layer: nn.Module = _class("nystrom_attention", "NystromAttention")(
        dim,
        dim_head=dim // num_heads,
        heads=num_heads,
        num_landmarks=_LANDMARKS,
        residual=False,
    )
    return layer


def _performer(dim: int, num_heads: int, num_tokens: int) -> nn.Module:
    layer: nn.Module = _class("performer_pytorch", "SelfAttention")(
        dim, heads=num_heads, dim_head=dim // num_heads
    )
    return layer


def _linformer(dim: int, num_heads: int, num_tokens: int) -> nn.Module:
    layer: nn.Module = _class("linformer", "LinformerSelfAttention")(
        dim, num_tokens, k=_LANDMARKS, heads=num_heads
    )
    return layer


def _class(package: str, name: str) -> Any:
    try:
        with warnings.catch_warnings():
            # performer-pytorch reads torch's version with distutils.
            warnings.simplefilter("ignore", DeprecationWarning)
            return getattr(importlib.import_module(package), name)
    except ImportError as error:
        raise MissingExtra(
            asked=f"timing {package}",
            found=f"it does not import: {error}",
            fix='pip install "manyheads[bench]"',
        ) from error


# What stands in the place of an attention layer, from D, H and N.
LAYERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "nystrom-attention": _nystrom,
    "performer-pytorch": _performer,
    "linformer": _linformer,
    "text-book Hydra": lambda dim, num_heads, num_tokens: TextbookHydra(dim),
}

# Hydra's core on [B, N, D].
CORES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "text-book Hydra": textbook_hydra
}


def make_layer(name: str, x: Tensor, num_heads: int) -> nn.Module:
    """Build another package's layer for some tokens [B, N, D].

    Raises:
        MissingExtra: The package is not installed.
    """
    layer = LAYERS[name](x.shape[-1], num_heads, x.shape[-2])
    return layer.to(device=x.device, dtype=x.dtype).eval().requires_grad_(False)


def multiply_adds(layer: nn.Module, x: Tensor) -> int:
    """Count the matrix products of one call, a multiply-add as 1."""
    with FlopCounterMode(display=False) as counter:
        layer(x)
    # The counter speaks of FLOPs, two to a multiply-add.
    return int(counter.get_total_flops()) // 2
