"""What a model's mechanisms are called with, block by block, for given pictures."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention import Mechanism, Softmax
from manyheads.data.photographs import misfit, prepare_files
from manyheads.errors import DataError, ManyheadsError
from manyheads.geometry import Grid
from manyheads.hosts import Host, ImageInput, Site, mechanism_of
from manyheads.surgery import Operation, apply_swaps

__all__ = [
    "Call",
    "Pictures",
    "key_grid",
    "key_run",
    "padded",
    "picture_tensor",
    "require_all",
    "watch",
]

Pictures = Tensor | str | Path | Sequence[str | Path]
"""Preprocessed images [B, C, H, W], or picture files."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """What a mechanism was called with."""

    core: Mechanism
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    grid: Grid | None


def watch(
    model: nn.Module,
    host: Host,
    sites: Sequence[Site],
    images: Tensor,
    look: Callable[[Site, Call, tuple[int, int]], None],
) -> tuple[int, int]:
    """Run a copy and show what each block's mechanism is called with.

    Blocks that still hold their library's own attention get ours in the copy: the
    identity swap, which leaves every output as it is.
    """
    copied = copy.deepcopy(model).eval()
    fed = host.resize(copied, (images.shape[-2], images.shape[-1]))
    plain = [
        Operation(site=site, attention=Softmax(), ffn=None)
        for site in sites
        if mechanism_of(copied.get_submodule(site.attention_path)) is None
    ]
    apply_swaps(copied, host, plain)
    parameter = next(copied.parameters())
    with ExitStack() as hooks, torch.no_grad():
        for site in sites:
            core = mechanism_of(copied.get_submodule(site.attention_path))
            if core is not None:
                note = _noting(site, fed, look)
                handle = core.register_forward_pre_hook(note, with_kwargs=True)
                hooks.callback(handle.remove)
        host.feed(copied, padded(images, fed).to(parameter))
    return fed


def _noting(
    site: Site,
    fed: tuple[int, int],
    look: Callable[[Site, Call, tuple[int, int]], None],
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def note(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(core.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        look(site, Call(core=core, **bound.arguments), fed)

    return note


def picture_tensor(
    images: Pictures, wanted: ImageInput, image_size: tuple[int, int] | None
) -> Tensor:
    """Take preprocessed images as they are, and prepare files.

    Raises:
        DataError: A file cannot be read, or the tensor has the wrong form or type, or
            holds what is no number.
    """
    if isinstance(images, str | Path):
        images = [images]
    if not isinstance(images, Tensor):
        return prepare_files(images, wanted, image_size)
    if problem := misfit(images, wanted.channels):
        raise DataError(
            asked=f"attention maps of a tensor {list(images.shape)}",
            found=problem,
            fix=f"Pass a float tensor [B, {wanted.channels}, H, W], normalised as the "
            "model wants it, or picture files.",
        )
    return images


def padded(images: Tensor, fed: tuple[int, int]) -> Tensor:
    """Add zeros at the bottom and on the right, up to whole patches."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, fed[1] - width, 0, fed[0] - height))


def key_grid(
    site: Site, call: Call, native: tuple[int, int], fed: tuple[int, int]
) -> Grid | None:
    """Give rows and columns of what a block looks at: the patches, or fewer keys.

    Args:
        site: The block.
        call: What its mechanism was called with.
        native: Height and width in pixels at which the site's own grid holds.
        fed: Height and width of the images that the call saw.

    Returns:
        None where the keys are no grid.
    """
    prefix, known = site.geometry.num_prefix_tokens, site.geometry.grid
    queries, keys = call.q.shape[1] - prefix, call.k.shape[1] - prefix
    grid = call.grid or (_scaled(known, native, fed) if known else None)
    if grid is None or prod(grid) != queries or keys < 1:
        return None
    if site.keys_in_runs or keys == queries:
        return grid
    found = _coarser(grid, keys)
    if found is None and known and keys == site.geometry.reduced_keys:
        # Pooled to as many keys at any size: they lie as at the native one.
        found = _coarser(known, keys)
    return found


def key_run(site: Site) -> int:
    """Count the patches, one after the other, that one key stands for; 1 as a rule."""
    geometry = site.geometry
    if not site.keys_in_runs or not geometry.grid or not geometry.reduced_keys:
        return 1
    # Of the native size: in a small image patches beyond the last run blur the ratio.
    return prod(geometry.grid) // geometry.reduced_keys


def _scaled(grid: Grid, native: tuple[int, int], fed: tuple[int, int]) -> Grid:
    """Scale the native grid; pyramids make a cell of what is left over at an edge."""
    rows, columns = (
        -(-side * cells // size)
        for side, cells, size in zip(fed, grid, native, strict=True)
    )
    return rows, columns


def _coarser(grid: Grid, keys: int) -> Grid | None:
    """Lay keys out that are squares of patches each; what an edge cuts off is lost.

    Larger squares leave fewer rows and fewer columns, so that a number of keys has one
    grid at most.
    """
    for side in range(1, min(grid) + 1):
        rows, columns = grid[0] // side, grid[1] // side
        if rows * columns == keys:
            return rows, columns
    return None


def require_all(sites: Sequence[Site], found: dict[int, Any]) -> None:
    """A block that was never run has no map; an empty answer would hide that."""
    missing = [site for site in sites if site.index not in found]
    if missing:
        raise ManyheadsError(
            asked=f"maps of block {missing[0].index}",
            found="the model did not run it for these images",
            where=missing[0].attention_path,
            fix=f"Leave it out: blocks={sorted(found)}. ",
        )
