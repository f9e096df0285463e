"""timm's PVT-v2: four stages, keys and values spatially reduced in the first three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from manyheads.attention import AttentionSpec, Mechanism, Softmax
from manyheads.ffn import CompactLinear
from manyheads.geometry import Geometry, Grid
from manyheads.hosts.base import Site, mechanism_of
from manyheads.hosts.heads import (
    build_core,
    first_rows,
    head_index,
    no_plain_matrix,
    permute_inputs,
    permute_outputs,
)
from manyheads.hosts.timm_pyramid import TimmPyramid

__all__ = ["PVTAttention", "TimmPVT"]


class PVTAttention(nn.Module):
    """PVT-v2's attention layer with another mechanism between its projections.

    Children keep timm's names (`q`, `kv`, `sr`, `norm`, `proj`).

    Args:
        source: A `timm.models.pvt_v2.Attention`, or one of these; its children move
            here.
        geometry: Sizes of the layer.
        spec: The mechanism to put between the projections.
    """

    q: nn.Linear
    kv: nn.Linear
    core: Mechanism
    proj: nn.Linear

    def __init__(self, source: Any, geometry: Geometry, spec: AttentionSpec) -> None:
        super().__init__()
        self.num_heads, self.head_dim = geometry.num_heads, geometry.head_dim
        self.attn_dim, self.scale = geometry.attention_dim, geometry.scale
        self.query_dim = spec.num_query_heads(geometry) * self.head_dim
        self.q, self.kv = self._projecting(source.q, source.kv)
        self.core = build_core(spec, geometry, self.q.weight)
        self.proj, self.proj_drop = source.proj, source.proj_drop
        self.pool, self.sr = source.pool, source.sr
        self.norm, self.act = source.norm, source.act

    def forward(
        self, x: Float[Tensor, "B N C"], feat_size: Sequence[int]
    ) -> Float[Tensor, "B N C"]:
        """Project, mix, project; keys and values come from a coarser grid."""
        B, N, _ = x.shape
        rows, columns = feat_size
        source = self._reduced(x, (rows, columns))
        q = self.q(x).reshape(B, N, -1, self.head_dim)
        keys, values = self.kv(source).split([self.query_dim, self.attn_dim], dim=-1)
        k, v = (
            part.reshape(B, source.shape[1], -1, self.head_dim)
            for part in (keys, values)
        )
        mixed = self.core(q, k, v, None, (rows, columns))
        projected: Tensor = self.proj_drop(self.proj(mixed.reshape(B, N, -1)))
        return projected

    def _reduced(self, x: Tensor, grid: Grid) -> Tensor:
        """Give the tokens that keys and values are made of."""
        if self.sr is None:
            return x
        picture = x.transpose(1, 2).reshape(x.shape[0], -1, *grid)
        if self.pool is not None:
            picture = self.pool(picture)
        reduced: Tensor = self.norm(self.sr(picture).flatten(2).transpose(1, 2))
        return reduced if self.act is None else self.act(reduced)

    def _projecting(self, q: nn.Linear, kv: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
        """Keep the first heads of queries and keys, as many as the mechanism takes."""
        if q.out_features == self.query_dim:
            return q, kv
        kept = (0, self.query_dim)
        return (
            first_rows(q, [kept]),
            first_rows(kv, [kept, (self.attn_dim, self.attn_dim)]),
        )


class TimmPVT(TimmPyramid):
    """Hosts `timm.models.pvt_v2.PyramidVisionTransformerV2`, pooled variants too."""

    name: ClassVar[str] = "timm-pvt"

    def recognises(self, model: nn.Module) -> bool:
        """Look at the class only."""
        return _is(model, "PyramidVisionTransformerV2")

    def sites(self, model: Any) -> tuple[Site, ...]:
        """List the blocks of all stages in order."""
        height, width = self.image_input(model).size
        found: list[Site] = []
        for number, stage in enumerate(model.stages):
            cell = 4 * 2**number
            grid = (-(-height // cell), -(-width // cell))
            for place, block in enumerate(stage.blocks):
                if not isinstance(block.attn, PVTAttention) and not _is(
                    block.attn, "Attention"
                ):
                    return ()
                path = f"stages.{number}.blocks.{place}"
                found.append(_site(len(found), path, block, grid))
        return tuple(found)

    def swap_attention(
        self, model: nn.Module, site: Site, spec: AttentionSpec
    ) -> nn.Module:
        """Wrap the projections that are there around the new mechanism."""
        source = model.get_submodule(site.attention_path)
        return PVTAttention(source, site.geometry, spec)

    def permute_heads(self, model: nn.Module, site: Site, order: Sequence[int]) -> None:
        """Reorder rows of the projections, columns of the output."""
        layer: Any = model.get_submodule(site.attention_path)
        width = site.geometry.head_dim
        permute_outputs(layer.q, head_index(order, width))
        permute_outputs(layer.kv, head_index(order, width, parts=2))
        permute_inputs(layer.proj, head_index(order, width))

    def track_grid(self, model: nn.Module) -> None:
        """Nothing to do: every attention layer is told its grid by its block."""


def _is(module: nn.Module, name: str) -> bool:
    """Match by exact class: a subclass may compute something else."""
    kind = type(module)
    return kind.__module__ == "timm.models.pvt_v2" and kind.__name__ == name


def _site(index: int, path: str, block: Any, grid: Grid) -> Site:
    core = mechanism_of(block.attn)
    output = block.mlp.fc2 if _is(block.mlp, "MlpWithDepthwiseConv") else None
    return Site(
        index=index,
        path=path,
        attention_path=f"{path}.attn",
        ffn_path=f"{path}.mlp.fc2" if output is not None else None,
        geometry=core.geometry if core else _geometry(block.attn, grid),
        attention=core.spec if core else Softmax(),
        ffn=output.spec if isinstance(output, CompactLinear) else None,
        fixed_query_heads=no_plain_matrix(block.attn, "q", "kv", "proj"),
        keys_path=f"{path}.attn.kv" if block.attn.sr is not None else None,
    )


def _geometry(attention: Any, grid: Grid) -> Geometry:
    reduced = None
    if attention.pool is not None:
        reduced = attention.pool.output_size**2
    elif attention.sr is not None:
        down, right = attention.sr.stride
        reduced = max(1, grid[0] // down) * max(1, grid[1] // right)
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
