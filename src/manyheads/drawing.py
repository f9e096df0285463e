"""Pictures of attention maps, laid over the photograph, as PNG.

Colours say how much a patch is looked at as a multiple of the average patch, so that 1
is indifference whatever the mechanism and the image size. Panels that one would
compare share one scale: all heads of a block, and all models in a comparison.
"""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.drafts import draft_of
from manyheads.errors import DataError, InvalidOption, MissingExtra
from manyheads.maps import BlockMaps, Maps

__all__ = ["draw"]

_MOST_PANELS = 12
_INCH = 2.0
# Letters that fit above a panel at 9 points, and into an inch of the title at 11.
_PANEL_LETTERS, _TITLE_LETTERS = 28, 11


@dataclass(frozen=True, kw_only=True, eq=False)
class _Panel:
    """One map over one photograph."""

    title: str
    weights: Tensor
    signed: bool


def draw(
    maps: Maps | Mapping[str, Maps],
    path: str | Path,
    *,
    title: str = "",
    image: int = 0,
    query: int | None = None,
) -> Path:
    """Draw maps over their photograph and write them as PNG.

    One `Maps` gives a grid: a row per block, with the photograph, all heads together,
    for Hydra the contributions to the summary, and a column per head. A mapping from
    names to `Maps` compares models: a row per block, a column per model, say teacher,
    student before and student after healing.

    Args:
        maps: What to draw.
        path: The PNG to write; what is there is replaced.
        title: A line above the picture.
        image: Which of the images.
        query: Which query token; None for the class token where there is one, else the
            mean over the query tokens that are there.

    Returns:
        The path.

    Raises:
        MissingExtra: matplotlib is not installed.
        InvalidOption: There are more than 12 maps to a row, the models that are to be
            compared have different blocks, or the query or image is not there.
        DataError: The file cannot be written.
    """
    figure = compose(maps, title=title, image=image, query=query)
    target = Path(path)
    try:
        with draft_of(target) as draft:
            figure.savefig(draft, dpi=110, format="png")
    except OSError as error:
        raise DataError(
            asked=f"drawing to {target}",
            found=f"it cannot be written: {error}",
            fix="Choose a folder that exists and that you may write to, on a disk with "
            "room.",
        ) from error
    return target


