"""Interactive attention: landmarks stand between queries and keys, and heads talk.

Kang, Yang, Ryu, "Interactive Multi-Head Self-Attention with Linear Complexity", 2024,
arXiv 2402.17507 (iMHSA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from manyheads.attention.base import (
    AttentionSpec,
    CoreCost,
    Mechanism,
    key_mask_of,
)
from manyheads.attention.landmarks import interactive_maps, thin_maps
from manyheads.errors import GeometryMismatch, InvalidOption, nearest
from manyheads.geometry import Geometry, Grid
from manyheads.kernels.interactive import APART, Mixes, attend, find_landmarks

__all__ = [
    "Interactive",
    "InteractiveAttention",
    "Mix",
    "interactive_attention",
    "interactive_maps",
]

Mix = Literal["after", "before", "both", "none"]


class _Sizes(TypedDict):
    """Keywords of the slow forms."""

    grid: Grid
    landmarks: Grid
    scale: float
    mixes: Mixes
    key_mask: Tensor | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Interactive(AttentionSpec):
    """Attention through landmarks, linear in tokens, with heads that exchange maps.

    Queries and keys are averaged over the cells of a coarse grid laid on the image.
    Each head's map is cut into two thin ones, tokens by landmarks and landmarks by
    tokens, small enough that the heads' maps can be mixed:

        A_Q = mix(softmax_l(q kbar^T * scale))      [N, L] per head
        A_K = mix(softmax_n(qbar k^T * scale))      [L, N] per head
        out = A_Q (A_K v)                           right to left: no N x N anywhere

    `mix` says where an H x H matrix, which starts as the identity, mixes the heads of
    each map: "after" the softmax, "before" it, "both", or "none". It adds 2 H^2
    parameters to a layer, 4 H^2 for "both".

    Prefix tokens (class token, registers) are no part of the grid. They are queries
    and keys like any other, and each is a landmark of its own, so the number of
    landmarks is ``L = rows * columns + P``.

    Note:
        The product of two softmaxes is not the softmax of a product: a pretrained
        block is wrong until it is healed, with as many landmarks as tokens too.
        Differs from the paper, which does not fix in a form we could read: whether
        heads mix before or after the softmax, what prefix tokens do, and how the mix
        starts. All three are our choice.

    Attributes:
        landmarks: Rows and columns of cells; at most those of the patch grid, which
            they need not divide.
        mix: Where the heads are mixed.

    Raises:
        InvalidOption: `landmarks` is not two positive whole numbers, or `mix` is
            unknown.
    """

    landmarks: tuple[int, int] = (7, 7)
    mix: Mix = "after"

    def __post_init__(self) -> None:
        sides = self.landmarks
        if (
            not isinstance(sides, tuple)
            or len(sides) != 2
            or any(not isinstance(n, int) or isinstance(n, bool) for n in sides)
            or min(sides) < 1
        ):
            raise InvalidOption(
                asked=f"Interactive(landmarks={sides!r})",
                found="it is not a pair of positive whole numbers",
                fix="Use rows and columns of cells, e.g. landmarks=(7, 7).",
            )
        if self.mix not in get_args(Mix):
            raise InvalidOption(
                asked=f"Interactive(mix={self.mix!r})",
                found="there is no such place to mix heads",
                fix=nearest(str(self.mix), get_args(Mix)),
            )

    def problem(self, geometry: Geometry) -> str | None:
        """Refuse layers without a patch grid, and those that drop map entries.

        Raises:
            GeometryMismatch: The patch grid has fewer rows or columns than landmarks.
        """
        if geometry.grid is None:
            return (
                "its tokens have no rows and columns that are known, and landmarks "
                "are averages over the patch grid"
            )
        if geometry.attention_dropout > 0:
            return (
                f"the layer drops attention entries (p={geometry.attention_dropout}) "
                "and Interactive has two maps where it had one; build the model with "
                "attn_drop_rate=0"
            )
        _require_fit(self.landmarks, geometry.grid)
        return None

    def build(self, geometry: Geometry) -> InteractiveAttention:
        """Make the module; its mixes start as the identity."""
        return InteractiveAttention(self, geometry)

    def core_cost(self, geometry: Geometry, num_tokens: int) -> CoreCost:
        """Count the products, with rows x columns cells and ``L`` landmarks in all.

            making both maps     2 N L D
            mixing their heads   2 N L H^2      "both": twice that; "none": 0
            applying both        2 N L D
            averaging q and k    2 columns D (T + rows * grid rows),  T = N - P

        The paper's O(2 N L H (K + H)) is the first two lines, ``D = H K``.
        """
        N, D, H = num_tokens, geometry.attention_dim, geometry.num_heads
        rows, columns = self.landmarks
        patches = N - geometry.num_prefix_tokens
        L = rows * columns + geometry.num_prefix_tokens
        grid_rows = (geometry.grid or (0, 0))[0]
        averages = 2 * columns * D * (patches + rows * grid_rows)
        mixing = 2 * N * L * H**2 * _mixes_per_map(self.mix)
        return CoreCost(attention=4 * N * L * D + mixing + averages)


class InteractiveAttention(Mechanism):
    """Interactive attention as a module.

    Cost: O(N L (D + H^2)) time; memory as `interactive_attention`.

    Attributes:
        mix_queries: Mixes the heads of the tokens-by-landmarks map, [H, H], row = new
            head; for "both" [2, H, H], before and after; None without a mix.
        mix_keys: The same for the landmarks-by-tokens map.
        any_grid: Whether a grid with fewer rows or columns than landmarks is served
            too, by cells that overlap. Off in converted models, whose images have a
            native size; on in backbones that take any size.
    """

    needs_grid = True
    spec: Interactive
    mix_queries: nn.Parameter | None
    mix_keys: nn.Parameter | None

    def __init__(self, spec: Interactive, geometry: Geometry) -> None:
        super().__init__(spec, geometry)
        self.any_grid = False
        self.register_parameter("mix_queries", _identity(spec.mix, geometry.num_heads))
        self.register_parameter("mix_keys", _identity(spec.mix, geometry.num_heads))

    @property
    def mixes(self) -> Mixes:
        """The matrices by the place where they act."""
        before_queries, after_queries = _places(self.spec.mix, self.mix_queries)
        before_keys, after_keys = _places(self.spec.mix, self.mix_keys)
        return Mixes(before_queries, after_queries, before_keys, after_keys)

    def forward(
        self,
        q: Float[Tensor, "B N H K"],
        k: Float[Tensor, "B N H K"],
        v: Float[Tensor, "B N H K"],
        mask: Bool[Tensor, "B N"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B N H K"]:
        """Mix the values; a masked token is no key and enters no average.

        Raises:
            GeometryMismatch: The tokens are not those of the grid, or the image is so
                small that the grid has fewer rows or columns than landmarks.
        """
        return interactive_attention(
            # Normalised queries arrive in float32 under autocast, values do not.
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            grid=self._require_grid(grid, v.shape[1]),
            landmarks=self.spec.landmarks,
            scale=self.geometry.scale,
            mixes=self.mixes,
            key_mask=key_mask_of(mask, v.shape[0], v.shape[1], "Interactive"),
        )

    def maps(
        self,
        q: Float[Tensor, "B N H K"],
        k: Float[Tensor, "B N H K"],
        mask: Bool[Tensor, "B N"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B H N N"]:
        """Build ``A_Q A_K`` per head: O(H N^2) memory, for small N only."""
        return interactive_maps(q, k, **self._sizes(q, mask, grid))

    def rows(
        self,
        q: Float[Tensor, "B N H K"],
        k: Float[Tensor, "B N H K"],
        *,
        queries: Sequence[int],
        heads: Sequence[int],
        mask: Bool[Tensor, "B N"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B Mr Nr N"]:
        """Build some rows of some maps; O(H L N + Mr Nr N) memory."""
        sizes = self._sizes(q, mask, grid)
        return interactive_maps(q, k, queries=queries, heads=heads, **sizes)

    def influence(
        self,
        q: Float[Tensor, "B N H K"],
        k: Float[Tensor, "B N H K"],
        v: Float[Tensor, "B N H K"],
        *,
        queries: Sequence[int],
        mask: Bool[Tensor, "B N"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B Nr N"]:
        """Take the mean over heads without a map of any: thin maps side by side.

            mean_h A_Q[h] A_K[h] = [A_Q[1] .. A_Q[H]] / H  [A_K[1]; ..; A_K[H]]

        Cost: O(H L N + Nr N) memory.
        """
        sizes = self._sizes(q, mask, grid)
        over_marks, over_tokens = thin_maps(q, k, queries=queries, **sizes)
        beside = over_marks.transpose(1, 2).flatten(2) / over_marks.shape[1]
        return beside @ over_tokens.flatten(1, 2)  # [B, Nr, H L] [B, H L, N]

    def _sizes(self, q: Tensor, mask: Tensor | None, grid: Grid | None) -> _Sizes:
        """Say what both slow forms want to know besides queries and keys."""
        return {
            "grid": self._require_grid(grid, q.shape[1]),
            "landmarks": self.spec.landmarks,
            "scale": self.geometry.scale,
            "mixes": self.mixes,
            "key_mask": key_mask_of(mask, q.shape[0], q.shape[1], "Interactive"),
        }

    def _require_grid(self, grid: Grid | None, num_tokens: int) -> Grid:
        """Check the grid against tokens and landmarks.

        An exported program is not checked: comparisons would narrow the sizes it
        runs at, and overlapping cells are well defined for any grid.
        """
        prefix = self.geometry.num_prefix_tokens
        if grid is not None and torch.compiler.is_exporting():
            return grid
        if grid is None or prefix + grid[0] * grid[1] != num_tokens:
            raise GeometryMismatch(
                asked=f"Interactive was called with {num_tokens} tokens",
                found=f"the patch grid is {grid} and prefix tokens are {prefix}",
                why="landmarks are averages over the whole grid, so every patch must "
                "be there",
                fix="Switch off patch dropout and token merging, or use Hydra().",
            )
        if not self.any_grid:
            _require_fit(self.spec.landmarks, grid)
        return grid


def interactive_attention(
    q: Float[Tensor, "B N H K"],
    k: Float[Tensor, "B N H K"],
    v: Float[Tensor, "B N H K"],
    *,
    grid: Grid,
    landmarks: Grid = (7, 7),
    scale: float,
    mixes: Mixes = APART,
    key_mask: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B N H K"]:
    """Let tokens meet at landmarks instead of in pairs.

        A_Q = mix(softmax_l(q kbar^T * scale))      out = A_Q (A_K v)
        A_K = mix(softmax_n(qbar k^T * scale))

    Cost: O(N L (D + H^2)) time. The thin maps are the largest temporaries: without
    gradients one [B, H, L, N] stack and a portion of another, without a mix none.

    Args:
        q: Projected queries, prefix tokens first, then the grid row by row.
        k: Projected keys, in the same token order.
        v: Projected values, in the same token order.
        grid: Rows and columns of patch tokens; what is left of N are prefix tokens.
        landmarks: Rows and columns of cells to average over.
        scale: Factor on query-key products.
        mixes: Head-by-head matrices.
        key_mask: True for tokens that count. The others are no keys, enter no average,
            and a cell without any other token is no landmark.

    Returns:
        Mixed tokens, before the output projection.
    """
    q_marks, k_marks, marked = find_landmarks(q, k, grid, landmarks, key_mask)
    return attend(
        q,
        k,
        v,
        q_marks,
        k_marks,
        scale=scale,
        mixes=mixes,
        kept=key_mask,
        marked=marked,
    )


def _require_fit(landmarks: Grid, grid: Grid) -> None:
    """Refuse more landmarks than tokens on either side of the grid."""
    if landmarks[0] <= grid[0] and landmarks[1] <= grid[1]:
        return
    rows, columns = (min(pair) for pair in zip(landmarks, grid, strict=True))
    raise GeometryMismatch(
        asked=f"Interactive(landmarks={landmarks!r})",
        found=f"the patch grid is {grid[0]} x {grid[1]}",
        why="a landmark is the average of at least one token of its own",
        fix=f"Use landmarks=({rows}, {columns}) or fewer, or larger images.",
    )


def _mixes_per_map(mix: Mix) -> int:
    return {"none": 0, "before": 1, "after": 1, "both": 2}[mix]


def _identity(mix: Mix, num_heads: int) -> nn.Parameter | None:
    """Start each mix as the identity, so that a fresh layer mixes nothing."""
    count = _mixes_per_map(mix)
    if count == 0:
        return None
    eye = torch.eye(num_heads)
    return nn.Parameter(eye if count == 1 else eye.repeat(count, 1, 1))


def _places(
    mix: Mix, matrix: nn.Parameter | None
) -> tuple[Tensor | None, Tensor | None]:
    """Give the matrices before and after the softmax."""
    if matrix is None:
        return None, None
    if mix == "both":
        return matrix[0], matrix[1]
    return (matrix, None) if mix == "before" else (None, matrix)
