"""preview and convert: what a recipe would do, and doing it."""

from __future__ import annotations

from manyheads import conversion
from manyheads.checkpoint import save
from manyheads.commands.words import (
    Attention,
    Blocks,
    FeedForward,
    ImageSize,
    Json,
    Model,
    OutFolder,
    Pretrained,
    RecipeFile,
)
from manyheads.terminal.console import note, show
from manyheads.terminal.grammar import read_image_size, read_recipe
from manyheads.terminal.sources import open_model

__all__ = ["convert", "preview"]


def preview(
    model: Model,
    recipe: RecipeFile = None,
    attention: Attention = None,
    ffn: FeedForward = None,
    blocks: Blocks = None,
    image_size: ImageSize = None,
    pretrained: Pretrained = False,
    as_json: Json = False,
) -> None:
    """Show what a recipe would do to a model; nothing changes."""
    wanted = read_recipe(recipe, attention, ffn, blocks)
    size = read_image_size(image_size)
    named = open_model(model, pretrained=pretrained)
    found = conversion.preview(named.model, wanted, image_size=size)
    show(found, as_json=as_json, models=[named])


def convert(
    model: Model,
    out: OutFolder,
    recipe: RecipeFile = None,
    attention: Attention = None,
    ffn: FeedForward = None,
    blocks: Blocks = None,
    pretrained: Pretrained = True,
    as_json: Json = False,
) -> None:
    """Write a converted copy of a model; it needs healing to be accurate."""
    wanted = read_recipe(recipe, attention, ffn, blocks)
    named = open_model(model, pretrained=pretrained)
    found = conversion.preview(named.model, wanted)
    folder = save(conversion.convert(named.model, wanted), out)
    note(f"Written to {folder}; heal it before use.")
    show(found, as_json=as_json, models=[named])
