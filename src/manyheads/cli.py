"""The terminal: one subcommand per verb, and no logic of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer
from typer.main import get_command

from manyheads.commands import converting, learning, looking, measuring, shipping
from manyheads.terminal.console import run

__all__ = ["app", "main"]

app = typer.Typer(
    name="manyheads",
    help="Makes the Vision Transformers you already have cheaper.",
    epilog="--debug anywhere prints the traceback of mistakes that are ours.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# In the order of the help, each with the example that its own help shows.
for _command, _example in (
    (converting.preview, "deit_small_patch16_224 --attention hydra --blocks 10-11"),
    (
        converting.convert,
        "deit_small_patch16_224 --attention hydra --blocks 10-11 --out student",
    ),
    (learning.heal, "student deit_small_patch16_224 photos/ --out healed"),
    (
        learning.train,
        "deit_tiny_patch16_224 photos/ --epochs 30 --no-pretrained --out trained",
    ),
    (learning.evaluate, "healed photos/validation"),
    (measuring.cost, "deit_small_patch16_224 --image-size 1080x1920"),
    (
        measuring.bench,
        "deit_small_patch16_224 hydra hallucinated+compact --image-size 1080x1920",
    ),
    (shipping.export, "healed student.onnx"),
    (shipping.run, "student.onnx photo.jpg"),
    (looking.maps, "photo.jpg --model deit_small_patch16_224 --compare healed"),
    (looking.report, "runs/demo"),
    (looking.demo, "--out runs/demo"),
):
    app.command(epilog=f"Example: manyheads {_command.__name__} {_example}")(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    command = get_command(app)
    words = sys.argv[1:] if arguments is None else arguments
    return run(lambda w: command.main(args=w, prog_name="manyheads"), words)
