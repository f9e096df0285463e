"""bench in the terminal: a model against itself, converted by recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

import manyheads as mh
from manyheads.terminal.grammar import read_recipe_word
from tests.terminal.session import Terminal

QUICK = ("--rounds", "2", "--no-memory")


def test_a_model_is_timed_against_itself_converted(
    terminal: Terminal, teacher: str
) -> None:
    words = ("bench", teacher, "hydra", "hydra:kernel=mean+compact@0-1")
    found = terminal.json(*words, "--image-size", "40x64", *QUICK)
    rows = found["result"]["rows"]
    assert [row["name"] for row in rows] == [
        teacher,
        f"{teacher} + Hydra()",
        f"{teacher} + Hydra(kernel='mean') + Compact() in blocks 0, 1",
    ]
    assert found["result"]["image_size"] == [40, 64]
    assert rows[0]["flops"] > rows[1]["flops"] > 0
    assert rows[2]["parameters"] < rows[0]["parameters"]
    assert [m["weights"] for m in found["models"]] == ["folder"] * 3


def test_the_table_has_time_work_and_memory(terminal: Terminal, teacher: str) -> None:
    code, out, err = terminal("bench", teacher, "hydra", "--rounds", "2")
    assert code == 0, err
    head, base, hydra = out.splitlines()[:3]
    for column in ("ms", "ratio", "GFLOPs", "M parameters", "peak MiB"):
        assert column in head
    assert "(1.00)" in base
    assert "Hydra()" in hydra
    assert "not measured" not in out


def test_recipes_come_from_files_options_and_models_too(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    recipe = mh.Recipe(mh.Swap(blocks=[2], attention=mh.Hydra()))
    file = tmp_path / "recipe.json"
    file.write_text(recipe.to_json())
    student = str(tmp_path / "student")
    terminal.json("convert", teacher, "--ffn", "compact", "--out", student)
    words = (
        "bench",
        teacher,
        str(file),
        student,
        "--attention",
        "interactive:mix=none,landmarks=2x2",
    )
    found = terminal.json(*words, "--blocks", "-1", "--image-size", "64", *QUICK)
    assert [row["name"] for row in found["result"]["rows"]] == [
        teacher,
        f"{teacher} + Hydra() in blocks 2",
        student,
        f"{teacher} + Interactive(landmarks=(2, 2), mix='none') in blocks -1",
    ]


def test_a_folder_wins_over_a_recipe_of_its_name(
    terminal: Terminal, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.json(
        "convert", teacher, "--ffn", "compact", "--out", str(tmp_path / "hydra")
    )
    monkeypatch.chdir(tmp_path)
    found = terminal.json("bench", teacher, "hydra", *QUICK)
    assert [row["name"] for row in found["result"]["rows"]] == [teacher, "hydra"]


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["hydra"], ["hydra is a recipe", "deit_small_patch16_224 hydra"]),
        (["MODEL", "hydra+interactive"], ["same place"]),
        (["MODEL", "hydra:kernl=mean"], ["'kernl'", "'kernel'"]),
        (["MODEL", "hydra@9"], ["block 9", "0-2"]),
        (["MODEL", "hydra@x"], ["'x'"]),
        (["MODEL", "absent.json"], ["absent.json", "cannot be read"]),
        (["MODEL", "hidra"], ["UnknownModel", "'hidra'"]),
        (["MODEL", "hydra", "hydra"], ["2 different names for 3 models"]),
        (["MODEL", "--blocks", "1"], ["--attention"]),
    ],
    ids=lambda value: " ".join(value) if " in" not in value[0] else "",
)
def test_what_cannot_be_compared_is_refused(
    terminal: Terminal, teacher: str, words: list[str], facts: list[str]
) -> None:
    typed = [teacher if word == "MODEL" else word for word in words]
    said = terminal.refusal("bench", *typed, *QUICK)
    assert all(fact in said for fact in facts), said


def test_a_word_is_the_recipe_that_python_would_write() -> None:
    word = "Hallucinated:stage=logits+compact:rank=0.25@0-2,-1"
    assert read_recipe_word(word) == mh.Recipe(
        mh.Swap(
            blocks=[0, 1, 2, -1],
            attention=mh.Hallucinated(stage="logits"),
            ffn=mh.Compact(rank=0.25),
        )
    )
    assert read_recipe_word("deit_small_patch16_224") is None
    assert read_recipe_word("compact") == mh.Recipe(mh.Swap(ffn=mh.Compact()))
