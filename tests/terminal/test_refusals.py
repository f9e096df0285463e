"""The user's mistakes: what, what is there, where, what to do; exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import manyheads as mh
from tests.disk import small_disk
from tests.helpers import tiny_vit
from tests.terminal.session import PROGRAM, Terminal


def test_an_unknown_model_is_answered_with_near_names(terminal: Terminal) -> None:
    said = terminal.refusal("cost", "deit_smal_patch16_224")
    assert "UnknownModel" in said
    assert "'deit_smal_patch16_224'" in said
    assert "Did you mean deit_small_patch16_224" in said


def test_a_missing_folder_is_not_taken_for_a_name(
    terminal: Terminal, tmp_path: Path
) -> None:
    said = terminal.refusal("cost", str(tmp_path / "nothing"))
    assert "UnknownModel" in said
    assert "no such folder" in said


def test_a_model_without_attention_is_refused(
    terminal: Terminal, tmp_path: Path
) -> None:
    said = terminal.refusal("preview", "resnet10t", "--attention", "hydra")
    assert "UnknownHost" in said
    assert "no attention" in said


def test_a_recipe_that_matches_no_block_is_refused(
    terminal: Terminal, tmp_path: Path
) -> None:
    # Its feed-forward layers are not timm's Mlp, and nothing else is asked for.
    out = tmp_path / "student"
    words = ("--ffn", "compact", "--no-pretrained", "--out", str(out))
    said = terminal.refusal("convert", "vitamin_small_224", *words)
    assert "NothingToConvert" in said
    assert not out.exists()


def test_a_block_out_of_range_names_the_range(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    words = ("--attention", "hydra", "--blocks", "1-3", "--out", str(out))
    said = terminal.refusal("convert", teacher, *words)
    assert "NothingToConvert" in said
    assert "block 3" in said
    assert "0-2" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"version": 9}, "version 9"),
        ({"speed": "high"}, "'speed'"),
        ({"swaps": [{"attention": {"kind": "Hydra", "kernl": "mean"}}]}, "'kernel'"),
        ({"swaps": [{"attention": {"kind": "Hidra"}}]}, "'Hydra'"),
        ({"swaps": []}, "one or more"),
    ],
    ids=["version", "field", "option", "kind", "empty"],
)
def test_a_wrong_recipe_file_is_refused(
    terminal: Terminal, teacher: str, tmp_path: Path, change: dict, fact: str
) -> None:
    recipe = mh.Recipe(mh.Swap(attention=mh.Hydra())).to_dict() | change
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    said = terminal.refusal("preview", teacher, "--recipe", str(file))
    assert "InvalidRecipe" in said
    assert fact in said


def test_a_recipe_file_that_is_no_json_is_refused(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.json"
    file.write_text("{'swaps': ")
    said = terminal.refusal("preview", teacher, "--recipe", str(file))
    assert "not JSON" in said
    assert str(file) in said


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["--attention", "hidra"], ["hidra", "'hydra'"]),
        (["--attention", "hydra:kernl=mean"], ["'kernl'", "'kernel'"]),
        (["--attention", "hydra:kernel=men"], ["'men'", "'mean'"]),
        (["--attention", "hydra:kernel"], ["key=value"]),
        (["--attention", "compact"], ["compact", "hydra"]),
        (["--ffn", "compact:rank=1.5"], ["1.5"]),
        (["--attention", "hydra", "--blocks", "2-1"], ["2-1", "--blocks"]),
        (["--attention", "hydra", "--blocks", "x"], ["'x'"]),
        (["--attention", "hydra", "--image-size", "axb"], ["axb", "1080x1920"]),
        (["--blocks", "1"], ["--attention"]),
        (["--recipe", "r.json", "--blocks", "1"], ["r.json", "--blocks"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_wrong_option_is_refused(
    terminal: Terminal, teacher: str, words: list[str], facts: list[str], untyped: None
) -> None:
    said = terminal.refusal("preview", teacher, *words)
    assert all(fact in said for fact in facts), said


def test_an_impossible_image_size_names_the_smallest(
    terminal: Terminal, teacher: str
) -> None:
    said = terminal.refusal("cost", teacher, "--image-size", "4x32")
    assert "ImageSizeError" in said
    assert "4x32" in said
    assert "8x8" in said


@pytest.mark.parametrize("verb", ["heal", "train", "evaluate"])
@pytest.mark.parametrize("state", ["missing", "empty", "unreadable"])
def test_a_folder_without_images_is_refused(
    terminal: Terminal, teacher: str, tmp_path: Path, verb: str, state: str
) -> None:
    student = str(tmp_path / "student")
    terminal("convert", teacher, "--attention", "hydra", "--out", student)
    images, out = tmp_path / "images", tmp_path / "out"
    if state != "missing":
        (images / "class0").mkdir(parents=True)
    if state == "unreadable":
        for number in range(3):
            (images / "class0" / f"{number}.png").write_bytes(b"not a picture")
    words = {
        "heal": ["heal", student, teacher, str(images), "--out", str(out)],
        "train": ["train", student, str(images), "--epochs", "1", "--out", str(out)],
        "evaluate": ["evaluate", student, str(images)],
    }[verb]
    said = terminal.refusal(*words)
    assert "DataError" in said
    assert str(images) in said
    assert not out.exists()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "no card", "newer"])
def test_a_damaged_checkpoint_is_refused(
    terminal: Terminal, tmp_path: Path, damage: str
) -> None:
    folder = mh.save(tiny_vit(), tmp_path / "model")
    card, weights = folder / "manyheads.json", folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "foreign":
        card.write_text('{"model_type": "vit"}')
    elif damage == "no card":
        card.unlink()
    else:
        card.write_text(json.dumps(json.loads(card.read_text()) | {"version": 2}))
    said = terminal.refusal("cost", str(folder))
    assert "CheckpointError" in said
    assert str(folder) in said
    assert "manyheads.save" in said


def test_what_is_not_ours_is_never_overwritten(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    words = ("--attention", "hydra", "--out", str(tmp_path))
    said = terminal.refusal("convert", teacher, *words)
    assert "CheckpointError" in said
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 1


def test_no_space_left_leaves_nothing_behind(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk):
        words = ("--attention", "hydra", "--out", str(disk / "student"))
        said = terminal.refusal("convert", teacher, *words)
        assert list(disk.iterdir()) == []
    assert "CheckpointError" in said
    assert str(disk / "student") in said
    assert "Free space" in said


def test_pretrained_weights_out_of_reach_say_so() -> None:
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent/cache"}
    words = [*PROGRAM, "evaluate", "deit_tiny_patch16_224", "photos"]
    ended = subprocess.run(
        words, env=offline, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "CheckpointError: the pretrained weights" in ended.stderr
    assert "--no-pretrained" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "words", [["cost"], ["fly"], ["cost", "x", "--fast"], ["bench", "--rounds", "0"]]
)
def test_a_wrong_command_line_exits_with_2(
    terminal: Terminal, words: list[str]
) -> None:
    code, out, err = terminal(*words)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
