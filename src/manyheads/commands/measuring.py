"""cost and bench: what a model takes, counted and timed."""

from __future__ import annotations

from typing import Annotated

import typer

from manyheads import costs, timing
from manyheads.commands.words import (
    Attention,
    BatchSize,
    Blocks,
    FeedForward,
    ImageSize,
    Json,
    Model,
    Pretrained,
    RecipeFile,
)
from manyheads.terminal.console import show
from manyheads.terminal.grammar import read_image_size, read_recipe
from manyheads.terminal.sources import open_contestants, open_model

__all__ = ["bench", "cost"]


def cost(
    model: Model,
    image_size: ImageSize = None,
    multiply_add: Annotated[
        int, typer.Option(min=1, max=2, help="What one multiply-add counts.")
    ] = 1,
    pretrained: Pretrained = False,
    as_json: Json = False,
) -> None:
    """Count a model's work and parameters for one image; nothing runs."""
    size = read_image_size(image_size)
    named = open_model(model, pretrained=pretrained)
    found = costs.cost(
        named.model, image_size=size, multiply_add=1 if multiply_add == 1 else 2
    )
    show(found, as_json=as_json, models=[named])


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            help="timm names, folders, and recipes for the first model: a .json file, "
            "or words such as hydra, hydra@10-11, hallucinated+compact."
        ),
    ],
    recipe: RecipeFile = None,
    attention: Attention = None,
    ffn: FeedForward = None,
    blocks: Blocks = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 30,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory, each in a process of its own.")
    ] = True,
    pretrained: Pretrained = False,
    as_json: Json = False,
) -> None:
    """Time models against each other and against themselves converted, here and now."""
    size = read_image_size(image_size)
    options = (recipe, attention, ffn, blocks)
    asked = any(option is not None for option in options)
    further = [read_recipe(*options)] if asked else []
    named = open_contestants(models, further, pretrained=pretrained)
    found = timing.bench(
        *(one.model for one in named),
        image_size=size,
        batch_size=batch_size,
        rounds=rounds,
        memory=memory,
        names=[one.name for one in named],
    )
    show(found, as_json=as_json, models=named)
