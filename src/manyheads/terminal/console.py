"""How the terminal talks: results on stdout, all else on stderr, and an exit code.

0: it worked. 2: the user can mend it; one paragraph says how. 1: our mistake; a short
message asks for a report and names the file that holds the traceback. 130: stopped
with Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from manyheads.errors import ManyheadsError

__all__ = ["is_first_process", "note", "run", "show"]

OURS, USERS, STOPPED = 1, 2, 130
_DEBUG = "--debug"


def show(
    result: object,
    *,
    as_json: bool,
    models: Sequence[Any] = (),
    config: dict[str, Any] | None = None,
) -> None:
    """Write a result to stdout, with the origin of the weights it was made with.

    Args:
        result: Something with `to_json`, or JSON values; printed with `str`.
        as_json: Whether to write one JSON object and nothing else.
        models: The `NamedModel` that the result speaks of.
        config: The command with all its values, for those that can be repeated.
    """
    if as_json:
        value = result.to_json() if hasattr(result, "to_json") else result
        value = json.loads(value) if isinstance(value, str) else value
        whole: dict[str, Any] = {"models": [model.to_json() for model in models]}
        whole |= {} if config is None else {"config": config}
        whole |= {"result": value}
        sys.stdout.write(json.dumps(whole, indent=2, allow_nan=False) + "\n")
        return
    lines = [str(result), *(str(model) for model in models)]
    sys.stdout.write("\n".join(lines) + "\n")


def is_first_process() -> bool:
    """Say whether this process speaks and writes for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """Tell a person something that is no result: progress, paths, warnings."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def run(command: Callable[[list[str]], object], arguments: Sequence[str]) -> int:
    """Run a command line and give its exit code; no traceback for a user's mistake.

    Args:
        command: Runs the arguments; leaves with SystemExit or returns.
        arguments: What was typed after the program's name. ``--debug``, anywhere
            before ``--``, prints the traceback of our own mistakes.
    """
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    debug = _DEBUG in words[:end]
    if debug:
        words.remove(_DEBUG)
    try:
        command(words)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(bool(leaving))
        if code == STOPPED:
            note("Stopped.")
        return code
    except KeyboardInterrupt:
        note("Stopped.")
        return STOPPED
    except ManyheadsError as error:
        if type(error) is ManyheadsError:
            return _ours(error, debug=debug)
        note(f"{type(error).__name__}: {error}")
        return USERS
    except Exception as error:
        return _ours(error, debug=debug)
    return 0


def _ours(error: Exception, *, debug: bool) -> int:
    """Ask for a report; the traceback goes to a file unless it was asked for."""
    text = "".join(traceback.format_exception(error))
    if debug:
        note(text)
    else:
        with tempfile.NamedTemporaryFile(
            "w", prefix="manyheads-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            log.write(text)
        note(
            f"This is a mistake in manyheads, not yours: {type(error).__name__}: "
            f"{error}\nPlease report it with the command and the file {log.name}"
        )
    return OURS
