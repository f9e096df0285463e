"""Every kind of source, every kind of picture, and every way in which they are bad."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from manyheads.data import digits, image_source
from manyheads.data.folders import list_pictures
from manyheads.data.pictures import read_picture
from manyheads.errors import DataError, InvalidOption, MissingExtra
from tests.helpers import tiny_vit

IMAGES = torch.linspace(-1, 1, 6 * 3 * 32 * 32).reshape(6, 3, 32, 32)


def paint(path: Path, colour: object = (200, 30, 90), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (40, 30), colour).save(path)
    return path


def everything(source: object, **options: object) -> tuple[Tensor, list[int]]:
    parts = list(source.batches(range(len(source)), 2, **options))
    images = torch.cat([p.images for p in parts if len(p.images)])
    return images, [int(label) for p in parts for label in p.labels]


def test_a_flat_folder_is_preprocessed_for_the_model_and_has_no_labels(
    tmp_path: Path,
) -> None:
    for name in ("b.png", "a.jpg", "c.webp"):
        paint(tmp_path / name)
    paint(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no picture")
    source = image_source(tiny_vit(), tmp_path, labelled=False)
    images, labels = everything(source)
    assert images.shape == (3, 3, 32, 32)
    assert labels == [-1, -1, -1]
    assert not source.labelled
    # timm's statistics for this model: mean 0.5, deviation 0.5.
    expected = torch.tensor([200, 30, 90]) / 255 * 2 - 1
    torch.testing.assert_close(images[1, :, 16, 16], expected, atol=0.02, rtol=0)


def test_subfolders_are_classes_in_sorted_order_however_deep(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/deep/2.png", "cat/1.png"):
        paint(tmp_path / name)
    source = image_source(tiny_vit(), str(tmp_path), labelled=True)
    assert source.classes == ("cat", "dog")
    assert everything(source)[1] == [0, 0, 1]


def test_one_picture_beside_the_class_folders_has_no_label(tmp_path: Path) -> None:
    paint(tmp_path / "dog/1.png")
    paint(tmp_path / "stray.png")
    assert not image_source(tiny_vit(), tmp_path, labelled=False).labelled
    with pytest.raises(DataError, match="not every image has a label"):
        image_source(tiny_vit(), tmp_path, labelled=True)


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.write_text(""), "it is a file"),
        (lambda path: path.mkdir(), "it holds no file"),
        (lambda path: paint(path / "x.txt.png").rename(path / "x.txt"), ".txt"),
    ],
    ids=["missing", "file", "empty", "no pictures"],
)
def test_a_folder_without_pictures_is_refused(
    tmp_path: Path, make: object, fact: str
) -> None:
    make(tmp_path / "images")
    with pytest.raises(DataError, match=fact) as caught:
        image_source(tiny_vit(), tmp_path / "images", labelled=False)
    assert str(tmp_path / "images") in str(caught.value)


def broken_folder(root: Path, good: int) -> Path:
    for number in range(good):
        paint(root / f"good{number}.png")
    whole = paint(root / "cut.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "text.png").write_text("this is not a picture")
    (root / "nothing.jpg").write_bytes(b"")
    return root


def test_unreadable_pictures_are_skipped_and_named(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path, good=5)
    source = image_source(tiny_vit(), folder, labelled=False, max_unreadable=0.5)
    images, labels = everything(source)
    assert len(images) == len(labels) == 5
    assert set(source.skipped) == {"cut.jpg", "text.png", "nothing.jpg"}
    assert "cannot identify" in source.skipped["text.png"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_too_many_unreadable_pictures_stop_the_run(
    tmp_path: Path, share: float
) -> None:
    folder = broken_folder(tmp_path, good=5)
    source = image_source(tiny_vit(), folder, labelled=False, max_unreadable=share)
    with pytest.raises(DataError, match=r"of 8 cannot be read: .*cut\.jpg"):
        everything(source)


def test_a_sample_comes_from_readable_pictures_or_not_at_all(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02}.png").write_text("broken")
    paint(tmp_path / "zz.png")
    source = image_source(tiny_vit(), tmp_path, labelled=False, max_unreadable=0.95)
    assert len(source.sample(4).images) == 1
    (tmp_path / "zz.png").write_text("broken too")
    source = image_source(tiny_vit(), tmp_path, labelled=False, max_unreadable=0.99)
    with pytest.raises(DataError, match="13 of 13 cannot be read"):
        source.sample(4)


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_share_outside_zero_to_one_is_refused(share: float) -> None:
    with pytest.raises(InvalidOption, match="max_unreadable"):
        image_source(tiny_vit(), IMAGES, labelled=False, max_unreadable=share)


@pytest.mark.parametrize(
    ("mode", "stored", "seen"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 90, (90, 90, 90)),
        ("I", 257 * 90, (90, 90, 90)),
        ("F", 0.5, (128, 128, 128)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_every_stored_form_shows_its_true_colour(
    tmp_path: Path, mode: str, stored: object, seen: tuple[int, ...]
) -> None:
    ending = "tif" if mode in ("F", "CMYK", "I") else "png"
    path = paint(tmp_path / f"image.{ending}", stored, mode)
    colour = read_picture(path, 3).getpixel((5, 5))
    assert colour == pytest.approx(seen, abs=1)


def test_a_palette_entry_that_is_transparent_shows_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30])
    image.save(tmp_path / "image.png", transparency=0)
    assert read_picture(tmp_path / "image.png", 3).getpixel((1, 1)) == (255, 255, 255)


def test_values_without_an_agreed_white_are_unreadable(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 1e6, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(OSError, match="outside 0 to 1"):
        read_picture(tmp_path / "x.tif", 3)


def test_the_rotation_noted_by_the_camera_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    image.save(tmp_path / "image.png", exif=exif)
    shown = read_picture(tmp_path / "image.png", 1)
    assert shown.size == (20, 40)
    assert (shown.getpixel((10, 5)), shown.getpixel((10, 35))) == (255, 0)


def test_a_grey_model_gets_grey_and_one_of_four_channels_needs_tensors(
    tmp_path: Path,
) -> None:
    paint(tmp_path / "a.png")
    grey = image_source(tiny_vit(in_chans=1), tmp_path, labelled=False)
    assert everything(grey)[0].shape == (1, 1, 32, 32)
    with pytest.raises(DataError, match="wants 4 channels"):
        image_source(tiny_vit(in_chans=4), tmp_path, labelled=False)


@pytest.mark.parametrize(
    ("images", "fact"),
    [
        (IMAGES[0], "[3, 32, 32]"),
        (IMAGES[:0], "at least one"),
        (IMAGES[:, :1], "1 channels and the model wants 3"),
        (IMAGES.mul(127).to(torch.uint8), "torch.uint8"),
        (IMAGES / torch.tensor([1.0, 1, 1, 1, 0, 1]).view(6, 1, 1, 1), "image 4"),
        ((IMAGES, torch.zeros(5, dtype=torch.long)), "[5]"),
        ((IMAGES, torch.zeros(6)), "float32"),
        ((IMAGES, torch.arange(6) - 1), "-1 is negative"),
    ],
)
def test_a_wrong_tensor_is_refused_with_its_facts(images: object, fact: str) -> None:
    with pytest.raises(DataError) as caught:
        image_source(tiny_vit(), images, labelled=False)
    assert fact in str(caught.value)


class Listed(Dataset[object]):
    def __init__(self, *items: object) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


class Stream(IterableDataset[object]):
    def __iter__(self) -> Iterator[object]:
        return iter(())


def test_a_dataset_gives_pairs_lone_images_or_pictures() -> None:
    pairs = TensorDataset(IMAGES, torch.arange(6))
    images, labels = everything(image_source(tiny_vit(), pairs, labelled=True))
    assert torch.equal(images, IMAGES)
    assert labels == list(range(6))
    lone = image_source(tiny_vit(), Listed(*IMAGES), labelled=False)
    assert everything(lone)[1] == [-1] * 6
    picture = Image.new("LA", (50, 40), (255, 255))
    made = image_source(tiny_vit(), Listed((picture, 3)), labelled=True)
    images, labels = everything(made)
    assert torch.equal(images, torch.ones(1, 3, 32, 32))
    assert labels == [3]


@pytest.mark.parametrize(
    ("dataset", "fact"),
    [
        (Stream(), "no source"),
        (Listed(), "empty"),
        (Listed("path.jpg"), "str"),
        (Listed({"image": 1}), "dict"),
    ],
)
def test_a_dataset_of_another_kind_is_refused(dataset: object, fact: str) -> None:
    with pytest.raises(DataError, match=fact):
        image_source(tiny_vit(), dataset, labelled=False)


@pytest.mark.parametrize(
    ("item", "fact"),
    [
        (IMAGES[0] * torch.nan, "NaN"),
        (IMAGES[0, :, :16], r"\[3, 16, 32\]"),
        (IMAGES[0].to(torch.uint8), "uint8"),
    ],
)
def test_a_wrong_item_in_a_dataset_is_named(item: Tensor, fact: str) -> None:
    source = image_source(tiny_vit(), Listed(IMAGES[0], item), labelled=False)
    with pytest.raises(DataError, match=fact) as caught:
        everything(source)
    assert "item 1" in str(caught.value)


def test_an_unlabelled_source_is_refused_where_labels_are_needed() -> None:
    for images in (IMAGES, Listed(*IMAGES)):
        with pytest.raises(DataError, match="not every image has a label"):
            image_source(tiny_vit(), images, labelled=True)


def test_order_depends_on_seed_and_epoch_only_and_can_be_entered_anywhere() -> None:
    source = image_source(tiny_vit(), IMAGES, labelled=False)
    before = torch.get_rng_state()
    order = source.order(0, 3)
    assert sorted(order) == list(range(6))
    assert order == source.order(0, 3)
    assert len({tuple(source.order(s, e)) for s in (0, 1) for e in range(4)}) > 4
    whole = list(source.batches(order, 2))
    late = list(source.batches(order, 2, start=2))
    assert len(late) == 1
    assert torch.equal(late[0].images, whole[2].images)
    assert torch.equal(before, torch.get_rng_state())


def noise_folder(root: Path) -> Path:
    noise = np.random.default_rng(0)
    for number in range(4):
        pixels = noise.integers(0, 255, (64, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    return root


@pytest.mark.usefixtures("untyped")  # beartype itself draws from random
def test_augmentation_is_a_function_of_seed_and_image(tmp_path: Path) -> None:
    source = image_source(tiny_vit(), noise_folder(tmp_path), labelled=False)
    before = torch.get_rng_state(), random.getstate()
    first, again = (everything(source, augment_seed=1)[0] for _ in range(2))
    other, plain = everything(source, augment_seed=2)[0], everything(source)[0]
    alone = next(iter(source.batches([2], 1, augment_seed=1))).images
    assert torch.equal(first, again)
    assert torch.equal(first[2:3], alone)
    assert not torch.equal(first, other)
    assert not torch.equal(first, plain)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_loading_in_other_processes_gives_the_same_images(tmp_path: Path) -> None:
    source = image_source(tiny_vit(), noise_folder(tmp_path), labelled=False)
    here = everything(source, augment_seed=1)[0]
    there = everything(source, augment_seed=1, num_workers=2)[0]
    assert torch.equal(here, there)


def test_a_folder_is_another_source_once_a_file_changes(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    before = image_source(tiny_vit(), tmp_path, labelled=False).identity
    assert image_source(tiny_vit(), tmp_path, labelled=False).identity == before
    paint(tmp_path / "b.png")
    assert image_source(tiny_vit(), tmp_path, labelled=False).identity != before


def test_listing_does_not_depend_on_the_disk(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.png", "a/1.png"):
        paint(tmp_path / name)
    names = [str(p.relative_to(tmp_path)) for p in list_pictures(tmp_path).files]
    assert names == ["a/1.png", "b/10.png", "b/2.png"]


def test_the_digits_are_real_split_by_seed_and_in_equal_shares() -> None:
    train, test = digits(image_size=16, channels=1)
    assert train[0].shape == (1347, 1, 16, 16)
    assert test[0].shape == (450, 1, 16, 16)
    assert train[0].min() >= -1
    assert train[0].max() <= 1
    assert min(torch.bincount(test[1])) >= 43
    assert torch.equal(digits(image_size=16, channels=1).test[1], test[1])
    assert not torch.equal(digits(image_size=16, seed=1).test[1], test[1])


def test_the_digits_without_scikit_learn_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra) as caught:
        digits()
    assert caught.value.fix == 'pip install "manyheads[train]"'
