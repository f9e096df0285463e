"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Attention",
    "BatchSize",
    "Blocks",
    "FeedForward",
    "ImageSize",
    "Json",
    "Model",
    "OutFolder",
    "Pretrained",
    "RecipeFile",
]

Model = Annotated[
    str,
    typer.Argument(help="A timm name, or a folder written by manyheads.save()."),
]
# Off by default where weights do not enter the result: nothing is fetched to count.
Pretrained = Annotated[
    bool,
    typer.Option(
        "--pretrained/--no-pretrained",
        help="Published weights for a timm name, or random ones.",
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A recipe in JSON.", metavar="FILE")
]
Attention = Annotated[
    str | None,
    typer.Option(help="What the attention becomes, e.g. hydra:kernel=mean."),
]
FeedForward = Annotated[
    str | None,
    typer.Option(help="What the feed-forward layer becomes, e.g. compact:rank=0.5."),
]
Blocks = Annotated[
    str | None, typer.Option(help="Which blocks, e.g. 10-11,0; all if left out.")
]
ImageSize = Annotated[
    str | None,
    typer.Option(help="Height x width in pixels, e.g. 1080x1920; native if left out."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
OutFolder = Annotated[
    Path, typer.Option("--out", help="The folder to write the model to.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
