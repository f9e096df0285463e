"""The parts of iViT: convolutional blocks, interactive blocks, and stages of them.

Pictures are channels-first [B, D, rows, columns]; tokens are row by row [B, N, D].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from timm.layers import DropPath, Mlp
from timm.models import checkpoint_seq, register_notrace_module
from torch import Tensor, nn

from manyheads.attention import AttentionSpec, Mechanism
from manyheads.attention.interactive import InteractiveAttention
from manyheads.geometry import Geometry, Grid

__all__ = ["ConvBlock", "SelfAttention", "Stage", "TokenBlock"]

HEAD_DIM = 32


class ConvBlock(nn.Module):
    """Mixes neighbours with a depthwise convolution, then features at each place.

        x + pointwise(gelu(pointwise(norm(depthwise_7x7(x)))))

    Args:
        dim: Channels ``D``.
        mlp_ratio: Hidden channels over ``D``.
        proj_drop: Dropout after the hidden channels.
        drop_path: Probability to skip the block in training.
        device: Where parameters are made.
        dtype: What parameters are made of.
    """

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.conv = nn.Conv2d(
            dim, dim, 7, padding=3, groups=dim, bias=False, device=device, dtype=dtype
        )
        self.norm = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.mlp = Mlp(
            dim, hidden, drop=proj_drop, use_conv=True, device=device, dtype=dtype
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "B D rows columns"]) -> Tensor:
        """Mix; size and width stay."""
        mixed: Tensor = self.drop_path(self.mlp(self.norm(self.conv(x))))
        return x + mixed


class SelfAttention(nn.Module):
    """Projections around a mechanism, for tokens whose grid the caller knows.

    Args:
        geometry: Sizes of the layer.
        spec: The mechanism.
        source: A layer whose projections move here; None to make new ones.
        proj_drop: Dropout after the output projection.
        device: Where parameters are made.
        dtype: What parameters are made of.
    """

    core: Mechanism

    def __init__(
        self,
        geometry: Geometry,
        spec: AttentionSpec,
        *,
        source: SelfAttention | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        D, width = geometry.dim, geometry.attention_dim
        if source is None:
            self.qkv = nn.Linear(D, 3 * width, device=device, dtype=dtype)
            self.proj = nn.Linear(width, D, device=device, dtype=dtype)
            self.proj_drop = nn.Dropout(proj_drop)
        else:
            self.qkv, self.proj = source.qkv, source.proj
            self.proj_drop = source.proj_drop
        weight = self.qkv.weight
        self.core = spec.build(geometry).to(weight.device, weight.dtype)
        if isinstance(self.core, InteractiveAttention):
            self.core.any_grid = True

    def forward(
        self, x: Float[Tensor, "B N D"], *, grid: Grid
    ) -> Float[Tensor, "B N D"]:
        """Project, mix, project."""
        B, N, _ = x.shape
        shape = (B, N, self.core.geometry.num_heads, self.core.geometry.head_dim)
        q, k, v = (part.reshape(shape) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = self.core(q, k, v, None, grid).reshape(B, N, -1)
        projected: Tensor = self.proj_drop(self.proj(mixed))
        return projected


class TokenBlock(nn.Module):
    """A transformer block on a picture, its places told by a depthwise convolution.

        x = x + depthwise_3x3(x)            so that no size is built in
        x = x + attention(norm(x))
        x = x + mlp(norm(x))

    Args:
        dim: Width ``D``, a multiple of 32, the width of a head.
        grid: Rows and columns of tokens at the native image size.
        attention: The mechanism.
        mlp_ratio: Hidden width over ``D``.
        proj_drop: Dropout after the projections.
        drop_path: Probability to skip either part in training.
        device: Where parameters are made.
        dtype: What parameters are made of.
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: Grid,
        attention: AttentionSpec,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        geometry = Geometry(
            dim=dim,
            num_heads=dim // HEAD_DIM,
            head_dim=HEAD_DIM,
            num_prefix_tokens=0,
            grid=grid,
            scale=HEAD_DIM**-0.5,
        )
        self.pos = nn.Conv2d(
            dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype
        )
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.attn = SelfAttention(
            geometry, attention, proj_drop=proj_drop, device=device, dtype=dtype
        )
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = Mlp(
            dim, int(dim * mlp_ratio), drop=proj_drop, device=device, dtype=dtype
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "B D rows columns"]) -> Tensor:
        """Mix; size and width stay."""
        x = x + self.pos(x)
        grid = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid=grid))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        mixed: Tensor = tokens.transpose(1, 2).reshape(x.shape)
        return mixed


# Feature extraction by torch.fx takes a block as one node: its sizes are data.
register_notrace_module(TokenBlock)


class Stage(nn.Module):
    """Halves the picture where asked, then runs blocks of one width.

    Args:
        downsample: What changes size and width, or an identity.
        blocks: The blocks.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Keep block inputs only, in training."""
        self.grad_checkpointing = enable

    def forward(self, x: Float[Tensor, "B Din rows columns"]) -> Tensor:
        """Give the features of this stage."""
        x = self.downsample(x)
        if self.grad_checkpointing and self.training:
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x
