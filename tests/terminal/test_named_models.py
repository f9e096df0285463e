"""Learning from a timm name: how it is built, with which weights, and where it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import manyheads as mh
from tests.terminal.session import Terminal

# Of timm's own tests: 160 pixels, 1,000 classes, small.
NAME = "test_vit"
BUILT = ("--no-pretrained", "--model-arguments", "img_size=32,num_classes=10")
QUICK = ("--epochs", "1", "--no-progress", "--batch-size", "10")


def _same(one: Path, other: Path) -> bool:
    ours, theirs = (mh.load(folder).state_dict() for folder in (one, other))
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_registered_model_learns_as_many_classes_as_there_are(
    terminal: Terminal, pictures: str, tmp_path: Path
) -> None:
    words = ("train", NAME, pictures, *QUICK, "--out", str(tmp_path / "out"))
    refused = terminal.refusal(*words, "--no-pretrained")
    assert "--model-arguments num_classes=10" in refused
    found = terminal.json(*words, *BUILT)
    assert found["config"]["model_arguments"] == {"img_size": 32, "num_classes": 10}
    assert mh.load(tmp_path / "out").head.out_features == 10


def test_random_weights_come_from_the_seed_so_that_a_file_repeats_them(
    terminal: Terminal, pictures: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("train", NAME, pictures, *QUICK, *BUILT, "--teacher", NAME)
    words += ("--distillation-weight", "0.0", "--seed", "5")
    # A teacher of a thousand classes is refused: it is built as it is published.
    assert "1000" in terminal.refusal(*words, "--out", str(tmp_path / "no"))
    words = ("train", NAME, pictures, *QUICK, *BUILT, "--seed", "5")
    torch.manual_seed(1)
    terminal.json(*words, "--out", str(tmp_path / "a"), "--run-dir", str(run))
    torch.manual_seed(2)
    anew = ("--out", str(tmp_path / "b"), "--run-dir", str(tmp_path / "anew"))
    terminal.json("train", "--config", str(run / "config.json"), *anew)
    assert _same(tmp_path / "a", tmp_path / "b")
    # The same command again takes the finished run for its own.
    terminal.json(*words, "--out", str(tmp_path / "a"), "--run-dir", str(run))
    terminal.json(*words, "--seed", "6", "--out", str(tmp_path / "c"))
    assert not _same(tmp_path / "a", tmp_path / "c")


def test_a_teacher_may_be_pretrained_where_the_student_is_not(
    terminal: Terminal,
    teacher: str,
    pictures: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, bool] = {}

    def opened(name: str, *, pretrained: bool, **_: object) -> None:
        asked[name] = pretrained
        raise mh.errors.UnknownModel(asked=name, found="that is enough", fix="-")

    monkeypatch.setattr("manyheads.hosts.timm_zoo.create", opened)
    words = ("train", teacher, pictures, *QUICK, "--out", str(tmp_path / "out"))
    for said, expected in (
        ((), True),
        (("--no-pretrained",), False),
        (("--no-pretrained", "--teacher-pretrained"), True),
        (("--no-teacher-pretrained",), False),
    ):
        terminal.refusal(*words, "--teacher", NAME, *said)
        assert asked == {NAME: expected}, said


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ("num_heads=2,colour=red", ["colour='red'", "num_classes=10"]),
        ("ten", ["a table such as key=value", "model_arguments"]),
    ],
)
def test_arguments_that_build_nothing_are_refused(
    arguments: str,
    facts: list[str],
    terminal: Terminal,
    pictures: str,
    tmp_path: Path,
) -> None:
    words = ("train", NAME, pictures, *QUICK, "--no-pretrained")
    said = terminal.refusal(
        *words, "--model-arguments", arguments, "--out", str(tmp_path / "out")
    )
    assert all(fact in said for fact in facts), said


def test_a_folder_is_not_built_anew(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    words = ("train", teacher, pictures, *QUICK, "--out", str(tmp_path / "out"))
    said = terminal.refusal(*words, "--model-arguments", "num_classes=10")
    assert "it is a folder" in said


@pytest.mark.parametrize("verb", ["train", "heal"])
@pytest.mark.parametrize("place", ["a file", "a folder", "in a file", "the run"])
def test_a_place_that_cannot_be_written_is_known_before_the_work(
    verb: str,
    place: str,
    terminal: Terminal,
    teacher: str,
    pictures: str,
    tmp_path: Path,
) -> None:
    run, taken = tmp_path / "run", tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    out = {
        "a file": taken / "mine.txt",
        "a folder": taken,
        "in a file": taken / "mine.txt" / "out",
        "the run": run,
    }[place]
    words = ["train", teacher] if verb == "train" else ["heal", teacher, teacher]
    words += [pictures, "--no-progress", "--out", str(out), "--run-dir", str(run)]
    words += ["--epochs", "1"] if verb == "train" else []
    assert str(out) in terminal.refusal(*words)
    assert not run.exists()
    assert (taken / "mine.txt").read_text() == "mine"


def test_words_that_are_no_paths_stay_as_they_are(
    terminal: Terminal,
    teacher: str,
    pictures: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder that happens to be called as a value is not meant by it."""
    monkeypatch.chdir(tmp_path)
    for name in ("fp32", "soft", "light"):
        (tmp_path / name).mkdir()
    words = ("train", teacher, pictures, *QUICK, "--augment", "light")
    terminal.json(*words, "--out", "out", "--run-dir", "run")
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["precision"], kept["distillation"]) == ("fp32", "soft")
    assert kept["out"] == str(tmp_path / "out")
    terminal.json("train", "--config", str(tmp_path / "run" / "config.json"))
