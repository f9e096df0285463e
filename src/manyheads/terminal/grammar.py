"""What users write on a command line, read into values: recipes, blocks, image sizes.

    hydra                                  Hydra()
    hydra:kernel=mean                      Hydra(kernel="mean")
    interactive:landmarks=7x7,mix=both     Interactive(landmarks=(7, 7), mix="both")
    compact:rank=0.5                       Compact(rank=0.5)
    hallucinated+compact@0-5               both, in blocks 0 to 5

The library itself knows no such strings. Options are checked by the same strict reader
as recipe files, so a misspelt one is an error and never ignored.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

from manyheads.attention import MECHANISMS
from manyheads.errors import InvalidOption, InvalidRecipe, nearest
from manyheads.ffn import FEED_FORWARDS
from manyheads.recipe import Recipe, Swap, spec_from_json
from manyheads.specs import Spec

__all__ = [
    "read_blocks",
    "read_image_size",
    "read_numbers",
    "read_recipe",
    "read_recipe_word",
    "read_spec",
    "read_value",
]

_RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?")
_SIZE = re.compile(r"([1-9]\d{0,5})(?:[xX]([1-9]\d{0,5}))?")
_WORDS = {"true": True, "false": False, "none": None}


def read_recipe(
    file: Path | None, attention: str | None, ffn: str | None, blocks: str | None
) -> Recipe:
    """Read the recipe from a file or from options, of which only one may be given.

    Args:
        file: A file written with `Recipe.to_json`.
        attention: A mechanism, see `read_spec`.
        ffn: A feed-forward layer, see `read_spec`.
        blocks: Which blocks, see `read_blocks`; None for all.

    Raises:
        InvalidRecipe: Both ways were used or neither, or the recipe is not valid.
        InvalidOption: `blocks` is not a list of numbers and ranges.
    """
    in_options = any(text is not None for text in (attention, ffn, blocks))
    if file is not None and in_options:
        raise InvalidRecipe(
            asked="a recipe from a file and from options at once",
            found=f"--recipe {file} already says what the blocks become",
            fix="Use either --recipe, or --attention, --ffn and --blocks.",
        )
    if file is not None:
        return Recipe.read(file)
    if attention is None and ffn is None:
        raise InvalidRecipe(
            asked="converting a model",
            found="neither --attention, --ffn nor --recipe says into what",
            fix="Use for instance --attention hydra --blocks 10-11.",
        )
    return Recipe(
        Swap(
            blocks=None if blocks is None else read_blocks(blocks),
            attention=read_spec(attention, "--attention", MECHANISMS),
            ffn=read_spec(ffn, "--ffn", FEED_FORWARDS),
        )
    )


def read_recipe_word(text: str) -> Recipe | None:
    """Read a recipe written as one word: a .json file, or ``SPEC[+SPEC][@BLOCKS]``.

    Returns:
        The recipe; None where the word is meant for something else, such as a model.

    Raises:
        InvalidRecipe: It begins as a recipe and is none.
        InvalidOption: What follows ``@`` is not a list of numbers and ranges.
    """
    if text.endswith(".json"):
        return Recipe.read(text)
    specs, _, blocks = text.partition("@")
    attentions, feed_forwards = (
        {kind.__name__.lower() for kind in kinds}
        for kinds in (MECHANISMS, FEED_FORWARDS)
    )
    parts = specs.split("+")
    names = [part.partition(":")[0].lower() for part in parts]
    if names[0] not in attentions | feed_forwards:
        return None
    sides = ["--ffn" if name in feed_forwards else "--attention" for name in names]
    if len(set(sides)) < len(sides):
        raise InvalidRecipe(
            asked=f"the recipe {text}",
            found=f"{' and '.join(parts)} go to the same place",
            fix="Write one attention and one feed-forward layer at most, e.g. "
            "hydra+compact.",
        )
    named = dict(zip(sides, parts, strict=True))
    return read_recipe(
        None, named.get("--attention"), named.get("--ffn"), blocks or None
    )


def read_spec(text: str | None, option: str, kinds: tuple[type[Spec], ...]) -> Any:
    """Read ``name:key=value,key=value``; case does not matter in the name.

    Args:
        text: What the user wrote, or None.
        option: The option it was written for, for messages.
        kinds: What may be named there.

    Returns:
        The spec, or None if nothing was written.

    Raises:
        InvalidRecipe: The name, a key or a value is unknown.
    """
    if text is None:
        return None
    name, _, options = text.partition(":")
    known = {kind.__name__.lower(): kind.__name__ for kind in kinds}
    if name.lower() not in known:
        raise InvalidRecipe(
            asked=f"{option} {text}",
            found=f"there is no {name!r}",
            fix=nearest(name.lower(), known),
        )
    pairs = [pair.partition("=") for pair in options.split(",") if pair]
    broken = [key for key, sign, value in pairs if not (key and sign and value)]
    if broken or len({key for key, *_ in pairs}) < len(pairs):
        raise InvalidRecipe(
            asked=f"{option} {text}",
            found="options are written key=value, each key once",
            fix="Use for instance --attention hydra:kernel=mean.",
        )
    kind = next(kind for kind in kinds if kind.__name__ == known[name.lower()])
    hints = get_type_hints(kind)
    # "none" is a choice of some options and the absence of a value for others.
    value = {
        key: written if written in get_args(hints.get(key)) else read_value(written)
        for key, _, written in pairs
    }
    return spec_from_json({**value, "kind": kind.__name__}, f"{option} {text}")


def read_blocks(text: str) -> list[int]:
    """Read block numbers and ranges, both ends included: ``10-11,0``, ``-2--1``.

    Raises:
        InvalidOption: A part is neither a number nor a rising range.
    """
    return read_numbers(text, "--blocks", what="block")


def read_numbers(text: str, option: str, *, what: str) -> list[int]:
    """Read numbers and ranges for an option; see `read_blocks`."""
    numbers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first = int(match[1]) if match else 0
        last = int(match[2]) if match and match[2] else first
        if match is None or last < first:
            raise InvalidOption(
                asked=f"{option} {text}",
                found=f"{part!r} is neither a {what} number nor a rising range",
                fix=f"Use for instance {option} 10-11,0; {what}s count from 0.",
            )
        numbers.extend(range(first, last + 1))
    return numbers


def read_image_size(text: str | None) -> tuple[int, int] | None:
    """Read ``1080x1920``, height first, or one number for a square.

    Raises:
        InvalidOption: It is neither.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidOption(
            asked=f"--image-size {text}",
            found="that is not HEIGHTxWIDTH in pixels",
            fix="Use for instance --image-size 1080x1920 or --image-size 224.",
        )
    return int(match[1]), int(match[2] or match[1])


def read_value(written: str) -> Any:
    """Guess the JSON value: truth value, none, number, or sizes joined by x."""
    if written.lower() in _WORDS:
        return _WORDS[written.lower()]
    for kind in (int, float):
        try:
            return kind(written)
        except ValueError:
            continue
    if re.fullmatch(r"\d+(x\d+)+", written):
        return [int(side) for side in written.split("x")]
    return written
