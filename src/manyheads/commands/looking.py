"""maps, report and demo: pictures of what a model looks at and of what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyheads import demo as demonstration
from manyheads import report as reporting
from manyheads.commands.words import ImageSize, Json, Pretrained
from manyheads.drawing import draw
from manyheads.errors import InvalidOption
from manyheads.hosts import find_host
from manyheads.maps import Maps, attention_maps
from manyheads.terminal.console import note, show
from manyheads.terminal.grammar import read_blocks, read_image_size, read_numbers
from manyheads.terminal.sources import NamedModel, open_model

__all__ = ["demo", "maps", "report"]

_HEADS = 4


def maps(
    photo: Annotated[Path, typer.Argument(help="A picture.", metavar="PHOTO")],
    model: Annotated[
        str,
        typer.Option(help="A timm name, or a folder written by manyheads.save()."),
    ],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("maps.png"),
    compare: Annotated[
        list[str] | None,
        typer.Option(help="A model to show beside it; may be repeated."),
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Which blocks, e.g. 0,10-11; all if left out.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="Which heads, or features of Hydra, e.g. 0-3; the first four if left "
            "out."
        ),
    ] = None,
    query: Annotated[
        int | None,
        typer.Option(
            help="Which token looks, prefix tokens first; the class token, or the mean "
            "over all where there is none."
        ),
    ] = None,
    image_size: ImageSize = None,
    pretrained: Pretrained = True,
    as_json: Json = False,
) -> None:
    """Draw what a model looks at in a photograph, or several models side by side."""
    size = read_image_size(image_size)
    numbers = None if blocks is None else read_blocks(blocks)
    shown = None if heads is None else read_numbers(heads, "--heads", what="head")
    if compare and shown is not None:
        raise InvalidOption(
            asked=f"--heads {heads} with --compare",
            found="models are compared by all their heads together",
            why="a head of one model is no head of another",
            fix="Leave out --heads, or draw one model at a time.",
        )
    named = [
        open_model(name, pretrained=pretrained) for name in (model, *(compare or ()))
    ]
    if len({one.name for one in named}) < len(named):
        raise InvalidOption(
            asked=f"comparing {', '.join(one.name for one in named)}",
            found="a model is named twice",
            fix="Name different models.",
        )
    found = {
        one.name: attention_maps(
            one.model,
            photo,
            blocks=numbers,
            heads=() if compare else _heads(one) if shown is None else shown,
            queries=_queries(one, query),
            image_size=size,
        )
        for one in named
    }
    first = next(iter(found.values()))
    drawn: Maps | dict[str, Maps] = found if compare else first
    path = draw(drawn, out, title=_title(photo, named), query=query)
    note(f"Written to {path}.")
    if as_json:
        value = {
            "path": str(path),
            "maps": {name: one.to_json() for name, one in found.items()},
        }
        show(value, as_json=True, models=named)
    else:
        show("\n".join(map(str, found.values())), as_json=False, models=named)


def _title(photo: Path, named: list[NamedModel]) -> str:
    return photo.name if len(named) > 1 else f"{named[0].name}, {photo.name}"


def _heads(named: NamedModel) -> range:
    """Give the first heads: as many as every block has, four at most."""
    _, sites = find_host(named.model)
    return range(min(_HEADS, *(site.geometry.num_heads for site in sites)))


def _queries(named: NamedModel, query: int | None) -> list[int] | None:
    """Give the token that looks; all of them where their mean is to be drawn."""
    if query is not None:
        return [query]
    _, sites = find_host(named.model)
    return [0] if all(site.geometry.num_prefix_tokens for site in sites) else None


def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run's JSON, or the folder that holds it.", metavar="RUN"
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page to write; report.html beside the JSON."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained page that shows what a recorded run found."""
    path = reporting.report(run, out)
    if as_json:
        show({"path": str(path)}, as_json=True)
    else:
        show(f"Written to {path}; it opens from disk.", as_json=False)


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes; a smoke test.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train, convert, heal and measure a small model on handwritten digits."""
    show(demonstration.demo(out, quick=quick), as_json=as_json)
