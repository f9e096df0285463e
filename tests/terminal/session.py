"""A command line run in this process, and the program as a process of its own."""

from __future__ import annotations

import json
import sys

import pytest

from manyheads.cli import main

PROGRAM = [
    sys.executable,
    "-c",
    "import sys; from manyheads.cli import main; sys.exit(main())",
]


class Terminal:
    """Runs a command line in this process and keeps what it wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = main(list(words))
        out, err = self.capsys.readouterr()
        return code, out, err

    def refusal(self, *words: str) -> str:
        """Run what must fail as the user's mistake; give the one paragraph."""
        code, out, err = self(*words)
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert "\n" not in err.strip()
        return err

    def json(self, *words: str) -> dict:
        code, out, err = self(*words, "--json")
        assert code == 0, err
        return json.loads(out)
