"""What every attention mechanism is: a spec, a module, and maps one can look at.

A *spec* is a small frozen value that a recipe holds and JSON carries. It builds a
*mechanism*: the module that mixes projected tokens. A mechanism knows nothing of
projections, residuals or hosts; it takes queries, keys and values and returns mixed
values, so that the same file serves every library.

Each mechanism exists twice. ``forward`` is fast and never holds a token-by-token map
where it can avoid it. ``maps`` is slow, holds all of them, and is the truth: the
oracle of the tests and the source of every picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from manyheads.errors import ManyheadsError, MaskRefused, NotExportable
from manyheads.geometry import Geometry, Grid
from manyheads.specs import Spec

__all__ = [
    "AttentionSpec",
    "CoreCost",
    "Mechanism",
    "apply_maps",
    "in_parts",
    "key_mask_of",
    "row_bytes",
]

_PART = 32 * 1024**2
"""Bytes of rows of maps that are built at once, where several are asked for."""


@dataclass(frozen=True, kw_only=True)
class CoreCost:
    """Work of one mechanism on one image, projections not included.

    Attributes:
        attention: Multiply-adds that make the attention maps and apply them, or that
            stand in their place. One multiply-add counts 1.
        elementwise: Further multiply-adds of the mechanism: norms, small mixes.
    """

    attention: int
    elementwise: int = 0


@dataclass(frozen=True, kw_only=True, repr=False)
class AttentionSpec(Spec):
    """A mechanism by name and options.

    Attributes:
        takes_reduced_keys: Whether keys and values may be other tokens than the
            queries, fewer as a rule.
    """

    takes_reduced_keys: ClassVar[bool] = False

    @abstractmethod
    def problem(self, geometry: Geometry) -> str | None:
        """Say in one clause why this layer cannot be served, or None if it can."""

    @abstractmethod
    def build(self, geometry: Geometry) -> Mechanism:
        """Make the module for one layer; its parameters start as documented there."""

    @abstractmethod
    def core_cost(self, geometry: Geometry, num_tokens: int) -> CoreCost:
        """Count the work on one image of `num_tokens` tokens, prefix included."""

    def exempt(self, geometry: Geometry) -> str | None:
        """Say why a layer is left as it is by rule, or None if it is not."""
        return None

    def num_query_heads(self, geometry: Geometry) -> int:
        """Heads for which queries and keys are projected; values always have all."""
        return geometry.num_heads


class Mechanism(nn.Module, ABC):
    """Mixes projected tokens; the part of attention between the two projections.

    Attributes:
        spec: The spec that built it.
        geometry: The layer it was built for.
        needs_grid: Whether ``forward`` must be told rows and columns of the tokens.
        accepts_pair_mask: Whether masks that differ between queries can be honoured.
    """

    needs_grid: bool = False
    accepts_pair_mask: ClassVar[bool] = False

    def __init__(self, spec: AttentionSpec, geometry: Geometry) -> None:
        super().__init__()
        self.spec = spec
        self.geometry = geometry

    @abstractmethod
    def forward(
        self,
        q: Float[Tensor, "B N Hq K"],
        k: Float[Tensor, "B S Hq K"],
        v: Float[Tensor, "B S H K"],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B N H K"]:
        """Mix the values; True in `mask` keeps a key.

        Raises:
            MaskRefused: The mask is not one per key and this mechanism needs that.
        """

    @abstractmethod
    def maps(
        self,
        q: Float[Tensor, "B N Hq K"],
        k: Float[Tensor, "B S Hq K"],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B M N S"]:
        """Build the maps that ``forward`` applies, [query, key]; O(M N^2) memory."""

    def reference(
        self,
        q: Float[Tensor, "B N Hq K"],
        k: Float[Tensor, "B S Hq K"],
        v: Float[Tensor, "B S H K"],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B N H K"]:
        """Do what ``forward`` does by building the maps and applying them."""
        return apply_maps(self.maps(q, k, mask, grid), v)

    def __prepare_scriptable__(self) -> Mechanism:
        """Refuse `torch.jit.script`, which torch asks before it compiles a module."""
        raise NotExportable(
            asked="torch.jit.script of a converted model",
            found=f"{self.spec} is written for torch.compile and torch.export",
            why="scripting is deprecated and knows neither protocols nor shape types",
            fix="Use torch.export.export(model, ...) or torch.compile(model).",
        )

    @property
    def num_maps(self) -> int:
        """Maps ``M``: one per head, unless the mechanism has others."""
        return self.geometry.num_heads

    def rows(
        self,
        q: Float[Tensor, "B N Hq K"],
        k: Float[Tensor, "B S Hq K"],
        *,
        queries: Sequence[int],
        heads: Sequence[int],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B Mr Nr S"]:
        """Build some rows of some of the `maps`.

        Cost: that of all maps, unless the mechanism can do with less.
        """
        whole = self.maps(q, k, mask, grid)
        return whole[:, list(heads)][:, :, list(queries)]

    def influence(
        self,
        q: Float[Tensor, "B N Hq K"],
        k: Float[Tensor, "B S Hq K"],
        v: Float[Tensor, "B S H K"],
        *,
        queries: Sequence[int],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B Nr S"]:
        """Weigh how much each token gives to some queries, all maps together.

        The mean over maps, where one map is as good as another.

        Cost: O(Nr S) memory and rows of all maps of a few queries at a time, where the
        mechanism has rows of its own.
        """
        every = range(self.num_maps)

        def mean(part: Sequence[int]) -> Tensor:
            rows = self.rows(q, k, queries=part, heads=every, mask=mask, grid=grid)
            return rows.mean(dim=1)

        # Without rows of its own, every part would build all maps again.
        if type(self).rows is Mechanism.rows:
            return mean(queries)
        return in_parts(mean, queries, row_bytes(q, k) * self.num_maps)

    def contributions(
        self,
        k: Float[Tensor, "B S Hq K"],
        v: Float[Tensor, "B S H K"],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
    ) -> Float[Tensor, "B S"] | None:
        """Give each token's share of the summary; None where there is no summary."""
        return None

    def extra_repr(self) -> str:
        """Show the options beside the class name when a model is printed."""
        return repr(self.spec)


