"""Names of data sets and of their parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from manyheads.data import digits, image_source
from manyheads.data.splits import choose_split, split_name, split_of
from manyheads.errors import DataError
from tests.helpers import tiny_vit


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("photos", ("photos", None)),
        ("photos[test]", ("photos", "test")),
        ("hub:owner/name[train[:10%]]", ("hub:owner/name", "train[:10%]")),
        ("[test]", ("[test]", None)),
    ],
)
def test_a_name_may_end_in_a_part(text: str, parts: tuple[str, str | None]) -> None:
    assert split_name(text) == parts


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("default/validation/0000.parquet", "validation"),
        ("imagenet_val.tar", "validation"),
        ("Test 1.parquet", "test"),
        ("constraint.parquet", None),
        ("test/train-0.parquet", "train"),
    ],
)
def test_file_names_say_their_part(path: str, split: str | None) -> None:
    assert split_of(Path(path)) == split


def test_learning_and_measuring_take_their_usual_parts() -> None:
    def choose(asked: str | None, *, held_out: bool = False) -> str:
        names = ("test", "train", "validation")
        return choose_split(names, asked, held_out=held_out, where="photos")

    assert choose(None) == "train"
    assert choose(None, held_out=True) == "validation"
    assert choose("test") == choose("testing") == "test"
    only = choose_split(["extra"], None, held_out=True, where="photos")
    assert only == "extra"
    with pytest.raises(DataError, match=r'"photos\[a\]"'):
        choose_split(["a", "b"], None, held_out=False, where="photos")
    with pytest.raises(DataError, match=r"there is test, train, validation") as caught:
        choose("tset")
    assert "'test'" in caught.value.fix


def paint(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (90, 90, 90)).save(path)


def test_folders_called_like_parts_are_parts_and_not_classes(tmp_path: Path) -> None:
    for name in ("train/cat/1", "train/dog/1", "train/dog/2", "val/cat/1", "val/dog/1"):
        paint(tmp_path / f"{name}.png")
    learn = image_source(tiny_vit(), tmp_path, labelled=True)
    measure = image_source(tiny_vit(), tmp_path, labelled=True, held_out=True)
    assert (len(learn), len(measure)) == (3, 2)
    assert learn.classes == measure.classes == ("cat", "dog")
    named = image_source(tiny_vit(), f"{tmp_path}[val]", labelled=True)
    assert named.identity == measure.identity
    with pytest.raises(DataError, match="there is train, validation"):
        image_source(tiny_vit(), f"{tmp_path}[test]", labelled=True)
    paint(tmp_path / "bird/1.png")
    mixed = image_source(tiny_vit(), tmp_path, labelled=True)
    assert mixed.classes == ("bird", "train", "val")


def test_a_part_of_a_folder_without_parts_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "cat/1.png")
    with pytest.raises(DataError, match="'test'"):
        image_source(tiny_vit(), f"{tmp_path}[test]", labelled=True)


def test_a_path_with_brackets_is_a_path(tmp_path: Path) -> None:
    paint(tmp_path / "photos[test]" / "1.png")
    assert len(image_source(tiny_vit(), tmp_path / "photos[test]", labelled=False)) == 1


def test_the_digits_by_name_are_the_digits_at_the_models_size() -> None:
    model = tiny_vit(img_size=16, in_chans=1)
    learn = image_source(model, "digits", labelled=True)
    measure = image_source(model, "digits", labelled=True, held_out=True)
    train, test = digits(image_size=16, channels=1)
    assert (learn.where, measure.where) == ("digits[train]", "digits[test]")
    assert torch.equal(next(learn.batches(range(5), 5)).images, train[0][:5])
    assert torch.equal(measure.labels, test[1])
    assert learn.classes == tuple("0123456789")
    wide = image_source(tiny_vit(img_size=(16, 32)), "digits[test]", labelled=False)
    assert next(wide.batches([0], 1)).images.shape == (1, 3, 16, 32)
