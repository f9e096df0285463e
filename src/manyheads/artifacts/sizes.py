"""Image sizes of an exported file: where it answers what the model answers."""

from __future__ import annotations

import copy

from torch import nn

from manyheads.attention.interactive import InteractiveAttention
from manyheads.geometry import Grid
from manyheads.hosts import Host

__all__ = ["pads", "smallest"]


def pads(model: nn.Module, host: Host, size: Grid) -> bool:
    """Say whether sizes between whole cells are padded with zeros before they enter.

    The hosts of hierarchical models feed them as they are, and what their
    convolutions then make of the border is another answer than that of zeros.

    Args:
        model: It is not touched; a copy is asked.
        host: The model's host.
        size: Height and width of whole cells.
    """
    between = (size[0] + 1, size[1] + 1)
    return host.resize(copy.deepcopy(model), between) != between


def smallest(model: nn.Module, cell: Grid) -> Grid:
    """Give the least height and width whose grid has a token for every landmark.

    A program cannot check it: its comparisons would narrow the sizes it runs at. One
    cell is taken for one token, as in every layer that has been given landmarks.
    """
    rows, columns = 1, 1
    for module in model.modules():
        if isinstance(module, InteractiveAttention) and not module.any_grid:
            rows = max(rows, module.spec.landmarks[0])
            columns = max(columns, module.spec.landmarks[1])
    return rows * cell[0], columns * cell[1]
