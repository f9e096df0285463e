"""What an exported file is checked with: any source, at any size, nothing skipped."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from manyheads.data import image_source
from manyheads.data.exhibits import exhibits
from manyheads.data.photographs import sample_photographs
from manyheads.errors import DataError
from manyheads.hosts import ImageInput, find_host
from tests.helpers import tiny_vit

WANTED = ImageInput(
    channels=3,
    size=(32, 32),
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    interpolation="bicubic",
    crop=1.0,
)


def shard(path: Path, *contents: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(contents):
            for name, stored in ((f"{number}.png", content), (f"{number}.cls", b"3")):
                info = tarfile.TarInfo(name)
                info.size = len(stored)
                tar.addfile(info, io.BytesIO(stored))
    return path


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 40), (200, 30, 90)).save(file, "PNG")
    return file.getvalue()


def test_any_source_is_shown_at_any_size(tmp_path: Path) -> None:
    shown = exhibits(shard(tmp_path / "a.tar", *[png()] * 6), WANTED)
    assert shown.at((48, 64)).shape == (4, 3, 48, 64)
    assert shown.names == ("a.tar:0", "a.tar:1", "a.tar:2", "a.tar:3")
    batches = list(shown.labelled((32, 32)))
    assert torch.cat([labels for _, labels in batches]).tolist() == [3] * 6
    digits = exhibits("digits", WANTED)
    assert digits.at((48, 64)).shape == (4, 3, 48, 64)
    assert len(digits.labels) == 450


def test_one_picture_is_a_source_for_every_verb() -> None:
    photo = sample_photographs()[0]
    model = tiny_vit()
    shown = exhibits(photo, find_host(model)[0].image_input(model))
    assert shown.names == ("china.jpg",)
    assert shown.labels is None
    source = image_source(model, photo, labelled=False)
    assert torch.equal(source.sample(4).images, shown.at((32, 32)))


def test_a_check_passes_over_nothing(tmp_path: Path) -> None:
    shown = exhibits(shard(tmp_path / "a.tar", png(), b"broken"), WANTED)
    with pytest.raises(DataError, match=r"1 of 2 cannot be read: a\.tar:1"):
        shown.at((32, 32))


def test_a_sliver_is_not_blown_up_on_its_way_to_a_model(tmp_path: Path) -> None:
    # Scaled before it is cut, one pixel by ten thousand would be 32 by 320,000.
    Image.new("RGB", (10_000, 1), (200, 30, 90)).save(tmp_path / "sliver.png")
    source = image_source(tiny_vit(), tmp_path, labelled=False)
    (plain,) = source.batches([0], 1)
    (light,) = source.batches([0], 1, augment_seed=0)
    expected = (torch.tensor([200, 30, 90]) / 255 * 2 - 1).view(1, 3, 1, 1)
    for batch in (plain, light):
        spread = batch.images - expected
        assert spread.abs().max() < 0.01
