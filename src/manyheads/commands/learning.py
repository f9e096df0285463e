"""heal, train and evaluate: every keyword of the verb is an option of the command.

The options are made from the verb's signature and docstring, so none can be forgotten.
All of them may come from one file, and what a run was told is kept with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from manyheads import healing, training
from manyheads.checkpoint import require_free, save
from manyheads.errors import InvalidOption, nearest
from manyheads.terminal.console import is_first_process, note, show
from manyheads.terminal.options import REQUIRED, Word, words_of
from manyheads.terminal.runfile import (
    kept_beside,
    read_command,
    settle,
    write_command,
    written,
)
from manyheads.terminal.sources import NamedModel, open_model

__all__ = ["evaluate", "heal", "train"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Settings that somebody published, as a verb and a model take them.

    Attributes:
        options: Values of the verb's keywords.
        model: Arguments with which a model of a registered name is built.
    """

    options: Mapping[str, Any]
    model: Mapping[str, Any]


RECIPES = {"deit": Published(options=training.DEIT, model=training.DEIT_MODEL)}
"""Published settings of training, by name."""
_BESIDE = "command.json"
"""What a written model says of the command that made it."""

_LISTED = 100
"""Unreadable pictures that are named one by one."""

_NOTHING = Published(options={}, model={})

_OUT = Word(
    name="out",
    kinds=(str,),
    default=REQUIRED,
    positional=False,
    told="The folder to write the model to.",
)
_PRETRAINED = Word(
    name="pretrained",
    kinds=(bool,),
    default=True,
    positional=False,
    told="Published weights for a timm name, or random ones.",
)
_TEACHER_PRETRAINED = Word(
    name="teacher_pretrained",
    kinds=(bool, type(None)),
    default=None,
    positional=False,
    told="The same for the teacher alone, where it is to be otherwise.",
)
_ARGUMENTS = Word(
    name="model_arguments",
    kinds=(dict, type(None)),
    default=None,
    positional=False,
    told="How a timm name is built, e.g. num_classes=10,img_size=128.",
)
_RECIPE = Word(
    name="recipe",
    kinds=(str, type(None)),
    default=None,
    positional=False,
    told=f"Published settings to start from: {', '.join(RECIPES)}.",
)
_CONFIG = Annotated[
    Path | None,
    typer.Option(
        help="A .toml or .json file that gives any of these words; a word on the "
        "command line wins.",
        metavar="FILE",
    ),
]
_JSON = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def _command(
    verb: Callable[..., Any],
    summary: str,
    *,
    writes: bool,
    recipes: Mapping[str, Published] | None = None,
) -> Callable[..., None]:
    """Make the command of a verb; the first model it takes is the one that is written.

    Args:
        verb: Takes models and images first, and the rest by keyword.
        summary: First line of the help.
        writes: Whether the model changes and is to be saved.
        recipes: Named settings for the verb's keywords.
    """
    own = words_of(verb)
    words = (*own, *((_OUT,) if writes else ()), _PRETRAINED)
    words += (_TEACHER_PRETRAINED,) if any(w.name == "teacher" for w in own) else ()
    words += (_ARGUMENTS, _RECIPE) if recipes is not None else ()

    def command(**typed: Any) -> None:
        as_json, config = typed.pop("as_json"), typed.pop("config")
        file = read_command(config, verb.__name__, words) if config else {}
        chosen = typed.get("recipe") or file.get("recipe")
        recipe = _recipe(chosen, recipes or {}) if chosen else _NOTHING
        values = settle(
            words, verb.__name__, typed=typed, file=file, recipe=recipe.options
        )
        if writes:
            _require_place(Path(values["out"]), values["run_dir"])
        opened = {
            word.name: _opened(word, values, recipe)
            for word in own
            if word.is_model and values[word.name] is not None
        }
        again = written(verb.__name__, words, values)
        arguments = {word.name: values[word.name] for word in own}
        arguments |= {name: one.model for name, one in opened.items()}
        first = is_first_process()
        with kept_beside(values.get("run_dir") if first else None, again):
            found = _call(verb, own, arguments)
        if not first:
            return
        named = list(opened.values())
        if writes:
            _write(named[0], Path(values["out"]), again)
        show(found, as_json=as_json, models=named, config=again)
        _list_skipped(found.skipped)
        if isinstance(found, training.Trained) and found.validation is not None:
            _list_skipped(found.validation.skipped, "validation ")

    parameters = [word.parameter() for word in words]
    for name, annotation, default in (
        ("config", _CONFIG, None),
        ("as_json", _JSON, False),
    ):
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=annotation,
            )
        )
    command.__name__ = command.__qualname__ = verb.__name__
    command.__doc__ = summary
    # typer reads both: the signature for names, the annotations for types.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _call(
    verb: Callable[..., Any], words: tuple[Word, ...], arguments: dict[str, Any]
) -> Any:
    """Call a verb, its first parameters by position."""
    first = [arguments.pop(word.name) for word in words if word.positional]
    return verb(*first, **arguments)


