"""Photographs: what the library would make of them, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from manyheads.data.photographs import (
    open_photograph,
    prepare,
    prepare_files,
    restore,
    sample_photographs,
)
from manyheads.errors import DataError
from manyheads.hosts import CropMode, ImageInput


def _wanted(
    size: tuple[int, int],
    crop: float = 0.9,
    channels: int = 3,
    mode: CropMode = "center",
) -> ImageInput:
    return ImageInput(
        channels=channels,
        size=size,
        mean=(0.5, 0.4, 0.3)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
        interpolation="bicubic",
        crop=crop,
        crop_mode=mode,
    )


@pytest.mark.parametrize("mode", get_args(CropMode))
@pytest.mark.parametrize("crop", [0.875, 1.0])
@pytest.mark.parametrize("size", [(224, 224), (224, 336), (32, 32)], ids=str)
def test_a_photograph_becomes_what_timm_makes_of_it_in_evaluation(
    size: tuple[int, int], crop: float, mode: CropMode
) -> None:
    wanted = _wanted(size, crop, mode=mode)
    transform = create_transform(
        (3, *size),
        mean=wanted.mean,
        std=wanted.std,
        interpolation="bicubic",
        crop_pct=crop,
        crop_mode=mode,
    )
    for path in sample_photographs():
        image = open_photograph(path)
        difference = prepare(image, wanted) - transform(image)
        levels = 255 * difference * torch.tensor(wanted.std)[:, None, None]
        assert levels.abs().max() <= 1.01, "more than one grey level"
        assert levels.abs().mean() < 0.01


def test_restoring_undoes_the_normalisation() -> None:
    wanted = _wanted((32, 32))
    tensor = prepare_files(sample_photographs(), wanted)
    picture = restore(tensor, wanted)
    assert 0 <= picture.min() < picture.max() <= 1
    again = prepare(
        Image.fromarray((picture[0].permute(1, 2, 0) * 255).round().byte().numpy()),
        _wanted((32, 32), crop=1.0),
    )
    assert (again - tensor[0]).abs().max() < 0.01


@pytest.mark.parametrize("noted", range(1, 9))
def test_the_rotation_that_the_camera_noted_is_applied(
    noted: int, tmp_path: Path
) -> None:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:10, :20] = 255  # What is up and left shows each of the eight ways.
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = noted
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    opened = open_photograph(tmp_path / "turned.jpg")
    turned = noted > 4
    assert opened.size == ((20, 40) if turned else (40, 20))
    ways = [np.asarray, np.fliplr, lambda x: x[::-1, ::-1], np.flipud]
    ways += [lambda x: x.T, lambda x: np.rot90(x, -1)]
    ways += [lambda x: x[::-1, ::-1].T, np.rot90]
    expected = ways[noted - 1](pixels[..., 0]).astype(int)
    assert abs(np.asarray(opened.convert("L")).astype(int) - expected).max() < 40


@pytest.mark.parametrize(
    ("mode", "colour", "ending", "expected"),
    [
        ("CMYK", (0, 0, 0, 255), "jpg", 0),
        ("RGBA", (0, 0, 0, 0), "png", 255),
        ("LA", (0, 0), "png", 255),
        ("P", 0, "gif", 0),
        ("1", 1, "png", 255),
        ("I;16", 65535, "png", 255),
        ("I;16", 32768, "png", 128),
        ("RGBA", (0, 0, 0, 128), "png", 127),
        ("LA", (0, 128), "png", 127),
        ("LAB", (255, 128, 128), "tif", 255),
    ],
    ids=lambda value: str(value),
)
def test_every_kind_of_pixel_becomes_rgb_by_rule(
    mode: str, colour: object, ending: str, expected: int, tmp_path: Path
) -> None:
    path = tmp_path / f"picture.{ending}"
    if mode == "I;16":
        Image.fromarray(np.full((8, 8), colour, dtype=np.uint16)).save(path)
    else:
        Image.new(mode, (8, 8), colour).save(path)
    opened = open_photograph(path)
    assert opened.mode == "RGB"
    assert abs(int(np.asarray(opened).mean()) - expected) <= 2
    assert open_photograph(path, channels=1).mode == "L"


def test_a_picture_of_one_pixel_is_a_plain_image(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (255, 0, 0)).save(tmp_path / "dot.png")
    tensor = prepare_files([tmp_path / "dot.png"], _wanted((32, 32)))
    assert tensor.shape == (1, 3, 32, 32)
    assert torch.equal(tensor, tensor[..., :1, :1].expand_as(tensor))


def test_a_sliver_is_not_blown_up(tmp_path: Path) -> None:
    Image.new("RGB", (10_000, 1)).save(tmp_path / "sliver.png")
    assert (
        prepare_files([tmp_path / "sliver.png"], _wanted((224, 224))).isfinite().all()
    )


@pytest.mark.parametrize(
    ("mode", "size"),
    [("RGB", (10_000, 10_000)), ("L", (20_000, 10_000)), ("L", (65_000, 2_100))],
    ids=str,
)
def test_a_jpeg_of_any_size_takes_bounded_memory(
    mode: str, size: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "wide.jpg"
    Image.new(mode, size, 100).save(path)
    code = (
        "import resource, sys\n"
        "from manyheads.data.photographs import open_photograph\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "image = open_photograph(sys.argv[1], at_least=256)\n"
        "assert min(image.size) >= 512, image.size\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print((after - before) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, check=True
    )
    # Whole, it would be 286 MiB before anything is done with it.
    assert int(done.stdout) < 60


def test_a_picture_beyond_all_bounds_is_refused_before_it_is_decoded(
    tmp_path: Path,
) -> None:
    Image.new("1", (12_000, 10_000)).save(tmp_path / "vast.png")
    with pytest.raises(DataError, match=r"12000x10000.*more than 100 million"):
        open_photograph(tmp_path / "vast.png")


def test_pillow_s_own_limit_is_as_the_user_set_it(tmp_path: Path) -> None:
    path = tmp_path / "vast.jpg"
    Image.new("L", (20_000, 10_000), 100).save(path)
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(open_photograph, [path] * 4))
    assert [image.size for image in opened] == [(5_000, 2_500)] * 4
    assert limit == Image.MAX_IMAGE_PIXELS
    assert filters == list(warnings.filters)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)


def test_a_sliver_too_large_for_its_quality_is_reduced_all_the_same(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sliver.jpg"
    Image.new("L", (65_000, 2_000), 100).save(path)
    opened = open_photograph(path)  # 130 million pixels, 2048 of a side wanted.
    assert opened.size == (32_500, 1_000)
    assert opened.getpixel((9, 9)) == (100, 100, 100)


def test_what_no_decoder_reduces_is_refused_by_its_pixels(tmp_path: Path) -> None:
    plain = Image.new("L", (20_000, 10_000), 100)
    plain.save(tmp_path / "scans.jpg", progressive=True)
    with pytest.raises(DataError, match=r"20000x10000.*progressive.*100 million"):
        open_photograph(tmp_path / "scans.jpg")
    plain.save(tmp_path / "vast.png", compress_level=1)
    with pytest.raises(DataError, match=r"more than 100 million.*as JPEG"):
        open_photograph(tmp_path / "vast.png")


def test_what_is_no_picture_is_named_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no picture")
    photo = sample_photographs()[0].read_bytes()
    (tmp_path / "half.jpg").write_bytes(photo[: len(photo) // 2])
    for name in ("notes.jpg", "half.jpg", "absent.jpg"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            open_photograph(tmp_path / name)
    with pytest.raises(DataError, match="no file was named"):
        prepare_files([], _wanted((32, 32)))
