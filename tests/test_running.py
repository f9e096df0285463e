"""run: an exported file and a photograph are enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import manyheads as mh
from manyheads.data.photographs import sample_photographs
from manyheads.errors import DataError, ImageSizeError, InvalidOption
from manyheads.running import run
from tests.helpers import assert_close, tiny_vit

pytestmark = pytest.mark.usefixtures("untyped")


def test_the_exported_file_says_what_the_model_says(tmp_path: Path) -> None:
    model = tiny_vit(depth=2)
    model.pretrained_cfg["label_names"] = [f"kind {i}" for i in range(10)]
    path = mh.export(model, tmp_path / "m.pt2").path
    answers = run(path, sample_photographs(), top=3)
    transform = create_transform(
        **resolve_data_config(model=model) | {"input_size": (3, 32, 32)}
    )
    for answer, file in zip(answers.answers, sample_photographs(), strict=True):
        logits = model(transform(Image.open(file).convert("RGB"))[None])[0].detach()
        best = logits.softmax(dim=-1).topk(3)
        assert [guess.index for guess in answer.guesses] == best.indices.tolist()
        got = torch.tensor([guess.probability for guess in answer.guesses])
        assert_close(got, best.values, slack=100)
        assert answer.guesses[0].label == f"kind {answer.guesses[0].index}"
    assert "china.jpg at 32x32:" in str(answers)
    assert json.loads(json.dumps(answers.to_json()))["answers"][0]["guesses"]


def test_a_model_without_a_head_embeds(tmp_path: Path) -> None:
    model = mh.convert(
        tiny_vit(depth=2, num_classes=0), mh.Recipe(mh.Swap(attention=mh.Hydra()))
    )
    path = mh.export(model, tmp_path / "m.onnx").path
    answers = run(path, sample_photographs()[0], image_size=(40, 50))
    (answer,) = answers.answers
    assert len(answer.embedding) == 48
    assert not answer.guesses
    assert answers.recipe["swaps"][0]["attention"]["kind"] == "Hydra"
    assert "48 numbers: " in str(answers)


def test_odd_pictures_are_answered_and_bad_ones_named(tmp_path: Path) -> None:
    path = mh.export(tiny_vit(depth=1), tmp_path / "m.pt2", dynamic=False).path
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    Image.new("CMYK", (9, 5)).save(tmp_path / "print.jpg")
    answers = run(path, [tmp_path / "dot.png", tmp_path / "print.jpg"])
    assert len(answers.answers) == 2
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(DataError, match=r"notes\.png"):
        run(path, [tmp_path / "dot.png", tmp_path / "notes.png"])
    with pytest.raises(DataError, match="no file was named"):
        run(path, [])


def test_options_that_cannot_be_are_named(tmp_path: Path) -> None:
    path = mh.export(tiny_vit(depth=1), tmp_path / "m.pt2", dynamic=False).path
    photo = sample_photographs()[0]
    with pytest.raises(InvalidOption, match="top=0"):
        run(path, photo, top=0)
    with pytest.raises(ImageSizeError, match=r"48x48.*exported for 32x32 only"):
        run(path, photo, image_size=(48, 48))
    with pytest.raises(ImageSizeError, match=r"0x32.*native size"):
        run(path, photo, image_size=(0, 32))
