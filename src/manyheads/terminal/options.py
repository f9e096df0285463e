"""Options of the terminal made from the signature of a verb, and values read for them.

Every keyword of `train`, `heal` and `evaluate` is an option of the command of that
name, with the type of its annotation and the words of its docstring, so that an option
is written down once. A value comes from the command line or from a file; one reader
serves both, and what it does not understand is an error.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import typer
from torch import Tensor, nn

from manyheads.errors import InvalidOption, ManyheadsError, nearest
from manyheads.terminal.grammar import read_value

__all__ = ["REQUIRED", "Word", "option_value", "plain_value", "words_of"]

REQUIRED = inspect.Parameter.empty
"""The default of a word that must be given."""

_NONE = "none"
_LISTS = (tuple, list, Sequence)


@dataclass(frozen=True, kw_only=True, eq=False)
class Word:
    """One parameter of a verb, as the terminal and a file may give it.

    Attributes:
        name: The parameter's name.
        kinds: What it may be, unions taken apart.
        default: Its default, or `REQUIRED`.
        positional: Whether it is written without a name.
        told: What the docstring says of it.
    """

    name: str
    kinds: tuple[Any, ...]
    default: Any
    positional: bool
    told: str

    @property
    def flag(self) -> str:
        """The word as it is typed, e.g. ``--batch-size``."""
        dashed = self.name.replace("_", "-")
        return dashed.upper() if self.positional else f"--{dashed}"

    @property
    def is_model(self) -> bool:
        """Whether it is a model, which the terminal opens by name."""
        return any(_is_class(kind, nn.Module) for kind in self.kinds)

    @property
    def may_be_path(self) -> bool:
        """Whether its text may name a file or folder that is there."""
        return self.is_model or Path in self.kinds

    def parameter(self) -> inspect.Parameter:
        """Give what typer makes an option or an argument of; None stands for absent."""
        kind = self._typed()
        told = self.told or self.name.replace("_", " ")
        if self.is_model:
            told += " A timm name, or a folder written by manyheads.save()."
        if self.positional:
            info: Any = typer.Argument(help=told, metavar=self.flag)
        else:
            names = [self.flag]
            if kind is bool:
                names = [f"{self.flag}/--no-{self.flag[2:]}"]
            if self.default not in (REQUIRED, None):
                told += f" Default {_shown(self.default)}."
            info = typer.Option(*names, help=told, metavar=self._metavar(kind))
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, info],
        )

    def _typed(self) -> Any:
        """Choose the type that typer checks by itself, or text for what it cannot."""
        kinds = set(self.kinds)
        if self.default is None:
            # To leave it out is to say none.
            kinds.discard(type(None))
        if kinds == {bool}:
            return bool
        if kinds == {int}:
            return int
        if kinds == {int, float}:
            return float
        if len(kinds) == 1 and get_origin(next(iter(kinds))) is Literal:
            return next(iter(kinds))
        return str

    def _metavar(self, kind: Any) -> str | None:
        """Say what text stands for where typer would say no more than text."""
        numbers = {int, float} & set(self.kinds)
        if dict in self.kinds:
            return "KEY=VALUE,..."
        return "NUMBER|none" if kind is str and numbers else None


def words_of(verb: Callable[..., Any]) -> tuple[Word, ...]:
    """List the parameters of a verb, in the order of its signature.

    Raises:
        ManyheadsError: A parameter is of a kind that no text can give.
    """
    hints = get_type_hints(verb)
    told = _arguments_told(inspect.getdoc(verb) or "")
    words = []
    for name, parameter in inspect.signature(verb).parameters.items():
        word = Word(
            name=name,
            kinds=_kinds(hints[name]),
            default=parameter.default,
            positional=parameter.kind is not inspect.Parameter.KEYWORD_ONLY,
            told=told.get(name, ""),
        )
        if not any(map(_is_tellable, word.kinds)):
            raise ManyheadsError(
                asked=f"an option for {name} of {verb.__name__}",
                found=f"no text can give a {word.kinds}",
                fix="Please report this.",
            )
        words.append(word)
    return tuple(words)


def option_value(word: Word, value: Any, where: str) -> Any:
    """Read one value for a word: from the command line as text, from a file as it is.

    Args:
        word: The word.
        value: Text, number, truth value, list or table.
        where: The file or the flag, for messages.

    Raises:
        InvalidOption: The value is of a kind that the word does not take.
    """
    candidates = [value]
    if isinstance(value, str) and where.startswith("--"):
        candidates = [_from_text(value), value]
    elif type(None) in word.kinds and str(value).lower() == _NONE:
        # TOML has no other way to say it.
        candidates = [None]
    for candidate in candidates:
        for kind in word.kinds:
            fits, made = _as_kind(candidate, kind, f"{where}.{word.name}")
            if fits:
                return made
    raise InvalidOption(
        asked=f"{word.name} = {value!r}",
        found=f"it takes {_described(word.kinds)}",
        where=where,
        fix=_advice(word),
    )


def plain_value(value: Any) -> Any:
    """Give a value as JSON and TOML have it."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain_value(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain_value(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list | range):
        return [plain_value(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _as_kind(value: Any, kind: Any, where: str) -> tuple[bool, Any]:
    """Say whether a value is of a kind, and give it as one."""
    origin, no = get_origin(kind), (False, None)
    if origin is Literal:
        return any(value == c and type(value) is type(c) for c in get_args(kind)), value
    if kind is type(None):
        return value is None, None
    if kind is bool:
        return isinstance(value, bool), value
    if kind in (int, float):
        number = isinstance(value, int if kind is int else (int, float))
        return number and not isinstance(value, bool), value
    if kind in (str, Path) or _is_class(kind, nn.Module):
        return isinstance(value, str), value
    if kind is dict:
        return isinstance(value, Mapping), value
    if is_dataclass(kind) and isinstance(value, Mapping):
        return True, _built(kind, value, where)
    if is_dataclass(kind) and isinstance(value, str):
        return (True, _presets(kind)[value]()) if value in _presets(kind) else no
    if origin in _LISTS and isinstance(value, list | tuple):
        return _as_items(value, get_args(kind), where)
    return no


def _as_items(value: Sequence[Any], kinds: Any, where: str) -> tuple[bool, Any]:
    """Read a list whose items are all of one kind, or each of its own."""
    same = len(kinds) == 1 or kinds[1:] == (...,)
    each = [kinds[0]] * len(value) if same else list(kinds)
    if len(each) != len(value):
        return False, None
    made = []
    for item, kind in zip(value, each, strict=True):
        read = [_as_kind(item, k, where) for k in _kinds(kind)]
        good = [result for fits, result in read if fits]
        if not good:
            return False, None
        made.append(good[0])
    return True, tuple(made)


def _presets(kind: Any) -> dict[str, Callable[[], Any]]:
    """List the ready values of a class: its class methods that need no argument."""
    found: dict[str, Callable[[], Any]] = {}
    for name in vars(kind):
        made = getattr(kind, name)
        if inspect.ismethod(made) and not name.startswith("_"):
            needed = [p.default for p in inspect.signature(made).parameters.values()]
            if REQUIRED not in needed:
                found[name] = made
    return found


def _built(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    """Make a settings object of a table; unknown and missing fields are refused."""
    known = {field.name: field for field in fields(kind) if field.init}
    hints = get_type_hints(kind)
    strangers = [name for name in value if name not in known]
    if strangers:
        raise InvalidOption(
            asked=f"{kind.__name__} with {strangers[0]!r}",
            found="it has no such field",
            where=where,
            fix=nearest(strangers[0], known),
        )
    missing = [
        name
        for name, field in known.items()
        if name not in value
        and field.default is MISSING
        and field.default_factory is MISSING
    ]
    if missing:
        raise InvalidOption(
            asked=f"a {kind.__name__}",
            found=f"{', '.join(map(repr, missing))} is missing",
            where=where,
            fix=f"See help({kind.__name__}).",
        )
    made = {
        name: option_value(
            Word(
                name=name,
                kinds=_kinds(hints[name]),
                default=REQUIRED,
                positional=False,
                told="",
            ),
            inner,
            where,
        )
        for name, inner in value.items()
    }
    return kind(**made)


def _from_text(text: str) -> Any:
    """Read ``key=value,key=value`` as a table, commas as a list, else one value.

    In a table ``key=0.5,1.0`` is a list: what has no key belongs to the last one.
    """
    parts = text.split(",")
    if "=" in parts[0]:
        table: dict[str, list[Any]] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if equals:
                table[key.strip()] = [read_value(value)]
            else:
                next(reversed(table.values())).append(read_value(part))
        return {key: v[0] if len(v) == 1 else v for key, v in table.items()}
    return read_value(text) if len(parts) == 1 else [read_value(p) for p in parts]


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """Take unions and aliases apart."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(k for part in get_args(annotation) for k in _kinds(part))
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    return (annotation,)


def _is_tellable(kind: Any) -> bool:
    plain = kind in (bool, int, float, str, Path, dict) or get_origin(kind) is Literal
    settings = is_dataclass(kind) and not _is_class(kind, Tensor)
    return plain or settings or get_origin(kind) in _LISTS or _is_class(kind, nn.Module)


def _is_class(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def _described(kinds: Sequence[Any]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    told = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            told.append(f"one of {', '.join(map(repr, get_args(kind)))}")
        elif kind in (str, Path) or _is_class(kind, nn.Module):
            told.append("text")
        elif kind in names:
            told.append(names[kind])
        elif is_dataclass(kind) and isinstance(kind, type):
            told += [repr(name) for name in _presets(kind)]
            told.append(f"a table of {', '.join(f.name for f in fields(kind))}")
        elif kind is dict:
            told.append("a table such as key=value,key=value")
        elif get_origin(kind) in _LISTS:
            told.append("a list")
    return " or ".join(dict.fromkeys(told))


def _advice(word: Word) -> str:
    if word.default is REQUIRED:
        return "Give such a value."
    return f"Leave it out for the default, {_shown(word.default)}."


def _shown(default: Any) -> str:
    """Write a default as a reader of the help would type it."""
    if default is None:
        return _NONE
    if isinstance(default, bool):
        return str(default).lower()
    return str(plain_value(default))


_ENTRY = re.compile(r"^ {4}(\w+): (.*)$")


def _arguments_told(docstring: str) -> dict[str, str]:
    """Read what a Google docstring says of each argument."""
    found: dict[str, str] = {}
    name, inside = "", False
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            inside = line == "Args:"
        elif inside and (entry := _ENTRY.match(line)):
            name = entry[1]
            found[name] = entry[2]
        elif inside and name and line.strip():
            found[name] += f" {line.strip()}"
    return found