def _opened(word: Word, values: Mapping[str, Any], recipe: Published) -> NamedModel:
    """Open a model; the one that learns is built as the recipe builds it."""
    learns, pretrained = word.name != "teacher", values["pretrained"]
    if not learns and values["teacher_pretrained"] is not None:
        pretrained = values["teacher_pretrained"]
    said = (values.get(_ARGUMENTS.name) or {}) if learns else {}
    arguments = {**recipe.model, **said} if learns else {}
    opened = open_model(
        values[word.name],
        pretrained=pretrained,
        arguments=arguments,
        seed=values.get("seed", 0),
    )
    if arguments and opened.weights == "folder":
        told = ", ".join(f"{name}={value}" for name, value in arguments.items())
        if said:
            raise InvalidOption(
                asked=f"{opened.name} with {told}",
                found="it is a folder, whose model is built already",
                fix="Leave --model-arguments out, or name a model of timm.",
            )
        note(f"Warning: {opened.name} is a folder and stays as built, without {told}.")
    return opened


def _require_place(out: Path, run_dir: str | Path | None) -> None:
    """See that the model can be written when the work is done."""
    require_free(out)
    if run_dir is None:
        return
    place, run = out.resolve(), Path(run_dir).resolve()
    if place == run or place in run.parents:
        raise InvalidOption(
            asked=f"--out {out} with --run-dir {run_dir}",
            found="the model would take the place of the run",
            fix="Give --out a folder of its own.",
        )


def _recipe(name: str, known: Mapping[str, Published]) -> Published:
    if name not in known:
        raise InvalidOption(
            asked=f"--recipe {name}",
            found="there are no such published settings",
            fix=nearest(name, known) if known else "Leave --recipe out.",
        )
    return known[name]


def _list_skipped(skipped: Sequence[str], kind: str = "") -> None:
    """Say where the pictures lie that could not be read."""
    if not skipped:
        return
    told = f"{len(skipped)} {kind}pictures could not be read and were left out"
    lines = [f"Warning: {told}:"]
    lines += [f"  {name}" for name in skipped[:_LISTED]]
    if len(skipped) > _LISTED:
        lines.append(f"  and {len(skipped) - _LISTED} more; --json gives them all")
    note("\n".join(lines))


def _write(named: NamedModel, out: Path, again: dict[str, Any]) -> None:
    folder = save(named.model, out)
    write_command(folder / _BESIDE, again)
    note(f"Written to {folder}.")


heal = _command(
    healing.heal,
    "Bring a converted model close to its teacher again; no labels needed.",
    writes=True,
)
train = _command(
    training.train,
    "Train or fine-tune a model on labelled images.",
    writes=True,
    recipes=RECIPES,
)
evaluate = _command(
    training.evaluate,
    "Measure a model's accuracy on labelled images.",
    writes=False,
)
