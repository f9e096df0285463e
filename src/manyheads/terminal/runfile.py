"""A command in a file: TOML or JSON in, and JSON out with every value resolved.

    command = "train"
    model = "deit_tiny_patch16_224"
    images = "photos/train"
    out = "trained"
    epochs = 30

The keys are the words of the command line without dashes. A word on the command line
wins over the file, the file over a named recipe, the recipe over the defaults. What a
command writes of itself is such a file again, so that the run can be repeated.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from manyheads.drafts import draft_of
from manyheads.errors import CheckpointError, InvalidOption, ManyheadsError, nearest
from manyheads.terminal.console import note
from manyheads.terminal.options import REQUIRED, Word, option_value, plain_value

__all__ = [
    "KEPT",
    "kept_beside",
    "read_command",
    "settle",
    "write_command",
    "written",
]

FORMAT, VERSION = "manyheads.command", 1
KEPT = "config.json"
"""The name of the file in the folder of a run."""

_HEAD = ("format", "version", "command", "versions")
_PACKAGES = ("manyheads", "torch", "timm", "transformers", "torchvision", "accelerate")


def read_command(path: Path, command: str, words: Sequence[Word]) -> dict[str, Any]:
    """Read the values that a file gives to the words of a command.

    Args:
        path: A .toml or .json file; also what ``--json`` printed.
        command: The command that asks.
        words: What it understands.

    Raises:
        InvalidOption: The file cannot be read, is of another command or format, or has
            a key or a value that the command does not know.
    """
    found = _parsed(path)
    if {"config", "result"} <= found.keys() and isinstance(found["config"], dict):
        found = found["config"]
    if found.get("format", FORMAT) != FORMAT or found.get("version", 1) != VERSION:
        raise _refused(
            path,
            f"its format is {found.get('format')!r} version {found.get('version')!r}, "
            f"not {FORMAT!r} version {VERSION}",
            fix=f"A run's folder keeps its command in {KEPT}.",
        )
    if found.get("command", command) != command:
        raise _refused(
            path,
            f"it is the file of a {found['command']!r}",
            fix=f"Use manyheads {found['command']} --config {path}.",
        )
    _remark_on_versions(found.get("versions"), path)
    known = {word.name: word for word in words}
    given = {k.replace("-", "_"): v for k, v in found.items() if k not in _HEAD}
    strangers = sorted(given.keys() - known.keys())
    if strangers:
        raise _refused(
            path,
            f"{command} knows no {', '.join(map(repr, strangers))}",
            fix=nearest(strangers[0], known),
        )
    return {k: option_value(known[k], v, str(path)) for k, v in given.items()}


def settle(
    words: Sequence[Word],
    command: str,
    *,
    typed: Mapping[str, Any],
    file: Mapping[str, Any],
    recipe: Mapping[str, Any],
) -> dict[str, Any]:
    """Give every word its value: typed, else from the file, the recipe, the default.

    Raises:
        InvalidOption: A word that must be given was not; all of them are named.
    """
    said = {
        word.name: option_value(word, typed[word.name], word.flag)
        for word in words
        if typed.get(word.name) is not None
    }
    defaults = {w.name: w.default for w in words if w.default is not REQUIRED}
    settled = {**defaults, **recipe, **file, **said}
    missing = [word for word in words if word.name not in settled]
    if missing:
        needed = ", ".join(word.flag for word in missing)
        raise InvalidOption(
            asked=f"manyheads {command}",
            found=f"{needed} {'is' if len(missing) == 1 else 'are'} not given",
            fix=f"Name {'it' if len(missing) == 1 else 'them'} on the command line, or "
            "in a file with --config FILE.",
        )
    return {word.name: settled[word.name] for word in words}


def written(
    command: str, words: Sequence[Word], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Give a command with all its values as the file that repeats it.

    Models and images that are paths of what is there are made absolute, so that the
    file works from anywhere.
    """
    head = {
        "format": FORMAT,
        "version": VERSION,
        "command": command,
        "versions": _versions(),
    }
    plain = {name: plain_value(value) for name, value in values.items()}
    for name in (word.name for word in words if word.may_be_path):
        value = plain[name]
        if isinstance(value, str):
            # A source of images may name a part of it: photos[test].
            place, bracket, part = value.partition("[")
            if place and Path(place).exists():
                plain[name] = f"{Path(place).resolve()}{bracket}{part}"
    for name in ("out", "run_dir"):
        if plain.get(name):
            plain[name] = str(Path(plain[name]).resolve())
    return head | plain


@contextmanager
def kept_beside(folder: str | Path | None, command: dict[str, Any]) -> Iterator[None]:
    """Keep the command in the folder of its run, from its start.

    A run that is refused at once leaves the folder as it was.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    if folder is None:
        yield
        return
    file = Path(folder) / KEPT
    fresh = not file.parent.exists()
    # What another run keeps there stays until the run has been found to be this one.
    early = not _is_taken(file.parent)
    if early:
        write_command(file, command)
    try:
        yield
    except ManyheadsError:
        begun = early and any(
            p.name not in (KEPT, ".lock") for p in file.parent.iterdir()
        )
        if early and not begun:
            file.unlink(missing_ok=True)
            if fresh and not any(file.parent.iterdir()):
                file.parent.rmdir()
        raise
    if not early:
        write_command(file, command)


def write_command(file: Path, command: dict[str, Any]) -> None:
    """Write a command as JSON; it appears whole or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(file) as draft:
            draft.write_text(json.dumps(command, indent=2), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            asked=f"keeping the command in {file}",
            found=f"it cannot be written: {error}",
            fix="Choose a folder that you may write to.",
        ) from error


def _is_taken(folder: Path) -> bool:
    """Say whether something lies there; the run decides whether it may go on."""
    return folder.is_file() or (folder.is_dir() and any(folder.glob("[!.]*")))


def _parsed(path: Path) -> dict[str, Any]:
    readers = {".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise _refused(
            path,
            f"the ending {path.suffix!r} is neither .toml nor .json",
            fix="Rename it to what it is.",
        )
    try:
        found = readers[path.suffix](path.read_text(encoding="utf-8"))
    # Both parsers raise kinds of ValueError, and so does a file that is no text.
    except (OSError, ValueError) as error:
        raise _refused(
            path,
            f"it cannot be read: {error}",
            fix='Write lines such as epochs = 30 (.toml), or {"epochs": 30} (.json).',
        ) from error
    if not isinstance(found, dict):
        raise _refused(
            path, "it is no table of names and values", fix='Write {"epochs": 30}.'
        )
    return found


def _remark_on_versions(there: Any, path: Path) -> None:
    """Say that a repetition runs on other versions: it may come out differently."""
    if not isinstance(there, dict):
        return
    here = _versions()
    told = [
        f"{name} was {was} and is {here.get(name, 'not installed')}"
        for name, was in there.items()
        if here.get(name) != was
    ]
    if told:
        note(f"Warning: {path} was written with other versions: {'; '.join(told)}.")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _refused(path: Path, found: str, *, fix: str) -> InvalidOption:
    return InvalidOption(asked=f"--config {path}", found=found, fix=fix)
