"""The main verb: make a new model whose blocks are what a recipe says."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from manyheads.attention.pairing import HeadChoice
from manyheads.calibration import Images, calibrate
from manyheads.hosts import find_host
from manyheads.ledger import BlockCost, Ledger, keep_books
from manyheads.recipe import Recipe
from manyheads.surgery import Operation, apply_swaps, blank_copy, plan_swaps

__all__ = ["Preview", "PreviewRow", "convert", "preview"]


@dataclass(frozen=True, kw_only=True)
class PreviewRow:
    """What would happen to one block.

    Attributes:
        block: Block number.
        path: Module path.
        was: Attention and feed-forward layer now.
        becomes: Attention and feed-forward layer afterwards.
        parameters: Parameters of both, before and after.
        flops: Multiply-adds for one image, before and after.
        left_alone: Why a part that the recipe meets is not swapped, if so.
    """

    block: int
    path: str
    was: str
    becomes: str
    parameters: tuple[int, int]
    flops: tuple[int, int]
    left_alone: str


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a recipe would do to a model; nothing has changed.

    Attributes:
        rows: The blocks that the recipe meets.
        parameters: Parameters of the whole model, before and after.
        flops: Multiply-adds of the whole model for one image, before and after.
        image_size: Height and width for which work was counted.
        heads: Per block that becomes hallucinated, the heads that calibration images
            keep real and how alike the others are to them; empty without images.
        left_alone: Attention that is linear in tokens already (class attention,
            attention pooling, channel attention) and by rule never converted.
    """

    rows: tuple[PreviewRow, ...]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    image_size: tuple[int, int]
    heads: tuple[HeadChoice, ...] = ()
    left_alone: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        return asdict(self) | {"heads": [choice.to_json() for choice in self.heads]}

    def __str__(self) -> str:
        cells = [("block", "was", "becomes", "parameters", "MFLOPs")]
        for row in self.rows:
            becomes = f"{row.becomes} (left alone: {row.left_alone})"
            cells.append(
                (
                    f"{row.block} {row.path}",
                    row.was,
                    becomes if row.left_alone else row.becomes,
                    f"{row.parameters[0]:,} -> {row.parameters[1]:,}",
                    f"{row.flops[0] / 1e6:,.1f} -> {row.flops[1] / 1e6:,.1f}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                text.ljust(w) for text, w in zip(row, widths, strict=True)
            ).rstrip()
            for row in cells
        ]
        height, width = self.image_size
        (p0, p1), (f0, f1) = self.parameters, self.flops
        lines.append(
            f"whole model at {height}x{width}: {p0 / 1e6:.2f} -> {p1 / 1e6:.2f} M "
            f"parameters, {f0 / 1e9:.2f} -> {f1 / 1e9:.2f} GFLOPs (multiply-add = 1)"
        )
        lines += ["hallucinated heads, by similarity of maps:"] * bool(self.heads)
        lines += [f"  {choice}" for choice in self.heads]
        lines += [f"left alone, linear already: {layer}" for layer in self.left_alone]
        return "\n".join(lines)


def preview(
    model: nn.Module,
    recipe: Recipe,
    *,
    image_size: tuple[int, int] | None = None,
    images: Images | None = None,
    paths: Sequence[str] | None = None,
) -> Preview:
    """Show what `convert` would do, block by block, changing nothing.

    Args:
        model: A hosted model.
        recipe: What the blocks are to become.
        image_size: Height and width for which work is counted; None for the native
            size.
        images: Calibration images, as for `convert`; with them the result says which
            heads would stay real and how alike the others are to them.
        paths: In a model of your own, the attention layers to count as its blocks;
            see `convert`.

    Raises:
        UnknownHost: No host knows the model.
        NothingToConvert: A block is out of range, or nothing would change.
        SwapRefused: A mechanism cannot carry what a layer does.
        ImageSizeError: The size gives no valid token grid.
        DataError: The images are none, or no images.
    """
    host, sites = find_host(model, paths)
    operations = plan_swaps(model, sites, recipe)
    if images is not None:
        operations = calibrate(model, host, operations, images)
    blank = blank_copy(model)
    # First: a layer that runs somebody's own forward could not be counted.
    apply_swaps(blank, host, operations)
    before = keep_books(model, host, sites, image_size)
    after = keep_books(blank, host, host.sites(blank), image_size)
    return Preview(
        rows=tuple(_row(operation, before, after) for operation in operations),
        parameters=(before.num_parameters, after.num_parameters),
        flops=(before.total, after.total),
        image_size=before.image_size,
        heads=tuple(op.heads for op in operations if op.heads is not None),
        left_alone=host.left_alone(model),
    )


def convert(
    model: nn.Module,
    recipe: Recipe,
    *,
    images: Images | None = None,
    paths: Sequence[str] | None = None,
) -> nn.Module:
    """Make a new model whose blocks are what the recipe says.

    The given model stays bit for bit as it was; healing needs it as the teacher.
    Weights are inherited where they mean the same: Hydra keeps all of a layer's
    projections and adds nothing, hallucinated attention keeps the queries and keys of
    its real heads, a compact layer starts as the best approximation of its rank.
    Type, device, training mode and `requires_grad` carry over.

    Args:
        model: A hosted model, converted already or not.
        recipe: What the blocks are to become.
        images: Calibration images: a folder, a data set, a name as in `heal`, of which
            256 are looked at, evenly spread; or all of a tensor [n, channels, height,
            width] or of an iterable of such batches, normalised as the model wants
            them. With them the real heads of hallucinated attention and the partner of
            each other head are chosen by how alike their maps are, and compact layers
            start closest to the outputs seen; without, the first half of the heads is
            real and the matrix alone is approximated.
        paths: In a model of your own, the module paths of the attention layers that
            count as its blocks 0, 1, ...: each a `torch.nn.MultiheadAttention`, or a
            layer with `qkv`, `proj` and `num_heads` that computes what timm's does.

    Returns:
        A deep copy with the blocks swapped. It needs healing to be accurate.

    Raises:
        UnknownHost: No host knows the model.
        NothingToConvert: A block is out of range, or nothing would change.
        SwapRefused: A mechanism cannot carry what a layer does.
        DataError: The images are none, or no images.
    """
    host, sites = find_host(model, paths)
    operations = plan_swaps(model, sites, recipe)
    if images is not None:
        operations = calibrate(model, host, operations, images)
    student = copy.deepcopy(model)
    apply_swaps(student, host, operations)
    return student


def _row(operation: Operation, before: Ledger, after: Ledger) -> PreviewRow:
    index = operation.site.index
    was, becomes = before.blocks[index], after.blocks[index]
    return PreviewRow(
        block=index,
        path=operation.site.path,
        was=_layers(was),
        becomes=_layers(becomes),
        parameters=(was.num_parameters, becomes.num_parameters),
        flops=(was.matmul + was.elementwise, becomes.matmul + becomes.elementwise),
        left_alone=operation.left_alone,
    )


def _layers(block: BlockCost) -> str:
    return f"{block.attention} + {block.ffn}" if block.ffn else block.attention
