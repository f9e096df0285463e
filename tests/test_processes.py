"""Runs shared by two real processes come out as those of one, and nobody hangs."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import shared_runs

TOGETHER = [
    "odd_batch",
    "everything_on",
    "unreadable",
    "too_many_unreadable",
    "an_unused_parameter",
    "in_shards",
    "a_loss_that_is_not_finite",
    "healing",
    "shown",
    "stopped",
    "killed",
]


def launch(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Make these runs in two processes, as a user would start them."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--nproc-per-node", "2", "-m", "tests.shared_runs", str(folder), *names]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=240, check=False
    )


def rows(path: Path) -> list[dict[str, str]]:
    """Read a log, without what is another time each time."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    times = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def first(folder: Path) -> subprocess.CompletedProcess[str]:
    return launch(folder, *TOGETHER)


def both(
    folder: Path, first: subprocess.CompletedProcess[str], name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two processes gave."""
    files = [folder / f"{name}-{index}.pt" for index in (0, 1)]
    assert all(file.exists() for file in files), first.stderr
    ours, theirs = (torch.load(file) for file in files)
    return ours, theirs


def assert_same_weights(
    ours: dict[str, Any], theirs: dict[str, Any], *, rtol: float
) -> None:
    for name, weight in ours["weights"].items():
        other = theirs["weights"][name]
        if rtol:
            torch.testing.assert_close(weight, other, rtol=rtol, atol=rtol)
        else:
            assert torch.equal(weight, other), name


@pytest.mark.parametrize(
    "name",
    ["odd_batch", "everything_on", "unreadable", "an_unused_parameter", "in_shards"],
)
def test_two_processes_do_what_one_does(
    name: str, folder: Path, first: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    ours, theirs = both(folder, first, name)
    alone = getattr(shared_runs, name)(tmp_path)
    assert_same_weights(ours, theirs, rtol=0)
    assert_same_weights(ours, alone, rtol=1e-8)
    assert ours["losses"] == pytest.approx(alone["losses"], rel=1e-9)
    assert ours["skipped"] == theirs["skipped"] == alone["skipped"]


def test_shards_are_put_together_again_even_after_a_stop(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    for found in both(folder, first, "in_shards"):
        assert found["plain"]
        assert len(found["history"]) == 2
    steps = [row["step"] for row in rows(folder / "in_shards" / "steps.csv")]
    assert steps == [str(step) for step in range(1, 13)]


def test_no_image_is_evaluated_twice_or_left_out(
    folder: Path, first: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    ours, theirs = both(folder, first, "unreadable")
    assert ours["images"] == theirs["images"] == 23
    assert len(ours["evaluation skipped"]) == 7
    alone = shared_runs.unreadable(tmp_path)
    assert ours["top1"] == theirs["top1"] == alone["top1"]
    measured = both(folder, first, "odd_batch")
    expected = shared_runs.odd_batch(tmp_path)
    for found in measured:
        assert found["top1"] == expected["top1"]
        wanted = pytest.approx(expected["validation loss"], rel=1e-6)
        assert found["validation loss"] == wanted
        assert found["processes"] == 2


def test_what_fails_in_one_process_fails_in_both(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    for found in both(folder, first, "too_many_unreadable"):
        assert found == {"error": "DataError", "item": True}
    for found in both(folder, first, "a_loss_that_is_not_finite"):
        assert found == {"error": "NonFiniteLoss", "finite": True}


def test_healing_is_shared_too(
    folder: Path, first: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    ours, theirs = both(folder, first, "healing")
    assert_same_weights(ours, theirs, rtol=0)
    alone = shared_runs.healing(tmp_path)
    assert_same_weights(ours, alone, rtol=1e-8)
    assert ours["divergence"] == pytest.approx(alone["divergence"], rel=1e-6)
    assert ours["losses"] == pytest.approx(alone["losses"], rel=1e-9)


def test_only_the_main_process_shows_and_writes(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.stderr.count("4/4") == 1
    lines = rows(folder / "everything-2" / "epochs.csv")
    assert [line["epoch"] for line in lines] == ["1", "2"]
    assert {"validation_top1", "validation_average_top1"} <= set(lines[0])


def test_a_run_of_two_that_one_is_asked_to_leave_is_saved_and_goes_on(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    for found in both(folder, first, "stopped"):
        assert found["code"] == 128 + signal.SIGTERM
        # Not a step that is kept anyway: those are even.
        assert found["kept"] == ["step-4.0", "step-5.0"]
        assert found["same"]


def test_a_run_of_two_that_was_killed_goes_on_bit_for_bit(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode != 0
    assert "SIGKILL" in first.stderr
    assert not (folder / "killed-0.pt").exists()
    kept = sorted((folder / "killed").glob("step-*"))
    assert [step.name for step in kept] == ["step-10.0", "step-8.0"]
    second = launch(folder, "resumed", "straight")
    assert second.returncode == 0, second.stderr
    for index in (0, 1):
        went_on = both(folder, second, "resumed")[index]
        expected = both(folder, second, "straight")[index]
        assert_same_weights(went_on, expected, rtol=0)
        assert went_on["losses"] == expected["losses"]
    for name in ("steps.csv", "epochs.csv"):
        assert rows(folder / "killed" / name) == rows(folder / "straight" / name)
