"""However often a run is killed, it ends as if it had not been; with real kills."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_loop import assert_same, model, run

KILLS = {"train": 24, "heal": 24}


def rows(path: Path) -> list[dict[str, str]]:
    """Read a log, without what is another time each time."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    times = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


@pytest.mark.parametrize("verb", KILLS)
def test_killed_at_random_points_a_run_ends_with_the_same_bits(
    tmp_path: Path, verb: str
) -> None:
    line = [sys.executable, "-m", "tests.killed_runs"]
    done = subprocess.run(
        [*line, str(tmp_path), verb, "1", str(KILLS[verb])],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == KILLS[verb]
    # Most kills came after a checkpoint, so that there was something to go on from.
    assert told["resumed"] > KILLS[verb] / 2
    expected = load_file(tmp_path / "straight.safetensors")
    for number in range(told["runs"]):
        name = f"run-{number}"
        found = load_file(tmp_path / f"{name}.safetensors")
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), (name, key)
        for log in ("steps.csv", "epochs.csv"):
            assert rows(tmp_path / name / log) == rows(tmp_path / "straight" / log)
        assert not list((tmp_path / name).glob(".writing*"))
        assert len(list((tmp_path / name).glob("step-*"))) == 2


def test_a_step_too_many_goes_when_the_run_is_opened_again(tmp_path: Path) -> None:
    """As a kill leaves it that falls between writing a step and retiring an older."""
    finished, folder = model(), tmp_path / "run"
    run(finished, folder, epochs=1, checkpoint_every=2)
    older, newer = sorted(folder.glob("step-*"))
    shutil.copytree(older, folder / "step-1.0")
    again = model()
    run(again, folder, epochs=1, checkpoint_every=2)
    assert sorted(folder.glob("step-*")) == [older, newer]
    assert not list(folder.glob(".writing*"))
    assert_same(again, finished)
