"""The terminal: one subcommand per verb, and no logic of its own.

Every command reads its words (`grammar`), opens what they name (`sources`), calls one
verb, and shows what the verb returns (`console`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from manyheads import demo as demonstration
from manyheads import healing, timing, training
from manyheads.checkpoint import save
from manyheads.conversion import convert as convert_model
from manyheads.conversion import preview as preview_model
from manyheads.costs import cost as count_cost
from manyheads.terminal.console import note, run, show
from manyheads.terminal.grammar import read_image_size, read_recipe
from manyheads.terminal.sources import NamedModel, open_model

__all__ = ["app", "main"]

app = typer.Typer(
    name="manyheads",
    help="Makes the Vision Transformers you already have cheaper.",
    epilog="--debug anywhere prints the traceback of mistakes that are ours.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Argument(help="A timm name, or a folder written by manyheads.save()."),
]
Images = Annotated[str, typer.Argument(help="A folder of images.")]
Labelled = Annotated[
    str, typer.Argument(help="A folder of images with one folder per class.")
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
Out = Annotated[Path, typer.Option(help="The folder to write the model to.")]
RunDir = Annotated[
    Path | None, typer.Option(help="Where to keep what a stopped run resumes from.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per step.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


@app.command(
    epilog="Example: manyheads preview deit_small_patch16_224 --attention hydra "
    "--blocks 10-11"
)
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
    found = preview_model(named.model, wanted, image_size=size)
    show(found, as_json=as_json, models=[named])


@app.command(
    epilog="Example: manyheads convert deit_small_patch16_224 --attention hydra "
    "--blocks 10-11 --out student"
)
def convert(
    model: Model,
    out: Out,
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
    found = preview_model(named.model, wanted)
    folder = save(convert_model(named.model, wanted), out)
    note(f"Written to {folder}; heal it before use.")
    show(found, as_json=as_json, models=[named])


@app.command(
    epilog="Example: manyheads heal student deit_small_patch16_224 photos/ --out healed"
)
def heal(
    student: Model,
    teacher: Model,
    images: Images,
    out: Out,
    block_epochs: Annotated[
        int | None, typer.Option(min=0, help="Passes that match block outputs.")
    ] = None,
    logit_epochs: Annotated[
        int | None, typer.Option(min=0, help="Passes that match logits.")
    ] = None,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    run_dir: RunDir = None,
    pretrained: Pretrained = True,
    as_json: Json = False,
) -> None:
    """Bring a converted model close to its teacher again; no labels needed."""
    epochs = {"block_epochs": block_epochs, "logit_epochs": logit_epochs}
    given: dict[str, Any] = {k: n for k, n in epochs.items() if n is not None}
    pupil = open_model(student, pretrained=pretrained)
    master = open_model(teacher, pretrained=pretrained)
    healed = healing.heal(
        pupil.model,
        master.model,
        images,
        batch_size=batch_size,
        seed=seed,
        run_dir=run_dir,
        **given,
    )
    note(f"Written to {save(pupil.model, out)}.")
    show(healed, as_json=as_json, models=[pupil, master])


@app.command(
    epilog="Example: manyheads train deit_tiny_patch16_224 photos/ --epochs 30 "
    "--no-pretrained --out trained"
)
def train(
    model: Model,
    images: Labelled,
    out: Out,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")],
    validation: Annotated[
        str | None, typer.Option(help="A folder like IMAGES to watch progress on.")
    ] = None,
    batch_size: BatchSize = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak step size.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.05,
    seed: Seed = 0,
    run_dir: RunDir = None,
    pretrained: Pretrained = True,
    as_json: Json = False,
) -> None:
    """Train or fine-tune a model on labelled images."""
    named = open_model(model, pretrained=pretrained)
    trained = training.train(
        named.model,
        images,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        validation=validation,
        run_dir=run_dir,
        seed=seed,
    )
    note(f"Written to {save(named.model, out)}.")
    show(trained, as_json=as_json, models=[named])


@app.command(epilog="Example: manyheads evaluate healed photos/validation")
def evaluate(
    model: Model,
    images: Labelled,
    batch_size: BatchSize = 64,
    pretrained: Pretrained = True,
    as_json: Json = False,
) -> None:
    """Measure a model's accuracy on labelled images."""
    named = open_model(model, pretrained=pretrained)
    found = training.evaluate(named.model, images, batch_size=batch_size)
    show(found, as_json=as_json, models=[named])


@app.command(
    epilog="Example: manyheads cost deit_small_patch16_224 --image-size 1080x1920"
)
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
    found = count_cost(
        named.model, image_size=size, multiply_add=1 if multiply_add == 1 else 2
    )
    show(found, as_json=as_json, models=[named])


@app.command(
    epilog="Example: manyheads bench deit_small_patch16_224 student "
    "--image-size 1080x1920"
)
def bench(
    models: Annotated[
        list[str], typer.Argument(help="timm names or folders; the first is the base.")
    ],
    image_size: ImageSize = None,
    batch_size: BatchSize = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 30,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory, each in a process of its own.")
    ] = True,
    pretrained: Pretrained = False,
    as_json: Json = False,
) -> None:
    """Time models against each other, here and now."""
    size = read_image_size(image_size)
    named: list[NamedModel] = [
        open_model(name, pretrained=pretrained) for name in models
    ]
    found = timing.bench(
        *(one.model for one in named),
        image_size=size,
        batch_size=batch_size,
        rounds=rounds,
        memory=memory,
        names=[one.name for one in named],
    )
    show(found, as_json=as_json, models=named)


@app.command(epilog="Example: manyheads demo --out runs/demo")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    command = get_command(app)
    words = sys.argv[1:] if arguments is None else arguments
    return run(lambda w: command.main(args=w, prog_name="manyheads"), words)