def compose(
    maps: Maps | Mapping[str, Maps],
    *,
    title: str = "",
    image: int = 0,
    query: int | None = None,
) -> Any:
    """Lay out what `draw` writes, as a matplotlib Figure.

    Raises:
        MissingExtra: matplotlib is not installed.
        InvalidOption: What is asked for cannot be drawn.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtra(
            asked="drawing attention maps",
            found="matplotlib is not installed",
            fix='pip install "manyheads[draw]"',
        ) from error
    several = maps if isinstance(maps, Mapping) else {"": maps}
    _require_drawable(several, image)
    first = next(iter(several.values()))
    rows = [
        _compared(several, number, image, query)
        if isinstance(maps, Mapping)
        else _heads(first.blocks[number], image, query)
        for number in range(len(first.blocks))
    ]
    names = [_row_name(several, number) for number in range(len(rows))]
    whose = _asked(first.blocks, query)
    picture = first.pictures[image]
    colours = picture if len(picture) == 3 else picture[:1].expand(3, -1, -1)
    photo = colours.permute(1, 2, 0).numpy()
    figure = _figure(figures, photo, rows, names)
    above = f"{title}\n{whose}" if title else whose
    across = int(figure.get_figwidth() * _TITLE_LETTERS)
    figure.suptitle(_wrapped(above, across), fontsize=11)
    return figure


def _wrapped(text: str, letters: int) -> str:
    """Break lines that are too long: neighbours would write over each other."""
    lines = text.split("\n")
    return "\n".join(part for line in lines for part in textwrap.wrap(line, letters))


def _heads(block: BlockMaps, image: int, query: int | None) -> list[_Panel]:
    """Give a row of one block: all maps together, then one by one."""
    together = "all heads" if block.per == "head" else "influence"
    panels = [_panel(together, block, _of_query(block, block.influence[image], query))]
    if block.contributions is not None:
        panels.append(_panel("given to the summary", block, block.contributions[image]))
    for place, head in enumerate(block.heads):
        row = _of_query(block, block.maps[image, place], query)
        panels.append(_panel(f"{block.per} {head}", block, row))
    return panels


def _compared(
    several: Mapping[str, Maps], number: int, image: int, query: int | None
) -> list[_Panel]:
    """Give a row of one block as several models have it."""
    blocks = [(name, maps.blocks[number]) for name, maps in several.items()]
    return [
        _panel(
            f"{name}\n{block.mechanism}",
            block,
            _of_query(block, block.influence[image], query),
        )
        for name, block in blocks
    ]


def _panel(title: str, block: BlockMaps, weights: Tensor) -> _Panel:
    """Scale to multiples of the average patch, by size where signs differ."""
    patches = block.on_grid(weights.float())
    average = patches.abs().mean().clamp_min(1e-30)
    return _Panel(
        title=_wrapped(title, _PANEL_LETTERS),
        weights=patches / average,
        signed=bool((patches < 0).any()),
    )


def _of_query(block: BlockMaps, rows: Tensor, query: int | None) -> Tensor:
    if query is None and not (block.num_prefix_tokens and 0 in block.queries):
        return rows.mean(dim=0)
    wanted = query or 0
    if wanted not in block.queries:
        raise InvalidOption(
            asked=f"draw(query={wanted})",
            found=f"these maps have {len(block.queries)} queries without it",
            where=block.path,
            fix=f"Build them with attention_maps(..., queries=[{wanted}]).",
        )
    return rows[block.queries.index(wanted)]


def _asked(blocks: Sequence[BlockMaps], query: int | None) -> str:
    block = blocks[0]
    if query is None and not (block.num_prefix_tokens and 0 in block.queries):
        counts = {len(one.queries) for one in blocks}
        many = f"{counts.pop()} query" if len(counts) == 1 else "all query"
        return f"seen by the mean of {many} tokens"
    wanted = query or 0
    if wanted < block.num_prefix_tokens:
        return "seen by the class token" if wanted == 0 else f"seen by token {wanted}"
    return f"seen by patch {wanted - block.num_prefix_tokens}"


def _row_name(several: Mapping[str, Maps], number: int) -> str:
    blocks = [maps.blocks[number] for maps in several.values()]
    mechanism = f"\n{blocks[0].mechanism}" if len(blocks) == 1 else ""
    return f"block {blocks[0].block}{mechanism}"


def _figure(
    figures: Any,
    photo: Float[np.ndarray, "H W C"],
    rows: list[list[_Panel]],
    names: list[str],
) -> Any:
    across = 1 + max(map(len, rows))
    height, width = photo.shape[:2]
    tall = _INCH * min(max(height / width, 0.4), 2.5)
    names = [_wrapped(name, _PANEL_LETTERS) for name in names]
    written = [*names, *(panel.title for panels in rows for panel in panels)]
    lines = max(text.count("\n") + 1 for text in written)
    figure = figures.Figure(
        figsize=(
            _INCH * across + 1.2,
            (tall + 0.16 * max(lines, 2) + 0.25) * len(rows) + 0.6,
        ),
        layout="constrained",
    )
    figure.get_layout_engine().set(h_pad=0.08)
    grid = figure.subplots(len(rows), across, squeeze=False)
    for places, panels, name in zip(grid, rows, names, strict=True):
        for axes in places:
            axes.set_axis_off()
        places[0].imshow(photo, cmap="gray", vmin=0, vmax=1)
        places[0].set_title(name, fontsize=9)
        _fill(figure, list(places[1:]), panels, photo)
    return figure


def _fill(
    figure: Any,
    places: Sequence[Any],
    panels: list[_Panel],
    photo: Float[np.ndarray, "H W C"],
) -> None:
    """Fill one row; its panels share a scale and a colour bar."""
    values = torch.cat([panel.weights.flatten().abs() for panel in panels])
    # One glaring patch must not turn all others black; the bar's arrow says so.
    top = max(float(values.quantile(0.995)), 1e-6)
    signed = any(panel.signed for panel in panels)
    low, colours = (-top, "RdBu_r") if signed else (0.0, "inferno")
    # Pale and of little contrast: what lies where is seen, and colours stay those of
    # the bar, which is laid over the same grey.
    grey = 0.55 + 0.4 * photo.mean(axis=2)
    extent = (0, photo.shape[1], photo.shape[0], 0)
    shown = None
    for axes, panel in zip(places, panels, strict=False):
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent)
        shown = axes.imshow(
            panel.weights.numpy(),
            cmap=colours,
            vmin=low,
            vmax=top,
            alpha=0.7,
            extent=extent,
            interpolation="nearest",
        )
        axes.set_title(panel.title, fontsize=9)
    ends = "both" if signed else "max"
    bar = figure.colorbar(shown, ax=places, extend=ends, pad=0.01, aspect=15)
    bar.ax.set_facecolor(str(float(grey.mean())))
    bar.set_label("x average patch", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _require_drawable(several: Mapping[str, Maps], image: int) -> None:
    problem, fix = "", ""
    blocks = [[one.block for one in maps.blocks] for maps in several.values()]
    if not several or not blocks[0]:
        problem, fix = "there is nothing to draw", "Pass maps with one block or more."
    elif any(numbers != blocks[0] for numbers in blocks):
        problem = f"the models show different blocks: {blocks}"
        fix = "Ask for the same blocks=... of every model."
    elif not 0 <= image < len(next(iter(several.values())).pictures):
        problem = f"there is no image {image}"
        fix = "Count images from 0."
    else:
        most = max(len(b.heads) for m in several.values() for b in m.blocks)
        if len(several) == 1 and "" in several and most > _MOST_PANELS:
            problem = f"a row would have {most} maps, more than {_MOST_PANELS}"
            fix = "Choose some: attention_maps(..., heads=range(6)), or heads=()."
    if problem:
        raise InvalidOption(asked="drawing attention maps", found=problem, fix=fix)
