"""A disk that is full is named by every verb that writes, and nothing torn is left."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import manyheads as mh
from manyheads.data import digits
from manyheads.drawing import draw
from manyheads.errors import CheckpointError, DataError
from manyheads.loop.journal import Journal
from manyheads.report import report
from tests.disk import small_disk
from tests.helpers import tiny_vit

NO_ROOM = "(?i)no space left|file too large"


def test_a_state_that_does_not_fit_leaves_the_step_before(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    with small_disk(tmp_path / "disk"):
        journal = Journal(tmp_path / "disk" / "run", {})
        journal.write({"model": model}, 1, {"step": 1})
        # Too large, and just too large: torch's archive fails in different places.
        refusals = []
        for numbers in (40_000, *range(15_800, 12_000, -150)):
            state = {"x": torch.zeros(numbers), "y": [torch.zeros(7)] * 5}
            try:
                journal.write({"model": model}, 2, state)
            except CheckpointError as error:
                refusals.append(str(error))
                assert journal.read({"model": model}) == {"step": 1}
                assert not list(journal.folder.glob(".writing-*"))
            else:
                break
        journal.close()
    assert len(refusals) > 5
    assert all(re.search(NO_ROOM, told) for told in refusals), refusals


@pytest.mark.parametrize("taken", [0, 60 * 1024], ids=["weights", "log"])
def test_a_run_says_which_folder_has_no_room(taken: int, tmp_path: Path) -> None:
    (images, labels), _ = digits(image_size=32)
    disk = tmp_path / "disk"
    with small_disk(disk):
        (disk / "filler").write_bytes(bytes(taken))
        run = disk / "run"
        with pytest.raises(CheckpointError, match=NO_ROOM) as caught:
            mh.train(
                tiny_vit(depth=2),
                (images[:32], labels[:32]),
                epochs=1,
                batch_size=16,
                run_dir=run,
                progress=False,
            )
        assert str(run) in str(caught.value)
        assert not list(run.glob(".writing-*"))


def _report(disk: Path) -> None:
    words = {"model": "softmax", "accuracy_before": 0.5}
    recorded = {"rows": [words], "conditions": {"notes": "many words " * 10_000}}
    (disk.parent / "run.json").write_text(json.dumps(recorded))
    report(disk.parent / "run.json", disk / "run.html")


def _draw(disk: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: manyheads[draw]")
    (disk / "filler").write_bytes(bytes(40 * 1024))
    draw(mh.attention_maps(tiny_vit(), torch.randn(1, 3, 32, 32)), disk / "maps.png")


@pytest.mark.parametrize("write", [_draw, _report], ids=["draw", "report"])
def test_a_page_or_a_picture_is_there_whole_or_not_at_all(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk):
        with pytest.raises(DataError, match=f"{NO_ROOM}.*with room"):
            write(disk)
        assert [p for p in disk.iterdir() if p.name != "filler"] == []
