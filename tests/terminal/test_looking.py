"""maps and report in the terminal: a picture and a page, or the reason why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import manyheads as mh
from manyheads.data.photographs import sample_photographs
from tests.helpers import tiny_vit
from tests.terminal.session import Terminal

pytest.importorskip("matplotlib", reason="needs the extra: manyheads[draw]")

PHOTO = str(sample_photographs()[0])


@pytest.fixture(scope="module")
def student(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    recipe = mh.Recipe(mh.Swap(blocks=[1], attention=mh.Hydra()))
    folder = tmp_path_factory.mktemp("students") / "student"
    return str(mh.save(mh.convert(mh.load(teacher), recipe), folder))


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_a_grid_of_all_blocks_and_four_heads_is_the_default(
    terminal: Terminal, student: str, tmp_path: Path
) -> None:
    out = tmp_path / "maps.png"
    words = ("maps", PHOTO, "--model", student, "--out", str(out))
    code, told, err = terminal(*words)
    assert code == 0, err
    assert told.count("Softmax(), 4 heads, 1 queries") == 2
    assert "Hydra(), 4 features, 1 queries" in told
    assert str(out) in err
    assert min(_size(out)) > 400


def test_blocks_heads_query_and_size_can_be_chosen(
    terminal: Terminal, student: str, tmp_path: Path
) -> None:
    found = terminal.json(
        *("maps", PHOTO, "--model", student, "--out", str(tmp_path / "m.png")),
        *("--blocks", "1,-1", "--heads", "0-1,3", "--query", "5"),
        *("--image-size", "48x64"),
    )["result"]["maps"][student]
    assert found["image_size"] == [48, 64]
    assert [(b["block"], b["grid"]) for b in found["blocks"]] == [
        (1, [6, 8]),
        (2, [6, 8]),
    ]
    for block in found["blocks"]:
        assert (block["heads"], block["queries"]) == ([0, 1, 3], [5])


def test_several_models_stand_side_by_side(
    terminal: Terminal, teacher: str, student: str, tmp_path: Path
) -> None:
    recipe = mh.Recipe(mh.Swap(attention=mh.Hydra()))
    third = str(mh.save(mh.convert(mh.load(teacher), recipe), tmp_path / "third"))
    pair, three = tmp_path / "pair.png", tmp_path / "three.png"
    words = ("maps", PHOTO, "--model", teacher, "--compare", student)
    found = terminal.json(*words, "--out", str(pair))
    assert list(found["result"]["maps"]) == [teacher, student]
    assert [m["name"] for m in found["models"]] == [teacher, student]
    terminal.json(*words, "--compare", third, "--out", str(three))
    assert _size(three)[0] > _size(pair)[0]


def test_a_model_without_a_class_token_is_seen_by_the_mean(
    terminal: Terminal, tmp_path: Path
) -> None:
    model = tiny_vit(depth=1, class_token=False, global_pool="avg", num_heads=2)
    folder = str(mh.save(model, tmp_path / "model"))
    words = ("maps", PHOTO, "--model", folder, "--out", str(tmp_path / "m.png"))
    (block,) = terminal.json(*words)["result"]["maps"][folder]["blocks"]
    assert (len(block["queries"]), block["heads"]) == (16, [0, 1])


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["--heads", "0-12", "--blocks", "1"], ["13 maps", "more than 12"]),
        (["--heads", "4"], ["heads=[4]", "there are 4"]),
        (["--blocks", "7"], ["blocks=[7]", "there are 3"]),
        (["--query", "17"], ["queries=[17]", "from 0 to 16"]),
        (["--heads", "x"], ["--heads x", "head number"]),
        (["--image-size", "axb"], ["axb"]),
        (["--compare", "nobody"], ["UnknownModel", "'nobody'"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_what_cannot_be_drawn_is_refused(
    terminal: Terminal, student: str, words: list[str], facts: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "m.png"
    said = terminal.refusal(
        "maps", PHOTO, "--model", student, "--out", str(out), *words
    )
    assert all(fact in said for fact in facts), said
    assert not out.exists()


def test_pictures_and_places_that_are_not_there_are_named(
    terminal: Terminal, teacher: str, student: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.jpg").write_text("no picture")
    words = ("--model", student, "--out", str(tmp_path / "m.png"))
    said = terminal.refusal("maps", str(tmp_path / "notes.jpg"), *words)
    assert "notes.jpg" in said
    absent = str(tmp_path / "absent" / "m.png")
    said = terminal.refusal("maps", PHOTO, "--model", student, "--out", absent)
    assert "cannot be written" in said
    said = terminal.refusal("maps", PHOTO, *words, "--compare", student)
    assert "named twice" in said
    said = terminal.refusal("maps", PHOTO, *words, "--compare", teacher, "--heads", "1")
    assert "--heads 1 with --compare" in said
    assert terminal("maps", PHOTO)[0] == 2


def test_a_run_becomes_a_page(terminal: Terminal, tmp_path: Path) -> None:
    run = {"rows": [{"model": "softmax", "accuracy_before": 0.5}]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    code, out, err = terminal("report", str(tmp_path))
    assert code == 0, err
    assert str(tmp_path / "report.html") in out
    page = tmp_path / "page.html"
    found = terminal.json("report", str(tmp_path / "run.json"), "--out", str(page))
    assert found["result"] == {"path": str(page)}
    assert "50.0 %" in page.read_text()


def test_what_is_no_run_is_refused(terminal: Terminal, tmp_path: Path) -> None:
    said = terminal.refusal("report", str(tmp_path))
    assert "DataError" in said
    assert "neither run.json nor demo.json" in said
    (tmp_path / "run.json").write_text("[]")
    assert "none of rows" in terminal.refusal("report", str(tmp_path))
