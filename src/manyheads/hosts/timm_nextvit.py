"""timm's Next-ViT: convolutional blocks, and few with attention on pooled keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from manyheads.attention import AttentionSpec, Mechanism, Softmax
from manyheads.ffn import CompactLinear
from manyheads.geometry import Geometry, Grid
from manyheads.hosts.base import Site, TokenGrid, mechanism_of
from manyheads.hosts.heads import (
    build_core,
    first_rows,
    head_index,
    no_plain_matrix,
    permute_inputs,
    permute_outputs,
)
from manyheads.hosts.timm_pyramid import TimmPyramid

__all__ = ["NextViTAttention", "TimmNextViT"]


class NextViTAttention(nn.Module):
    """Next-ViT's attention layer with another mechanism between its projections.

    Children keep timm's names (`q`, `k`, `v`, `sr`, `norm`, `proj`), which timm's own
    `reparameterize` of the block looks for.

    Args:
        source: A `timm.models.nextvit.EfficientAttention`, or one of these; its
            children move here.
        geometry: Sizes of the layer.
        spec: The mechanism to put between the projections.
    """

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    core: Mechanism
    proj: nn.Linear

    def __init__(self, source: Any, geometry: Geometry, spec: AttentionSpec) -> None:
        super().__init__()
        self.num_heads, self.head_dim = geometry.num_heads, geometry.head_dim
        self.scale = geometry.scale
        query_dim = spec.num_query_heads(geometry) * self.head_dim
        self.q, self.k, self.v = source.q, source.k, source.v
        if self.q.out_features != query_dim:
            self.q = first_rows(self.q, [(0, query_dim)])
            self.k = first_rows(self.k, [(0, query_dim)])
        self.core = build_core(spec, geometry, self.q.weight)
        self.proj, self.proj_drop = source.proj, source.proj_drop
        self.sr, self.norm = source.sr, source.norm
        self.token_grid: TokenGrid | None = None

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N Cout"]:
        """Project, mix, project; keys and values come from pooled tokens."""
        B, N, _ = x.shape
        source = x
        if self.sr is not None:
            source = self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2)
        q = self.q(x).reshape(B, N, -1, self.head_dim)
        k, v = (
            projection(source).reshape(B, source.shape[1], -1, self.head_dim)
            for projection in (self.k, self.v)
        )
        grid = self.token_grid() if self.token_grid is not None else None
        mixed = self.core(q, k, v, None, grid)
        projected: Tensor = self.proj_drop(self.proj(mixed.reshape(B, N, -1)))
        return projected


class TimmNextViT(TimmPyramid):
    """Hosts `timm.models.nextvit.NextViT`; its convolutional blocks keep their mixing.

    Those blocks are listed, because their feed-forward layers can be compacted; what
    mixes their tokens is a convolution and is left alone by every recipe.
    """

    name: ClassVar[str] = "timm-nextvit"

    def recognises(self, model: nn.Module) -> bool:
        """Look at the class only."""
        return _is(model, "NextViT")

    def sites(self, model: Any) -> tuple[Site, ...]:
        """List all blocks of all stages in order."""
        height, width = self.image_input(model).size
        found: list[Site] = []
        for number, stage in enumerate(model.stages):
            cell = 4 * 2**number
            grid = (-(-height // cell), -(-width // cell))
            for place, block in enumerate(stage.blocks):
                path = f"stages.{number}.blocks.{place}"
                if _is(block, "NextConvBlock"):
                    found.append(_convolutional(len(found), path, block, grid))
                elif isinstance(block.e_mhsa, NextViTAttention) or _is(
                    block.e_mhsa, "EfficientAttention"
                ):
                    found.append(_attending(len(found), path, block, grid))
                else:
                    return ()
        return tuple(found)

    def swap_attention(
        self, model: nn.Module, site: Site, spec: AttentionSpec
    ) -> nn.Module:
        """Wrap the projections that are there around the new mechanism."""
        source = model.get_submodule(site.attention_path)
        return NextViTAttention(source, site.geometry, spec)

    def permute_heads(self, model: nn.Module, site: Site, order: Sequence[int]) -> None:
        """Reorder rows of the projections, columns of the output."""
        layer: Any = model.get_submodule(site.attention_path)
        index = head_index(order, site.geometry.head_dim)
        for projection in (layer.q, layer.k, layer.v):
            permute_outputs(projection, index)
        permute_inputs(layer.proj, index)

    def free_size(self, model: Any) -> Grid | None:
        """Do as every pyramid does, and lay pooled keys out in order."""
        for site in self.sites(model):
            if site.keys_path is not None:
                layer: Any = model.get_submodule(site.attention_path)
                layer.norm = _InOrder(layer.norm)
        return super().free_size(model)

    def track_grid(self, model: nn.Module) -> None:
        """Hook the layer before the attention where a mechanism asks for the grid."""
        for block in model.modules():
            layer = getattr(block, "e_mhsa", None)
            if not isinstance(layer, NextViTAttention) or not layer.core.needs_grid:
                continue
            if layer.token_grid is None:
                layer.token_grid = TokenGrid()
                before = block.get_submodule("patch_embed")
                before.register_forward_hook(layer.token_grid.watch_map)


class _InOrder(nn.Module):
    """Lays pooled keys out token by token, as the projections after it read them.

    Otherwise a tracer asks whether these can be read in place, which holds for one
    image and for no other batch, and refuses one image for ever.

    Args:
        norm: What normalises pooled tokens, channels first.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; the numbers stay as they are."""
        laid: Tensor = self.norm(x).transpose(1, 2).contiguous()
        return laid.transpose(1, 2)


def _is(module: nn.Module, name: str) -> bool:
    """Match by exact class: a subclass may compute something else."""
    kind = type(module)
    return kind.__module__ == "timm.models.nextvit" and kind.__name__ == name


def _attending(index: int, path: str, block: Any, grid: Grid) -> Site:
    core = mechanism_of(block.e_mhsa)
    return Site(
        index=index,
        path=path,
        attention_path=f"{path}.e_mhsa",
        ffn_path=_output_path(path, block),
        geometry=core.geometry if core else _geometry(block.e_mhsa, grid),
        attention=core.spec if core else Softmax(),
        ffn=_compacted(block),
        fixed_query_heads=no_plain_matrix(block.e_mhsa, "q", "k", "v", "proj"),
        keys_path=f"{path}.e_mhsa.k" if block.e_mhsa.sr is not None else None,
        keys_in_runs=block.e_mhsa.sr is not None,
    )


def _convolutional(index: int, path: str, block: Any, grid: Grid) -> Site:
    groups = block.mhca.group_conv3x3.groups
    return Site(
        index=index,
        path=path,
        attention_path=f"{path}.mhca",
        ffn_path=_output_path(path, block),
        geometry=Geometry(
            dim=block.out_chs,
            num_heads=groups,
            head_dim=block.out_chs // groups,
            num_prefix_tokens=0,
            grid=grid,
            scale=1.0,
        ),
        attention=Softmax(),
        ffn=_compacted(block),
        fixed="a convolution mixes tokens here",
    )


def _compacted(block: Any) -> Any:
    output = getattr(block.mlp, "fc2", None)
    return output.spec if isinstance(output, CompactLinear) else None


def _output_path(path: str, block: Any) -> str | None:
    kind = type(block.mlp)
    plain = kind.__module__ == "timm.layers.mlp" and kind.__name__ == "ConvMlp"
    return f"{path}.mlp.fc2" if plain else None


def _geometry(attention: Any, grid: Grid) -> Geometry:
    reduced = None
    if attention.sr is not None:
        reduced = max(1, grid[0] * grid[1] // attention.N_ratio)
    return Geometry(
        dim=attention.q.in_features,
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        num_prefix_tokens=0,
        grid=grid,
        scale=attention.scale,
        attention_dropout=attention.attn_drop.p,
        reduced_keys=reduced,
    )
