"""Which blocks get what: a recipe is a value, in Python and in JSON.

The JSON form is versioned and read strictly: a field that this version does not know
is an error, never ignored, because ignoring it would build another model than the one
that was written down.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from manyheads.attention import MECHANISMS, AttentionSpec
from manyheads.errors import InvalidOption, InvalidRecipe, nearest
from manyheads.ffn import FEED_FORWARDS, FeedForwardSpec
from manyheads.specs import Spec

__all__ = ["Recipe", "Swap", "spec_from_json", "spec_to_json"]

FORMAT = "manyheads.recipe"
VERSION = 1

_KINDS: dict[str, type[Spec]] = {
    kind.__name__: kind for kind in (*MECHANISMS, *FEED_FORWARDS)
}


@dataclass(frozen=True, init=False)
class Swap:
    """Give some blocks another attention, another feed-forward layer, or both.

    Attributes:
        blocks: Block numbers from 0, in the order in which an image meets them; None
            for all blocks. Negative numbers count from the end.
        attention: What the attention becomes, or None to leave it.
        ffn: What the feed-forward layer becomes, or None to leave it.

    Raises:
        InvalidOption: Nothing is to be swapped, no block is named, a block is named
            twice or is not a whole number, or a spec is of the wrong kind.
    """

    blocks: tuple[int, ...] | None
    attention: AttentionSpec | None
    ffn: FeedForwardSpec | None

    def __init__(
        self,
        *,
        blocks: Iterable[int] | None = None,
        attention: AttentionSpec | None = None,
        ffn: FeedForwardSpec | None = None,
    ) -> None:
        numbers = None if blocks is None else _block_numbers(blocks)
        _require_kind("attention", attention, AttentionSpec)
        _require_kind("ffn", ffn, FeedForwardSpec)
        if attention is None and ffn is None:
            raise InvalidOption(
                asked=f"Swap(blocks={blocks})",
                found="neither attention nor ffn says what to swap in",
                fix="Use Swap(attention=Hydra()) or Swap(ffn=Compact()).",
            )
        object.__setattr__(self, "blocks", numbers)
        object.__setattr__(self, "attention", attention)
        object.__setattr__(self, "ffn", ffn)


@dataclass(frozen=True, init=False)
class Recipe:
    """One or more swaps; together they say what a model is to become.

    A block may be named by several swaps as long as each of its two parts is given at
    most once.

        recipe = Recipe(Swap(blocks=range(10, 12), attention=Hydra()))
        recipe == Recipe.from_json(recipe.to_json())

    Raises:
        InvalidRecipe: There is no swap, or an argument is not a Swap.
    """

    swaps: tuple[Swap, ...]

    def __init__(self, *swaps: Swap) -> None:
        strangers = [swap for swap in swaps if not isinstance(swap, Swap)]
        if strangers or not swaps:
            raise InvalidRecipe(
                asked=f"Recipe({', '.join(repr(s) for s in strangers)})",
                found="a recipe is made of one or more Swap",
                fix="Use Recipe(Swap(attention=Hydra())).",
            )
        object.__setattr__(self, "swaps", swaps)

    def to_json(self) -> str:
        """Write the recipe as indented JSON with its format name and version."""
        return json.dumps(self.to_dict(), indent=2)

    def to_dict(self) -> dict[str, Any]:
        """Give the JSON object as Python values."""
        swaps = [
            {
                "blocks": None if swap.blocks is None else list(swap.blocks),
                "attention": spec_to_json(swap.attention),
                "ffn": spec_to_json(swap.ffn),
            }
            for swap in self.swaps
        ]
        return {"format": FORMAT, "version": VERSION, "swaps": swaps}

    @classmethod
    def from_json(cls, text: str, *, where: str = "recipe") -> Recipe:
        """Read what `to_json` wrote.

        Raises:
            InvalidRecipe: It is not JSON, of another format or version, or has a field
                or a mechanism that this version does not know.
        """
        try:
            value = json.loads(text)
        except ValueError as error:
            raise InvalidRecipe(
                asked="reading a recipe",
                found=f"the text is not JSON: {error}",
                where=where,
                fix="Write recipes with Recipe.to_json().",
            ) from error
        return cls.from_dict(value, where=where)

    @classmethod
    def from_dict(cls, value: Any, *, where: str = "recipe") -> Recipe:
        """Read what `to_dict` gave; see `from_json`."""
        _require_fields(value, ("format", "version", "swaps"), where)
        if value["format"] != FORMAT or value["version"] != VERSION:
            raise InvalidRecipe(
                asked=f"format {value['format']!r} version {value['version']!r}",
                found=f"this manyheads reads {FORMAT!r} version {VERSION}",
                where=where,
                fix="Use the release that wrote it, or write it anew with to_json().",
            )
        if not isinstance(value["swaps"], list):
            raise _wrong_type(value["swaps"], "a list of swaps", f"{where}.swaps")
        return cls(
            *(
                _swap_from_json(swap, f"{where}.swaps[{i}]")
                for i, swap in enumerate(value["swaps"])
            )
        )

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            InvalidRecipe: The file cannot be read or holds no valid recipe.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRecipe(
                asked=f"reading the recipe file {path}",
                found=f"it cannot be read: {error}",
                fix="Give the path of a file written with Recipe.to_json().",
            ) from error
        return cls.from_json(text, where=str(path))


def spec_to_json(spec: Spec | None) -> dict[str, Any] | None:
    """Write a spec as its kind and its options, defaults included."""
    if spec is None:
        return None
    options = {f.name: getattr(spec, f.name) for f in fields(spec)}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    return {"kind": type(spec).__name__, **plain}


def spec_from_json(value: Any, where: str) -> Any:
    """Read what `spec_to_json` wrote.

    Raises:
        InvalidRecipe: The kind or a field is unknown, or a value is not allowed.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
        raise _wrong_type(value, 'an object with a "kind"', where)
    kind = _KINDS.get(value["kind"])
    if kind is None:
        raise InvalidRecipe(
            asked=f"kind {value['kind']!r}",
            found="this version has no such mechanism",
            where=where,
            fix=nearest(value["kind"], _KINDS),
        )
    options = {key: option for key, option in value.items() if key != "kind"}
    known = {f.name: f for f in fields(kind)}
    required = [name for name, f in known.items() if f.default is MISSING]
    _require_fields(options, tuple(known), where, required=tuple(required))
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        return kind(**plain)
    except (InvalidOption, TypeError) as error:
        raise InvalidRecipe(
            asked=f"{value['kind']} with {plain}",
            found=f"a value is not allowed: {error}",
            where=where,
            fix=f"See help(manyheads.{value['kind']}).",
        ) from error


