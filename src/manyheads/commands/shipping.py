"""export and run: a model as one file, and photographs through that file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyheads import exporting, running
from manyheads.artifacts import Target
from manyheads.commands.words import ImageSize, Json, Model, Pretrained
from manyheads.terminal.console import show
from manyheads.terminal.grammar import read_image_size
from manyheads.terminal.sources import open_model

__all__ = ["export", "run"]


def export(
    model: Model,
    out: Annotated[
        Path, typer.Argument(help="The file: model.onnx or model.pt2.", metavar="OUT")
    ],
    target: Annotated[
        Target | None,
        typer.Option(help="The form; by the file's ending if left out."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights, e.g. float16.")
    ] = None,
    dynamic: Annotated[
        bool,
        typer.Option("--dynamic/--fixed", help="Any image size, or one alone."),
    ] = True,
    images: Annotated[
        Path | None,
        typer.Option(
            help="A picture or a folder to check the file with; one subfolder per "
            "class states the accuracy too."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest difference, as a share of the largest output."),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Matrices as eight-bit integers; ONNX only.")
    ] = False,
    image_size: ImageSize = None,
    pretrained: Pretrained = True,
    as_json: Json = False,
) -> None:
    """Write a model to one file, and keep it only if it does what the model does."""
    size = read_image_size(image_size)
    named = open_model(model, pretrained=pretrained)
    found = exporting.export(
        named.model,
        out,
        target=target,
        dynamic=dynamic,
        dtype=dtype,
        images=images,
        tolerance=tolerance,
        int8=int8,
        image_size=size,
    )
    show(found, as_json=as_json, models=[named])


def run(
    file: Annotated[
        Path, typer.Argument(help="A file written by manyheads export.", metavar="FILE")
    ],
    photos: Annotated[list[Path], typer.Argument(help="Pictures.", metavar="PHOTO...")],
    top: Annotated[int, typer.Option(help="Classes to name for each picture.")] = 5,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Classify or embed photographs with an exported file and nothing else."""
    size = read_image_size(image_size)
    found = running.run(file, photos, top=top, image_size=size)
    show(found, as_json=as_json)
