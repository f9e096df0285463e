"""export: class names, labels and sizes are those of the model that is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import manyheads as mh
from manyheads.artifacts import open_artifact
from manyheads.data.photographs import sample_photographs
from manyheads.errors import DataError
from manyheads.running import run
from tests.helpers import tiny_vit

pytest.importorskip("onnx", reason="needs the extra: manyheads[export]")
pytest.importorskip("onnxruntime", reason="needs the extra: manyheads[export]")

# The tracer passes symbolic sizes where the type checks know only int.
pytestmark = pytest.mark.usefixtures("untyped")


@pytest.mark.parametrize("count", [3, 7])
def test_names_of_a_classifier_that_was_replaced_are_left_out(
    count: int, tmp_path: Path
) -> None:
    model = tiny_vit(depth=1, num_classes=1000)
    model.head = nn.Linear(48, count)
    path = tmp_path / "m.pt2"
    with pytest.warns(RuntimeWarning, match=f"1000 class names for {count} outputs"):
        mh.export(model, path, dynamic=False)
    assert open_artifact(path).card.labels == tuple(map(str, range(count)))
    (answer,) = run(path, sample_photographs()[0], top=5).answers
    assert len(answer.guesses) == min(5, count)
    assert all(guess.label == str(guess.index) for guess in answer.guesses)


def test_names_that_fit_are_kept(tmp_path: Path) -> None:
    path = mh.export(
        tiny_vit(depth=1, num_classes=1000), tmp_path / "m.pt2", dynamic=False
    ).path
    (answer,) = run(path, sample_photographs()[0]).answers
    assert not any(guess.label.isdigit() for guess in answer.guesses)
    assert len(open_artifact(path).card.labels) == 1000


@pytest.fixture
def sorted_photos(tmp_path: Path) -> Path:
    """A folder with one subfolder for each of two classes."""
    for number, file in enumerate(sample_photographs()):
        (tmp_path / "photos" / str(number)).mkdir(parents=True)
        os.symlink(file, tmp_path / "photos" / str(number) / file.name)
    return tmp_path / "photos"


def test_features_have_no_accuracy(sorted_photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with pytest.raises(DataError, match=r"VisionTransformer.*features \[48\].*without"):
        mh.export(tiny_vit(depth=1, num_classes=0), path, images=sorted_photos)
    assert not path.exists()


def test_tokens_have_no_accuracy(sorted_photos: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra: hf")
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    model = transformers.Dinov2Model(config).eval()
    with pytest.raises(DataError, match=r"Dinov2Model.*features \[17, 32\]"):
        mh.export(model, tmp_path / "m.pt2", images=sorted_photos)
    plain = torch.randn(2, 3, 32, 32)
    exported = mh.export(model, tmp_path / "m.pt2", images=plain)
    assert exported.labelled is None
    assert open_artifact(exported.path).card.labels == ()


IMAGES = torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize(
    ("images", "facts"),
    [
        ((), r"images as 0 tensors.*\(images, labels\)"),
        ((IMAGES,), "images as 1 tensors"),
        ((IMAGES, [0, 1]), "their labels are a list"),
        ((IMAGES, torch.tensor([0.0, 1.0])), "labels are torch.float32"),
        ((IMAGES, torch.tensor([0, -5])), "label -5 is negative"),
        ((IMAGES, torch.tensor([0])), r"labels are \[1\], not \[n\] = \[2\]"),
        ((IMAGES, torch.tensor([3, 10])), "label 10 is given.* 0 to 9"),
        (torch.full_like(IMAGES, torch.nan), "NaN or infinity"),
    ],
    ids=["none", "one", "list", "float", "negative", "short", "beyond", "nan"],
)
def test_images_that_check_nothing_are_named(
    images: Any, facts: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=facts):
        mh.export(tiny_vit(depth=1), tmp_path / "m.pt2", images=images)
    assert list(tmp_path.iterdir()) == []
