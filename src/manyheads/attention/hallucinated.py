"""Hallucinated attention: half of the maps are derived from the other half.

Xu, Zhou, He, Li, Wang, "Vision Transformer with Attention Map Hallucination and FFN
Compaction", 2023, arXiv 2306.10875; this file is its first half (hMHSA). The exact
forms without maps are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from manyheads.attention.base import (
    AttentionSpec,
    CoreCost,
    Mechanism,
    key_mask_of,
    require_grid,
)
from manyheads.attention.blending import (
    Blend,
    hallucinated_maps,
    hallucinated_rows,
    shifted_deltas,
)
from manyheads.attention.pairing import (
    group_by_served,
    inverse_order,
    join_heads,
    served_in_order,
    take_heads,
)
from manyheads.errors import GeometryMismatch, InvalidOption, nearest
from manyheads.geometry import Geometry, Grid
from manyheads.kernels.hallucinated import attend, blend_tokens
from manyheads.kernels.hallucinated_whole import hallucinated_attention, takes_whole

__all__ = ["Hallucinated", "HallucinatedAttention", "Layout", "Stage"]

Stage = Literal["probabilities", "logits"]
Layout = Literal["sequence", "grid"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Hallucinated(AttentionSpec):
    """Attention that computes half of its maps and derives the others from them.

    Queries and keys exist for the real heads only, ``ceil(H / 2)`` of them. Every
    other head blends the map of a real one, its partner, with a small kernel of its
    own, written as a sum of `rank` products of one factor over queries and one over
    keys. Such a blend needs no map: with R and S the convolutions over queries and
    keys, and A the partner's map after the softmax or its logits before,

        probabilities   (R A S^T) v     = R (A (S^T v))           A = softmax(q k^T)
        logits          R q k^T S^T     = (R q) (S k)^T           then softmax

    so the fused form convolves values and outputs, or queries and keys.

    `kernel_size` is the kernel's extent in tokens, `rank` its number of terms; "full"
    takes as many as can differ. `cross_map` adds a 1x1 mix across the hallucinated
    maps after the kernels. `exempt_prefix` keeps class and register tokens out of the
    blend: their rows and columns meet patches, never each other's neighbours. `layout`
    says what a token's neighbours are: those in the "sequence", as in the paper, where
    an image row's end meets the next row's start, or those in the "grid", 3x3 around
    it on the image.

    Cost: on probabilities ``(2 + rank) / 4`` of ordinary attention's core, on logits
    ``(3 + rank) / 4``; the projections of queries and keys are halved either way. With
    `cross_map` every hallucinated head pays for all: at ViT sizes that is more than
    ordinary attention. Every combination of options has a form that holds no N x N
    map; the tests compare each with the maps.

    Note:
        The paper fixes neither the stage, nor the kernel, nor the pairing, nor what
        happens to class tokens. A fresh hallucinated map is its partner's: first
        terms start as deltas, further ones as zero over queries and shifted deltas
        over keys, so that gradients reach them and no two are alike.
        Rows sum to one on logits; on probabilities they need not.
        With an odd number of heads the last real head has no hallucinated one.
        A masked key has weight zero, and a masked token enters no blend, as if the
        sequence ended there.

    Raises:
        InvalidOption: An option has a value that no layer could use.
    """

    takes_reduced_keys: ClassVar[bool] = True

    stage: Stage = "probabilities"
    kernel_size: int = 3
    rank: int | Literal["full"] = 1
    cross_map: bool = False
    exempt_prefix: bool = True
    layout: Layout = "sequence"

    def __post_init__(self) -> None:
        self._require_choice("stage", get_args(Stage))
        self._require_choice("layout", get_args(Layout))
        self._require_choice("cross_map", (True, False))
        self._require_choice("exempt_prefix", (True, False))
        size = self.kernel_size
        if type(size) is not int or size < 1 or size % 2 == 0:
            raise InvalidOption(
                asked=f"Hallucinated(kernel_size={size!r})",
                found="it is not an odd positive number of tokens",
                why="a kernel needs a centre",
                fix="Use kernel_size=3 or another odd number.",
            )
        whole = type(self.rank) is int and 1 <= self.rank <= self.num_taps
        if not whole and self.rank != "full":
            raise InvalidOption(
                asked=f"Hallucinated(rank={self.rank!r}, kernel_size={size})",
                found=f"such a kernel has between 1 and {self.num_taps} terms",
                fix='Use rank=1, or rank="full" for all of them.',
            )
        if self.layout == "grid" and not self.exempt_prefix:
            raise InvalidOption(
                asked='Hallucinated(layout="grid", exempt_prefix=False)',
                found="class and register tokens have no place on the grid",
                fix='Use Hallucinated(layout="grid").',
            )

    def _require_choice(self, name: str, choices: tuple[object, ...]) -> None:
        value = getattr(self, name)
        if type(value) is not type(choices[0]) or value not in choices:
            raise InvalidOption(
                asked=f"Hallucinated({name}={value!r})",
                found=f"there is no such {name}",
                fix=nearest(str(value), map(str, choices)),
            )

    @property
    def num_taps(self) -> int:
        """Entries of one factor of a kernel: a run of tokens, or a square of them."""
        return self.kernel_size ** (2 if self.layout == "grid" else 1)

    @property
    def num_terms(self) -> int:
        """Products of two factors that make one kernel."""
        return self.num_taps if self.rank == "full" else int(self.rank)

    def problem(self, geometry: Geometry) -> str | None:
        """Refuse layers that drop map entries, and grids that nobody can tell."""
        if geometry.attention_dropout > 0:
            return (
                f"the layer drops attention entries (p={geometry.attention_dropout}) "
                f"and {self} holds no map; build the model with attn_drop_rate=0"
            )
        if self.layout == "grid" and geometry.grid is None:
            return 'the rows and columns of its tokens are not known; use "sequence"'
        if self.layout == "grid" and geometry.reduced_keys is not None:
            return 'its keys lie on a coarser grid; use layout="sequence"'
        return None

    def exempt(self, geometry: Geometry) -> str | None:
        """Leave layers of one head as they are: there is no second map to derive."""
        if geometry.num_heads == 1:
            return "a single head has no second map to hallucinate"
        return None

    def num_query_heads(self, geometry: Geometry) -> int:
        """Real heads: half of them, rounded up."""
        return -(-geometry.num_heads // 2)

    def build(self, geometry: Geometry) -> HallucinatedAttention:
        """Make the module; every hallucinated map starts as its partner's."""
        return HallucinatedAttention(self, geometry)

    def core_cost(self, geometry: Geometry, num_tokens: int) -> CoreCost:
        """Count the products over token pairs; convolutions are element-wise work."""
        real = self.num_query_heads(geometry)
        derived, width = geometry.num_heads - real, geometry.head_dim
        num_keys = geometry.reduced_keys or num_tokens
        spread = derived if self.cross_map else 1
        wide = self.num_terms * spread * width
        extra = wide if self.stage == "probabilities" else wide + width
        pairs = num_tokens * num_keys
        # On logits the mix across maps multiplies what is convolved already.
        convolved = width if self.stage == "logits" else spread * width
        exempt = geometry.num_prefix_tokens if self.exempt_prefix else 0
        blended = num_tokens + num_keys - 2 * exempt
        blends = blended * derived * self.num_terms * convolved * self.num_taps
        terms = self.num_terms if self.stage == "logits" else 1
        mixes = num_tokens * derived**2 * terms * width if self.cross_map else 0
        return CoreCost(
            attention=pairs * (2 * real * width + derived * extra),
            elementwise=blends + mixes,
        )


