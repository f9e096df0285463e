"""Attention maps, as the model applies them: always from the mechanism's slow form.

A map is what a head multiplies its values with, so maps applied to values give the
block's output back; the tests hold every mechanism to that. Libraries' own hooks come
back empty where attention is fused, and a linear attention has no map to hook.

Abnar, Zuidema, "Quantifying Attention Flow in Transformers", 2020, arXiv 2005.00928,
for the rollout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention import Mechanism
from manyheads.attention.base import in_parts, row_bytes
from manyheads.captures import (
    Call,
    Pictures,
    key_grid,
    key_run,
    padded,
    picture_tensor,
    require_all,
    watch,
)
from manyheads.data.photographs import restore
from manyheads.errors import InvalidOption, ManyheadsError, MapsTooLarge
from manyheads.geometry import Grid
from manyheads.hosts import Site, find_host

__all__ = ["BlockMaps", "Maps", "attention_maps", "attention_rollout"]

LIMIT = 2 * 1024**3
"""Bytes of maps that one call builds at most."""
_CHUNK = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockMaps:
    """The maps of one block.

    Attributes:
        block: Block number.
        path: Module path of its attention.
        mechanism: What mixes tokens there.
        per: Whether a map belongs to a head or to a single feature.
        heads: Which heads, or features, are there.
        queries: Which query tokens are there; prefix tokens come first.
        maps: What is applied to the values, of these heads and queries.
        influence: All maps together: how much each token gives to these queries. The
            mean over heads; for Hydra the length of what a token adds.
        contributions: For Hydra: each token's share of the summary, summing to one.
        values: What the maps are applied to.
        num_prefix_tokens: Tokens before the patch grid.
        grid: Rows and columns of what is looked at, the patches or the fewer keys made
            of them; None where they are no grid.
        key_run: Patches, one after the other, that one key stands for; 1 as a rule.
    """

    block: int
    path: str
    mechanism: str
    per: Literal["head", "feature"]
    heads: tuple[int, ...]
    queries: tuple[int, ...]
    maps: Float[Tensor, "B M Nq S"]
    influence: Float[Tensor, "B Nq S"]
    contributions: Float[Tensor, "B S"] | None
    values: Float[Tensor, "B S H K"]
    num_prefix_tokens: int
    grid: Grid | None
    key_run: int = 1

    def on_grid(self, weights: Float[Tensor, "*B S"]) -> Float[Tensor, "*B rows cols"]:
        """Lay the patches' part of a row of weights out as the image lies.

        Raises:
            ManyheadsError: The tokens of this block are no grid.
        """
        if self.grid is None:
            raise ManyheadsError(
                asked=f"a picture of block {self.block}",
                found=f"its {weights.shape[-1]} tokens are no grid of patches",
                where=self.path,
                fix="Look at .maps; choose other blocks to draw.",
            )
        patches = weights[..., self.num_prefix_tokens :]
        if self.key_run > 1:
            # Each patch of a run has its share; those after the last run have none.
            patches = patches.repeat_interleave(self.key_run, dim=-1) / self.key_run
            patches = F.pad(patches, (0, prod(self.grid) - patches.shape[-1]))
        return patches.reshape(*patches.shape[:-1], *self.grid)


@dataclass(frozen=True, kw_only=True, eq=False)
class Maps:
    """Maps of some blocks of a model for some images.

    Attributes:
        blocks: One entry per block that was asked for.
        pictures: The images as the model saw them, in [0, 1], padding included.
        image_size: Height and width that were asked for.
    """

    blocks: tuple[BlockMaps, ...]
    pictures: Float[Tensor, "B C H W"]
    image_size: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Say what is here; the maps themselves are tensors."""
        return {
            "image_size": list(self.image_size),
            "images": len(self.pictures),
            "blocks": [
                {
                    "block": one.block,
                    "path": one.path,
                    "mechanism": one.mechanism,
                    "per": one.per,
                    "heads": list(one.heads),
                    "queries": list(one.queries),
                    "shape": list(one.maps.shape),
                    "grid": list(one.grid) if one.grid else None,
                }
                for one in self.blocks
            ],
        }

    def __str__(self) -> str:
        return "\n".join(
            f"block {one.block} {one.path}: {one.mechanism}, {len(one.heads)} "
            f"{one.per}s, {len(one.queries)} queries, maps {list(one.maps.shape)}"
            for one in self.blocks
        )


