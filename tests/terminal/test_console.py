"""Our mistakes, and leaving early: exit codes 1 and 130."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from manyheads.terminal.console import run
from tests.terminal.session import PROGRAM, Terminal


def _divide(_: list[str]) -> float:
    return 1 / 0


def test_a_mistake_of_ours_exits_with_1_and_keeps_the_traceback_in_a_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(_divide, []) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "report" in err
    log = Path(err.split()[-1])
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


def test_debug_prints_the_traceback_of_a_mistake_of_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(_divide, ["cost", "--debug"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_debug_changes_nothing_about_a_mistake_of_the_user(terminal: Terminal) -> None:
    terminal.refusal("cost", "no_such_model", "--debug")


def test_control_c_leaves_cleanly_with_130(tmp_path: Path) -> None:
    words = [*PROGRAM, "demo", "--out", str(tmp_path / "demo")]
    # A shell that runs the tests in the background lets its children ignore Ctrl-C.
    running = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stderr is not None
    assert "1/5" in running.stderr.readline()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130, err
    assert "Traceback" not in err
