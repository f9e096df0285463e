"""The commands that convert and measure: what they print and what they write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import manyheads as mh
from manyheads.cli import app
from tests.terminal.session import Terminal

VERBS = [
    "preview",
    "convert",
    "heal",
    "train",
    "evaluate",
    "cost",
    "bench",
    "export",
    "run",
    "maps",
    "report",
    "demo",
]


def test_the_commands_are_the_verbs() -> None:
    assert [c.callback.__name__ for c in app.registered_commands] == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(terminal: Terminal, verb: str) -> None:
    code, out, _ = terminal(verb, "--help")
    assert code == 0
    assert f"Example: manyheads {verb}" in out
    assert "--json" in out


def test_preview_changes_nothing_and_names_the_weights(
    terminal: Terminal, teacher: str
) -> None:
    before = sorted(Path(teacher).iterdir())
    code, out, _ = terminal("preview", teacher, "--attention", "hydra", "--blocks", "2")
    assert code == 0
    assert "blocks.2" in out
    assert "Hydra()" in out
    assert "weights read from the folder" in out
    assert sorted(Path(teacher).iterdir()) == before


def test_random_weights_are_called_random(terminal: Terminal) -> None:
    found = terminal.json("cost", "deit_tiny_patch16_224")
    assert found["models"] == [{"name": "deit_tiny_patch16_224", "weights": "random"}]
    assert found["result"]["parameters"] == 5_717_416
    assert "random weights" in terminal("cost", "deit_tiny_patch16_224")[1]


def test_cost_counts_at_the_size_that_was_asked_for(
    terminal: Terminal, teacher: str
) -> None:
    result = terminal.json("cost", teacher, "--image-size", "40x60")["result"]
    assert result["image_size"] == [40, 60]
    assert result["fed_size"] == [40, 64]


def test_convert_writes_a_model_that_loads(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "student")
    words = ("convert", teacher, "--attention", "hydra:kernel=mean", "--out", out)
    assert len(terminal.json(*words, "--blocks", "0,-1")["result"]["rows"]) == 2
    student = mh.load(out)
    recipe = mh.Recipe(mh.Swap(blocks=[0, 2], attention=mh.Hydra(kernel="mean")))
    expected = mh.convert(mh.load(teacher), recipe)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(student(x), expected(x))


def test_convert_takes_a_recipe_file(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    recipe = mh.Recipe(mh.Swap(blocks=[1], ffn=mh.Compact(rank=3)))
    file = tmp_path / "recipe.json"
    file.write_text(recipe.to_json())
    found = terminal.json("preview", teacher, "--recipe", str(file))
    assert [row["becomes"] for row in found["result"]["rows"]] == [
        "Softmax() + Compact(rank=3)"
    ]


def test_heal_evaluate_and_bench_follow_each_other(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    student, healed = str(tmp_path / "student"), str(tmp_path / "healed")
    terminal.json("convert", teacher, "--attention", "hydra", "--out", student)
    passes = ("--block-epochs", "1", "--logit-epochs", "1", "--batch-size", "4")
    terminal.json("heal", student, teacher, pictures, "--out", healed, *passes)
    x = torch.randn(1, 3, 32, 32)
    assert not torch.equal(mh.load(student)(x), mh.load(healed)(x))
    accuracy = terminal.json("evaluate", healed, pictures)["result"]["top1"]
    assert 0 <= accuracy <= 1
    timed = terminal.json("bench", teacher, healed, "--rounds", "2", "--no-memory")
    assert [row["name"] for row in timed["result"]["rows"]] == [teacher, healed]


def test_train_writes_a_model_that_loads(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "trained")
    terminal.json("train", teacher, pictures, "--epochs", "1", "--out", out)
    assert mh.load(out).head.out_features == 10