def _swap_from_json(value: Any, where: str) -> Swap:
    _require_fields(value, ("blocks", "attention", "ffn"), where, required=())
    try:
        return Swap(
            blocks=value.get("blocks"),
            attention=spec_from_json(value.get("attention"), f"{where}.attention"),
            ffn=spec_from_json(value.get("ffn"), f"{where}.ffn"),
        )
    except InvalidOption as error:
        raise InvalidRecipe(
            asked=f"the swap {dict(value)}",
            found=str(error),
            where=where,
            fix="Write recipes with Recipe.to_json().",
        ) from error


def _require_fields(
    value: Any,
    known: tuple[str, ...],
    where: str,
    *,
    required: tuple[str, ...] | None = None,
) -> None:
    """Refuse an object with unknown or missing fields, naming them all at once."""
    if not isinstance(value, Mapping):
        raise _wrong_type(value, "a JSON object", where)
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise InvalidRecipe(
            asked=f"field {', '.join(map(repr, unknown))}",
            found="this version does not know it",
            where=where,
            why="an ignored field would build another model than was written down",
            fix=nearest(unknown[0], known) if known else "It takes no fields.",
        )
    missing = [
        name for name in (known if required is None else required) if name not in value
    ]
    if missing:
        raise InvalidRecipe(
            asked="reading a recipe",
            found=f"field {', '.join(map(repr, missing))} is missing",
            where=where,
            fix="Write recipes with Recipe.to_json().",
        )


def _wrong_type(value: Any, wanted: str, where: str) -> InvalidRecipe:
    return InvalidRecipe(
        asked="reading a recipe",
        found=f"{value!r:.80} is not {wanted}",
        where=where,
        fix="Write recipes with Recipe.to_json().",
    )


def _require_kind(name: str, spec: object, kind: type) -> None:
    """Refuse Swap(attention=Hydra) and Swap(attention=Compact()) where written."""
    if spec is None or isinstance(spec, kind):
        return
    called = f"{spec.__name__}()" if isinstance(spec, type) else "Hydra() or Compact()"
    raise InvalidOption(
        asked=f"Swap({name}={spec!r})",
        found="it is no spec of that kind",
        fix=f"Pass an instance such as {called}.",
    )


def _block_numbers(blocks: Iterable[int]) -> tuple[int, ...]:
    try:
        numbers = tuple(blocks)
    except TypeError:
        numbers = ()
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if not numbers or not whole or len(set(numbers)) < len(numbers):
        raise InvalidOption(
            asked=f"Swap(blocks={blocks!r})",
            found="it is not a sequence of one or more different whole numbers",
            fix="Use blocks=range(10, 12), blocks=[0, 5], or leave it out for all.",
        )
    return numbers
