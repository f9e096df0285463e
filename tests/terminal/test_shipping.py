"""export and run in the terminal: a model leaves, and answers from its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manyheads.data.photographs import sample_photographs
from tests.terminal.session import Terminal

pytest.importorskip("onnxruntime", reason="needs the extra: manyheads[export]")

# The tracer passes symbolic sizes where the type checks know only int.
pytestmark = pytest.mark.usefixtures("untyped")


@pytest.fixture(scope="module")
def photo() -> str:
    return str(sample_photographs()[0])


def test_a_model_is_exported_and_answers_from_its_file(
    terminal: Terminal, teacher: str, photo: str, tmp_path: Path
) -> None:
    file = str(tmp_path / "m.onnx")
    code, out, err = terminal("export", teacher, file)
    assert code == 0, err
    assert "any batch, any image size of whole 8x8 cells" in out
    assert "weights read from the folder" in out
    code, out, err = terminal("run", file, photo, "--top", "2")
    assert code == 0, err
    assert "china.jpg at 32x32:" in out
    assert out.count(" %  ") == 2
    whole = terminal.json("run", file, photo, photo, "--image-size", "40x48")
    assert whole["models"] == []
    assert [len(a["guesses"]) for a in whole["result"]["answers"]] == [5, 5]
    assert whole["result"]["image_size"] == [40, 48]


def test_every_option_of_export_reaches_the_file(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    half = terminal.json(
        *("export", teacher, str(tmp_path / "half.pt2"), "--dtype", "float16"),
        *("--fixed", "--image-size", "48x64", "--tolerance", "0.05"),
    )["result"]
    assert (half["dtype"], half["cell"], half["tolerance"]) == ("float16", None, 0.05)
    assert [check["image_size"] for check in half["checks"]] == [[48, 64]] * 2
    whole = terminal.json(
        *("export", teacher, str(tmp_path / "int8.onnx"), "--int8"),
        *("--images", pictures, "--target", "onnx"),
    )["result"]
    assert whole["int8"]
    assert whole["labelled"]["images"] == 20


def test_what_cannot_be_exported_is_refused_in_one_paragraph(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    said = terminal.refusal("export", teacher, str(tmp_path / "m.bin"))
    assert "'.bin'" in said
    (tmp_path / "file").write_text("")
    said = terminal.refusal("export", teacher, str(tmp_path / "file" / "m.onnx"))
    assert "NotExportable" in said
    assert "cannot be written" in said
    out = tmp_path / "m.onnx"
    said = terminal.refusal("export", teacher, str(out), "--dtype", "bfloat16")
    assert "not in torch.bfloat16" in said
    said = terminal.refusal("export", teacher, str(out), "--tolerance", "1e-30")
    assert "1e-30 is allowed" in said
    said = terminal.refusal("export", teacher, str(out), "--image-size", "30x32")
    assert "ImageSizeError" in said
    assert "(32, 32)" in said
    assert terminal("export", teacher, str(out), "--target", "onxx")[0] == 2
    assert not out.exists()


def test_what_cannot_be_run_is_refused_in_one_paragraph(
    terminal: Terminal, teacher: str, photo: str, tmp_path: Path
) -> None:
    said = terminal.refusal("run", str(tmp_path / "none.onnx"), photo)
    assert "no such file" in said
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(b"\x00" * 99)
    assert "foreign.onnx" in terminal.refusal("run", str(foreign), photo)
    file = str(tmp_path / "m.pt2")
    assert terminal("export", teacher, file, "--fixed")[0] == 0
    (tmp_path / "notes.jpg").write_text("no picture")
    said = terminal.refusal("run", file, str(tmp_path / "notes.jpg"))
    assert "notes.jpg" in said
    said = terminal.refusal("run", file, photo, "--image-size", "48")
    assert "exported for 32x32 only" in said
    assert "top=0" in terminal.refusal("run", file, photo, "--top", "0")
    assert terminal("run", file)[0] == 2


def test_the_answers_are_json_that_names_the_recipe(
    terminal: Terminal, teacher: str, photo: str, tmp_path: Path
) -> None:
    student, file = str(tmp_path / "student"), str(tmp_path / "m.pt2")
    terminal.json("convert", teacher, "--attention", "hydra", "--out", student)
    terminal.json("export", student, file, "--fixed")
    recipe = terminal.json("run", file, photo)["result"]["recipe"]
    assert json.dumps(recipe).count('"Hydra"') == len(recipe["swaps"])
