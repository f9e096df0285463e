"""A file is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyheads.drafts import draft_of


def test_a_draft_takes_its_place_with_an_ordinary_file_s_rights(tmp_path: Path) -> None:
    target, ordinary = tmp_path / "page.html", tmp_path / "ordinary"
    ordinary.touch()
    with draft_of(target) as draft:
        assert draft.suffix == ".html"
        assert not target.exists()
        draft.write_text("whole", encoding="utf-8")
    assert target.read_text(encoding="utf-8") == "whole"
    assert target.stat().st_mode == ordinary.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [ordinary, target]


def test_an_error_leaves_no_draft_and_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("before", encoding="utf-8")
    with pytest.raises(OSError, match="disk is full"):
        _cut_short(target)
    assert target.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_not_there_is_known_before_the_work(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError),
        draft_of(tmp_path / "missing" / "page.html"),
    ):
        pytest.fail("the work began")


def _cut_short(target: Path) -> None:
    with draft_of(target) as draft:
        draft.write_text("ha", encoding="utf-8")
        raise OSError("the disk is full")