class HallucinatedAttention(Mechanism):
    """Hallucinated attention without maps; two small kernels per hallucinated head.

    Cost: see `Hallucinated`; the largest temporaries are the widened values or queries
    and, on CPU, a block of the real maps, a few MiB. `maps` is quadratic.

    Attributes:
        query_kernel: Factors over queries [hallucinated heads, terms, taps].
        key_kernel: Factors over keys, of the same shape.
        cross: Weights across hallucinated maps, identity at the start, or None.
        partner: The real head of each hallucinated one; kept in checkpoints.
    """

    spec: Hallucinated
    partner: Tensor
    cross: nn.Parameter | None

    def __init__(self, spec: Hallucinated, geometry: Geometry) -> None:
        super().__init__(spec, geometry)
        self.needs_grid = spec.layout == "grid"
        self.num_real = spec.num_query_heads(geometry)
        self.num_derived = geometry.num_heads - self.num_real
        deltas = shifted_deltas(spec.num_terms, spec.num_taps)
        over_queries = torch.cat([deltas[:1], torch.zeros_like(deltas[1:])])
        self.query_kernel = nn.Parameter(over_queries.repeat(self.num_derived, 1, 1))
        self.key_kernel = nn.Parameter(deltas.repeat(self.num_derived, 1, 1))
        cross = nn.Parameter(torch.eye(self.num_derived)) if spec.cross_map else None
        self.register_parameter("cross", cross)
        self.register_buffer("partner", torch.arange(self.num_derived))
        self.pairing = tuple(range(self.num_derived))
        # torch leaves this method without types.
        self.register_load_state_dict_post_hook(_read_pairing)  # type: ignore[no-untyped-call]

    def pair(self, partner: Sequence[int]) -> None:
        """Say which real head each hallucinated one blends; several may share one.

        Raises:
            GeometryMismatch: It is not one real head for every hallucinated one.
        """
        pairing = tuple(partner)
        known = range(self.num_real)
        if len(pairing) != self.num_derived or any(p not in known for p in pairing):
            raise GeometryMismatch(
                asked=f"partners {list(pairing)}",
                found=f"there are {self.num_derived} hallucinated heads and the real "
                f"heads are 0-{self.num_real - 1}",
                fix="Name one real head for each hallucinated one.",
            )
        self.pairing = pairing
        self.partner = torch.tensor(pairing, device=self.partner.device)

    def forward(
        self,
        q: Float[Tensor, "B N Hq K"],
        k: Float[Tensor, "B S Hq K"],
        v: Float[Tensor, "B S H K"],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B N H K"]:
        """Mix the values without building a map; a masked token enters no blend."""
        q, k = q.to(v.dtype), k.to(v.dtype)
        kept = key_mask_of(mask, k.shape[0], k.shape[1], "Hallucinated")
        cells = self._cells(q, grid)
        if self.spec.stage == "logits":
            return self._on_logits(q, k, v, kept, cells)
        kernels = self.query_kernel, self.key_kernel
        served = served_in_order(self.pairing, self.num_real)
        plain = kept is None and self.cross is None and served is not None
        if plain and takes_whole(q, k, v, *kernels):
            sizes = served, self._prefix, cells, self.geometry.scale
            return cast("Tensor", hallucinated_attention(q, k, v, *kernels, *sizes))
        return self._on_probabilities(q, k, v, kept, cells)

    def maps(
        self,
        q: Float[Tensor, "B N Hq K"],
        k: Float[Tensor, "B S Hq K"],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B H N S"]:
        """Build the real maps, convolve them as pictures; O(H N S) memory."""
        kept = key_mask_of(mask, k.shape[0], k.shape[1], "Hallucinated")
        return hallucinated_maps(q, k, kept, self._blend(q, grid))

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
        """Build some rows of some maps; O(Mr Nr taps S) memory without `cross_map`."""
        kept = key_mask_of(mask, k.shape[0], k.shape[1], "Hallucinated")
        blend = self._blend(q, grid)
        return hallucinated_rows(q, k, kept, blend, queries=queries, heads=heads)

    def _blend(self, q: Tensor, grid: Grid | None) -> Blend:
        """Say in the type of the queries how maps are blended."""
        return Blend(
            stage=self.spec.stage,
            scale=self.geometry.scale,
            pairing=self.pairing,
            over_queries=self.query_kernel.to(q.dtype),
            over_keys=self.key_kernel.to(q.dtype),
            cross=None if self.cross is None else self.cross.to(q.dtype),
            prefix=self._prefix,
            cells=self._cells(q, grid),
        )

    def _on_probabilities(
        self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, cells: Grid | None
    ) -> Tensor:
        """Convolve values over keys, mix with the real maps, convolve over queries."""
        real, derived = v[:, :, : self.num_real], v[:, :, self.num_real :]
        if kept is not None:
            derived = derived * kept[:, :, None, None]
        values = derived[:, :, :, None]
        if self.cross is not None:  # Every hallucinated map meets the values of all.
            values = derived.flatten(2)[:, :, None, None]
        lanes = blend_tokens(values, self.key_kernel.flip(-1), self._prefix, cells)
        mixed, lanes = self._mix(q, k, real, lanes, kept)
        if kept is not None and q.shape[1] == k.shape[1]:
            lanes = lanes * kept[:, :, None, None, None]
        terms = blend_tokens(lanes, self.query_kernel, self._prefix, cells)
        blended = terms[:, :, :, 0] if terms.shape[3] == 1 else terms.sum(3)
        if self.cross is not None:
            pairs = torch.unflatten(blended, 3, (self.num_derived, -1))
            blended = (pairs * self.cross.t().to(v.dtype)[..., None]).sum(2)
        return torch.cat([mixed, blended], dim=2)

    def _mix(
        self, q: Tensor, k: Tensor, real: Tensor, lanes: Tensor, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Apply each real map to its own values and, beside them, to its lanes.

        Real heads that serve as many hallucinated ones go together:

            map h | v_h | lane of j | lane of j' |     one product, wide values
        """
        terms = lanes.shape[3:]
        width = terms.numel()
        lanes = lanes.flatten(3)  # [B, S, derived heads, terms * width]
        mixed, mixed_lanes, order, lane_order = [], [], [], []
        for heads, served in group_by_served(self.pairing, self.num_real):
            beside = take_heads(lanes, served)
            beside = beside.reshape(*beside.shape[:2], len(heads), -1)
            wide = torch.cat([take_heads(real, heads), beside], dim=3)
            queries, keys = take_heads(q, heads), take_heads(k, heads)
            out = attend(queries, keys, wide, kept, self.geometry.scale)
            mixed.append(out[..., : real.shape[3]])
            rest = out[..., real.shape[3] :]
            mixed_lanes.append(rest.reshape(*rest.shape[:2], len(served), width))
            order += heads
            lane_order += served
        back = take_heads(join_heads(mixed), inverse_order(order))
        lanes_back = take_heads(join_heads(mixed_lanes), inverse_order(lane_order))
        return back, lanes_back.reshape(*lanes_back.shape[:3], *terms)

    def _on_logits(
        self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, cells: Grid | None
    ) -> Tensor:
        """Convolve queries and keys of the partners; then they are ordinary heads."""
        entering = kept if q.shape[1] == k.shape[1] else None
        factors = []
        for x, kernel, alive in (
            (q, self.query_kernel, entering),
            (k, self.key_kernel, kept),
        ):
            source = take_heads(x, self.pairing)[:, :, :, None]
            if alive is not None:
                source = source * alive[:, :, None, None, None]
            factors.append(blend_tokens(source, kernel, self._prefix, cells).flatten(3))
        queries, keys = factors
        if self.cross is not None:
            weights = self.cross.to(v.dtype)[..., None]
            queries = (queries[:, :, None] * weights).flatten(3)
            shared = keys.flatten(2)[:, :, None]
            keys = shared.expand(-1, -1, self.num_derived, -1)
        scale = self.geometry.scale
        if queries.shape[3] == q.shape[3]:
            both = torch.cat([q, queries], dim=2), torch.cat([k, keys], dim=2)
            return attend(*both, v, kept, scale)
        real, derived = v[:, :, : self.num_real], v[:, :, self.num_real :]
        first = attend(q, k, real, kept, scale)
        return torch.cat([first, attend(queries, keys, derived, kept, scale)], dim=2)

    @property
    def _prefix(self) -> int:
        return self.geometry.num_prefix_tokens if self.spec.exempt_prefix else 0

    def _cells(self, q: Tensor, grid: Grid | None) -> Grid | None:
        """Rows and columns over which to blend; None for the sequence."""
        if self.spec.layout == "sequence":
            return None
        return require_grid(grid, q.shape[1] - self._prefix, repr(self.spec))


def _read_pairing(module: nn.Module, _: Any) -> None:
    """Take the partners from a checkpoint that was just loaded."""
    if isinstance(module, HallucinatedAttention) and not module.partner.is_meta:
        module.pair(module.partner.tolist())