def attention_maps(
    model: nn.Module,
    images: Pictures,
    *,
    blocks: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    queries: Iterable[int] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Maps:
    """Give the maps that a model applies to its values, converted or not.

    Softmax, interactive and hallucinated attention have one map per head. Hydra has
    one per feature; its `influence` sums them up for a query token, and its
    `contributions` say how much each token has put into the summary.

    Cost: one run of the model; M heads and Q queries take (M + 1) Q N numbers a block,
    the influence among them. Beside these, block after block, a few parts of 32 MiB
    are held, where the mechanism's rows do not depend on each other; name few blocks,
    heads and queries at large sizes.

    Args:
        model: A hosted model; it is not touched.
        images: Preprocessed images [B, C, H, W], or picture files.
        blocks: Block numbers, negative ones from the end; None for all that have maps,
            which is all but blocks that mix tokens by a convolution.
        heads: Heads, or features of Hydra blocks; None for all, () for the influence
            alone.
        queries: Query tokens, prefix tokens first, so that 0 is the class token of a
            model that has one; None for all.
        image_size: Height and width for picture files; None for the native size.

    Raises:
        UnknownHost: No host knows the model.
        InvalidOption: A block, head or query is out of range, or a block has no maps.
        MapsTooLarge: More than 2 GiB of maps were asked for.
        DataError: An image cannot be read, has the wrong form or type, or holds NaN.
        ImageSizeError: The size gives no valid token grid.
    """
    host, sites = find_host(model)
    chosen = _with_maps(sites, blocks)
    wanted = host.image_input(model)
    shown = picture_tensor(images, wanted, image_size)
    wished = tuple(None if x is None else tuple(x) for x in (heads, queries))
    found: dict[int, BlockMaps] = {}
    spent = [0]

    def look(site: Site, call: Call, fed: tuple[int, int]) -> None:
        grid = key_grid(site, call, wanted.size, fed)
        found[site.index] = _build(site, call, wished[0], wished[1], grid, spent)

    picked = [sites[number] for number in chosen]
    fed = watch(model, host, picked, shown, look)
    require_all(picked, found)
    return Maps(
        blocks=tuple(found[number] for number in chosen),
        pictures=restore(padded(shown, fed), wanted),
        image_size=(shown.shape[-2], shown.shape[-1]),
    )


def attention_rollout(
    model: nn.Module,
    images: Pictures,
    *,
    queries: Iterable[int] = (0,),
    image_size: tuple[int, int] | None = None,
) -> Float[Tensor, "B Nq N"]:
    """Follow attention through all blocks, of whatever mechanisms, to the patches.

    Half of a token passes a block as it is, the other half is mixed in proportion to
    the influence of the tokens:

        rollout = product over blocks of (I + rows of |influence| / their sum) / 2

    Only the rows of the asked queries are followed, from the last block to the first.

    Cost: queries, keys and values of all blocks are held, O(blocks N D); no N x N
    matrix is, where the mechanism's rows do not depend on each other.

    Args:
        model: A hosted model; it is not touched.
        images: Preprocessed images [B, C, H, W], or picture files.
        queries: Query tokens of the last block; the class token by default.
        image_size: Height and width for picture files; None for the native size.

    Returns:
        For each query the share of every token of the first block; rows sum to one.

    Raises:
        UnknownHost: No host knows the model.
        InvalidOption: A query is out of range.
        ManyheadsError: Blocks have different tokens, as in hierarchical models, or mix
            them by a convolution.
        DataError: An image cannot be read, has the wrong form or type, or holds NaN.
    """
    host, sites = find_host(model)
    if fixed := [site for site in sites if site.fixed]:
        raise ManyheadsError(
            asked=f"a rollout through {type(model).__name__}",
            found=f"{fixed[0].fixed}, and a rollout follows maps",
            where=fixed[0].attention_path,
            fix="Look at single blocks with attention_maps(model, images).",
        )
    shown = picture_tensor(images, host.image_input(model), image_size)
    calls: dict[int, Call] = {}
    watch(model, host, sites, shown, lambda s, c, _: calls.update({s.index: c}))
    require_all(sites, calls)
    counts = sorted({n for c in calls.values() for n in (c.q.shape[1], c.k.shape[1])})
    if len(counts) > 1:
        raise ManyheadsError(
            asked=f"a rollout through {type(model).__name__}",
            found=f"its blocks have {', '.join(map(str, counts))} tokens",
            why="a token of one stage is no token of another",
            fix="Look at single blocks with attention_maps(model, images, blocks=...).",
        )
    rows = _numbers("queries", queries, counts[0])
    flow = F.one_hot(torch.tensor(rows), counts[0]).double()
    flow = flow.expand(len(shown), -1, -1)
    for index in sorted(calls, reverse=True):
        flow = _through(calls[index], flow)
    return flow.float()


def _through(call: Call, flow: Tensor) -> Tensor:
    """Pass a block backwards, some rows of its influence at a time."""
    mixed = torch.zeros_like(flow)
    for start in range(0, flow.shape[-1], _CHUNK):
        part = range(start, min(start + _CHUNK, flow.shape[-1]))
        weights = call.core.influence(
            call.q, call.k, call.v, queries=part, mask=call.mask, grid=call.grid
        )
        weights = weights.double().abs().cpu()
        total = weights.sum(dim=-1, keepdim=True)
        # A token that nothing gives to keeps what it has.
        itself = F.one_hot(torch.tensor(part), flow.shape[-1]).to(weights)
        weights = torch.where(total > 0, weights / total, itself)
        mixed += flow[..., part.start : part.stop] @ weights
    return (flow + mixed) / 2


def _build(
    site: Site,
    call: Call,
    heads: Sequence[int] | None,
    queries: Sequence[int] | None,
    grid: Grid | None,
    spent: list[int],
) -> BlockMaps:
    """Build what was asked for of one block, if it fits beside what is there."""
    core, keys = call.core, call.k.shape[1]
    maps = _numbers("heads", heads, core.num_maps, where=site.attention_path)
    rows = _numbers("queries", queries, call.q.shape[1], where=site.attention_path)
    row = row_bytes(call.q, call.k)
    spent[0] += row * len(rows) * (len(maps) + 1)
    # Without rows of its own a mechanism builds all of a block's maps on the way.
    whole = type(core).rows is Mechanism.rows
    passing = row * call.q.shape[1] * core.num_maps if whole else 0
    needed = (spent[0] + passing) / 1024**3
    if spent[0] + passing > LIMIT:
        raise MapsTooLarge(
            asked=f"maps of {len(maps)} heads or features for {len(rows)} queries",
            found=f"up to block {site.index} they take {needed:.1f} GiB "
            f"at {keys} tokens, more than {LIMIT / 1024**3:.0f}",
            where=site.attention_path,
            fix=f"{type(core.spec).__name__} builds all maps of a block at once: use a "
            "smaller image."
            if passing > LIMIT
            else "Ask for less: blocks=[-1], heads=range(4), queries=[0]; heads=() for "
            "the influence alone.",
        )
    seen = core.influence(
        call.q, call.k, call.v, queries=rows, mask=call.mask, grid=call.grid
    )
    given = core.contributions(call.k, call.v, call.mask)
    return BlockMaps(
        block=site.index,
        path=site.attention_path,
        mechanism=repr(core.spec),
        per="head" if core.num_maps == core.geometry.num_heads else "feature",
        heads=maps,
        queries=rows,
        maps=_rows(call, maps, rows, whole=whole),
        influence=seen.cpu(),
        contributions=None if given is None else given.cpu(),
        # A view would keep the queries and keys of its projection with it.
        values=call.v.cpu().contiguous(),
        num_prefix_tokens=core.geometry.num_prefix_tokens,
        grid=grid,
        key_run=key_run(site),
    )


def _rows(
    call: Call, maps: Sequence[int], rows: Sequence[int], *, whole: bool
) -> Float[Tensor, "B M Nq S"]:
    """Build some rows of some maps, a few at a time where that is no detour."""

    def build(part: Sequence[int]) -> Tensor:
        built = call.core.rows(
            call.q, call.k, queries=part, heads=maps, mask=call.mask, grid=call.grid
        )
        return built.cpu()

    if not maps:
        none = call.q.new_zeros(len(call.q), 0, len(rows), call.k.shape[1])
        return none.cpu()
    if whole:
        return build(rows)
    return in_parts(build, rows, row_bytes(call.q, call.k) * len(maps))


def _with_maps(sites: Sequence[Site], blocks: Iterable[int] | None) -> tuple[int, ...]:
    """Choose among the blocks that have maps; one without is no silent omission."""
    chosen = _numbers("blocks", blocks, len(sites))
    there = tuple(number for number in chosen if not sites[number].fixed)
    if blocks is not None and there != chosen:
        without = next(sites[number] for number in chosen if sites[number].fixed)
        raise InvalidOption(
            asked=f"maps of block {without.index}",
            found=f"it has none: {without.fixed}",
            where=without.attention_path,
            fix=f"Use blocks={[site.index for site in sites if not site.fixed]}.",
        )
    return there


def _numbers(
    name: str, given: Iterable[int] | None, count: int, *, where: str = ""
) -> tuple[int, ...]:
    """Check indices, negative ones from the end."""
    if given is None:
        return tuple(range(count))
    listed = tuple(given)
    outside = [n for n in listed if not -count <= n < count]
    if outside:
        raise InvalidOption(
            asked=f"{name}={list(listed)}",
            found=f"there are {count}, so {', '.join(map(str, outside))} is not there",
            where=where,
            fix=f"Use numbers from 0 to {count - 1}, or leave {name} out for all.",
        )
    return tuple(n % count for n in listed)