def row_bytes(q: Float[Tensor, "B N Hq K"], k: Float[Tensor, "B S Hq K"]) -> int:
    """Say how many bytes a row of one map takes, over all images.

    At most: half types count as float32, in which some mechanisms build their maps.
    """
    widest = torch.promote_types(q.dtype, torch.float32)
    return widest.itemsize * k.shape[0] * k.shape[1]


def in_parts(
    build: Callable[[Sequence[int]], Tensor], queries: Sequence[int], query_bytes: int
) -> Tensor:
    """Build rows for some queries, so few at a time that what passes stays small.

    Args:
        build: Gives [..., Nr, S] for Nr of the queries.
        queries: All queries.
        query_bytes: Bytes of what `build` makes for one query on its way.

    Returns:
        The rows of all queries, in memory once.
    """
    step = max(1, _PART // max(1, query_bytes))
    rows = build(queries[:step])
    if len(queries) <= step:
        return rows
    whole = rows.new_empty(*rows.shape[:-2], len(queries), rows.shape[-1])
    whole[..., :step, :] = rows
    for start in range(step, len(queries), step):
        del rows  # or two parts would be there while the next one is built
        rows = build(queries[start : start + step])
        whole[..., start : start + step, :] = rows
    return whole


def apply_maps(
    maps: Float[Tensor, "B M N S"], v: Float[Tensor, "B S H K"]
) -> Float[Tensor, "B N H K"]:
    """Let each map mix its share of the value features.

    The ``D = H K`` features are cut into M runs of ``D / M``; with one map per head a
    run is a head, with one map per feature a run is a feature.

        out[n, m-th run] = sum_j maps[m, n, j] v[j, m-th run]
    """
    runs = v.reshape(*v.shape[:2], maps.shape[1], -1)  # [B, S, M, D / M]
    mixed = torch.einsum("bmij,bjmd->bimd", maps.to(v.dtype), runs)
    return mixed.reshape(*mixed.shape[:2], *v.shape[2:])


def key_mask_of(
    mask: Tensor | None, batch: int, num_tokens: int, name: str
) -> Bool[Tensor, "B N"] | None:
    """Read a mask as one truth value per key, or refuse it.

    Args:
        mask: None, or boolean with True for keys that count, of any shape that
            broadcasts to [B, H, N, N] without telling queries or heads apart, or
            [B, N] itself.
        batch: Images ``B``.
        num_tokens: Tokens ``N``.
        name: The mechanism, for the message.

    Raises:
        MaskRefused: The mask is additive, or differs between queries or heads.
    """
    if mask is None:
        return None
    shape = tuple(mask.shape)
    per_key = shape in {(batch, num_tokens), (1, num_tokens)} or (
        len(shape) == 4 and shape[0] in (1, batch) and shape[1:] == (1, 1, num_tokens)
    )
    if mask.dtype is not torch.bool or not per_key:
        raise MaskRefused(
            asked=f"{name} was called with a {mask.dtype} mask of shape {list(shape)}",
            found="it sums over tokens once: a key counts for all queries or for none",
            why="a mask that differs between queries would be silently ignored",
            fix=f"Pass a boolean mask [B, 1, 1, N] = [{batch}, 1, 1, {num_tokens}] "
            "that is True for real tokens, or keep Softmax() in these blocks.",
        )
    return mask.reshape(-1, num_tokens).expand(batch, num_tokens)


def require_grid(grid: Grid | None, num_patches: int, name: str) -> Grid:
    """Return the grid if it holds these tokens; its absence is a mistake of ours."""
    if grid is None or grid[0] * grid[1] != num_patches:
        raise ManyheadsError(
            asked=f"{name} needs the rows and columns of {num_patches} patch tokens",
            found=f"the host passed grid={grid}",
            fix="Please report this with the model's name and the image size.",
        )
    return grid
