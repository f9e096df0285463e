"""export: class names, labels and sizes are those of the model that is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import manyheads as mh
from manyheads.artifacts import open_artifact
from manyheads.data.photographs import sample_photographs
from manyheads.errors import DataError, GeometryMismatch, ImageSizeError
from manyheads.ffn import Branches, CompactLinear
from manyheads.running import run
from tests.exports import small_model
from tests.helpers import assert_close, tiny_vit

onnx = pytest.importorskip("onnx", reason="needs the extra: manyheads[export]")
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


def test_an_older_file_whose_names_do_not_fit_is_answered_with_numbers(
    tmp_path: Path,
) -> None:
    model = tiny_vit(depth=1, num_classes=3)
    path = mh.export(model, tmp_path / "m.onnx", dynamic=False).path
    written = onnx.load(path)
    (told,) = (p for p in written.metadata_props if p.key == "manyheads.json")
    card = json.loads(told.value)
    del card["pads"], card["smallest"]
    card["labels"] = [f"name {number}" for number in range(1000)]
    told.value = json.dumps(card)
    onnx.save(written, path)
    with pytest.warns(RuntimeWarning, match=r"m\.onnx: there are 1000 .* 3 outputs"):
        (answer,) = run(path, sample_photographs()[0]).answers
    assert {guess.label for guess in answer.guesses} == {"0", "1", "2"}


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


def tiny_pvt(name: str = "pvt_v2_b0") -> nn.Module:
    return timm.create_model(
        name,
        depths=(1, 1, 1, 1),
        embed_dims=(8, 16, 24, 32),
        num_heads=(1, 2, 3, 4),
        num_classes=7,
    ).eval()


def test_sizes_that_a_pyramid_runs_unpadded_are_refused(tmp_path: Path) -> None:
    model = tiny_pvt()
    path = mh.export(model, tmp_path / "m.pt2", image_size=(64, 64)).path
    artifact = open_artifact(path)
    assert not artifact.card.pads
    images = torch.randn(1, 3, 70, 64)
    padded = model(F.pad(images, (0, 0, 0, 26))).detach()
    moved = (model(images).detach() - padded).abs().max() / padded.abs().max()
    assert moved > 1e-3, "the model itself does not pad"
    facts = r"70x64.*whole 32x32 cells.*zeros.*image_size=\(96, 64\)"
    with pytest.raises(ImageSizeError, match=facts):
        artifact(images)
    with pytest.raises(ImageSizeError, match=facts):
        run(path, sample_photographs()[0], image_size=(70, 64))
    whole = torch.randn(2, 3, 96, 64)
    assert_close(artifact(whole), model(whole).detach(), slack=10)


def test_grids_smaller_than_the_landmarks_are_refused(tmp_path: Path) -> None:
    model = small_model(mh.Interactive(landmarks=(3, 2)), dynamic_img_size=True)
    artifact = open_artifact(mh.export(model, tmp_path / "m.pt2").path)
    assert artifact.card.smallest == (24, 16)
    images = torch.randn(1, 3, 16, 32)
    with pytest.raises(GeometryMismatch):
        model(images)
    with pytest.raises(ImageSizeError, match=r"16x32.*landmarks.*\(24, 16\) or more"):
        artifact(images)
    least = torch.randn(1, 3, 24, 16)
    assert_close(artifact(least), model(least).detach(), slack=5)


@pytest.mark.parametrize(
    ("make", "size"),
    [(tiny_vit, (32, 32)), (lambda: tiny_pvt("pvt_v2_b2_li"), (64, 64))],
    ids=["vit", "pvt-linear"],
)
def test_compact_branches_are_folded_and_answer_as_before(
    make: Callable[[], nn.Module], size: tuple[int, int], tmp_path: Path
) -> None:
    student = mh.convert(make(), mh.Recipe(mh.Swap(ffn=mh.Compact(branches=2))))
    images = torch.randn(4, 3, *size)
    _stir(student, images)
    layers = [m for m in student.modules() if isinstance(m, CompactLinear)]
    assert any(other.norm.weight.any() for other in layers[0].inner.others)
    exported = mh.export(student, tmp_path / "m.pt2", image_size=size)
    assert exported.folded == len(layers) >= 3
    program = torch.export.load(exported.path)
    assert not any(".others." in name for name in program.state_dict)
    answers = open_artifact(exported.path)(images)
    assert_close(answers, student(images).detach(), slack=10)
    assert all(isinstance(m.inner, Branches) for m in layers), "the model keeps them"


def test_compact_layers_without_branches_are_not_counted(tmp_path: Path) -> None:
    exported = mh.export(small_model(), tmp_path / "m.pt2", dynamic=False)
    assert exported.folded == 0
    assert "folded" not in str(exported)


def _stir(model: nn.Module, images: Tensor) -> None:
    """Train a little, so that gains and running statistics are no longer fresh."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    model.eval()
