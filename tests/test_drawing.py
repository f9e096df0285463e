"""draw: pictures that can be read, or a reason why there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import manyheads as mh
from manyheads.data.photographs import sample_photographs
from manyheads.drawing import draw
from manyheads.errors import DataError, InvalidOption
from manyheads.maps import Maps
from tests.helpers import assert_close, tiny_vit

pytest.importorskip("matplotlib", reason="needs the extra: manyheads[draw]")


def _maps(model: nn.Module | None = None, **options: object) -> Maps:
    hydra = mh.convert(
        tiny_vit(depth=2), mh.Recipe(mh.Swap(blocks=[1], attention=mh.Hydra()))
    )
    options = {"heads": range(2), "queries": [0]} | options
    return mh.attention_maps(model or hydra, list(sample_photographs()), **options)


def test_a_grid_over_blocks_and_heads_is_a_png(tmp_path: Path) -> None:
    path = draw(_maps(), tmp_path / "grid.png", title="tiny")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        # Photograph, influence, summary, two features; two rows.
        assert picture.width > picture.height
        assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 1000
    assert list(tmp_path.iterdir()) == [path]


def test_two_models_side_by_side_and_another_image_differ(tmp_path: Path) -> None:
    teacher, student = _maps(tiny_vit(depth=2)), _maps()
    pair = {"teacher": teacher, "student": student}
    first = draw(pair, tmp_path / "a.png", image=0).read_bytes()
    second = draw(pair, tmp_path / "b.png", image=1).read_bytes()
    assert first != second
    same = draw({"a": teacher, "b": teacher}, tmp_path / "c.png")
    panels = np.asarray(Image.open(same).convert("L")).astype(int)
    assert panels.std() > 10


def test_a_model_without_a_class_token_is_seen_by_the_mean(tmp_path: Path) -> None:
    model = tiny_vit(depth=1, class_token=False, global_pool="avg")
    assert draw(_maps(model, queries=None), tmp_path / "mean.png").exists()


@pytest.mark.parametrize(
    ("options", "drawn", "facts"),
    [
        ({"heads": range(13), "blocks": [1]}, {}, r"13 maps.*heads=range\(6\)"),
        ({}, {"image": 2}, "no image 2"),
        ({}, {"query": 3}, r"query=3.*queries=\[3\]"),
        ({"blocks": []}, {}, "nothing to draw"),
    ],
)
def test_what_cannot_be_drawn_is_named(
    options: dict[str, object], drawn: dict[str, int], facts: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidOption, match=facts):
        draw(_maps(**options), tmp_path / "none.png", **drawn)
    assert list(tmp_path.iterdir()) == []


def test_models_that_show_different_blocks_are_not_compared(tmp_path: Path) -> None:
    pair = {"a": _maps(blocks=[0]), "b": _maps(blocks=[1])}
    with pytest.raises(InvalidOption, match=r"different blocks: \[\[0\], \[1\]\]"):
        draw(pair, tmp_path / "none.png")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent/maps\.png.*cannot be written"):
        draw(_maps(), tmp_path / "absent" / "maps.png")


def test_without_matplotlib_the_missing_extra_is_named() -> None:
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "from manyheads.drawing import draw\n"
        "try:\n    draw({}, 'x.png')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert 'pip install "manyheads[draw]"' in done.stdout


@pytest.mark.parametrize(
    ("name", "sizes", "grids"),
    [
        (
            "pvt_v2_b0",
            {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 5, 8)},
            [(2, 3), (2, 3), (2, 3), (2, 3)],
        ),
        (
            "nextvit_small",
            {"depths": (1, 1, 5, 1)},
            [(8, 12), (4, 6), (2, 3)],
        ),
    ],
)
def test_keys_made_of_several_patches_are_drawn_where_those_lie(
    name: str, sizes: dict[str, object], grids: list[tuple[int, int]], tmp_path: Path
) -> None:
    model = timm.create_model(name, num_classes=7, **sizes).eval()
    maps = mh.attention_maps(model, torch.randn(1, 3, 64, 96), heads=[0])
    assert [block.grid for block in maps.blocks] == grids
    for block in maps.blocks:
        laid = block.on_grid(block.maps[0, 0])
        assert_close(laid.sum(dim=(-2, -1)), torch.ones(len(block.queries)))
    draw(maps, tmp_path / "maps.png")
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.height > picture.width / 3


def test_a_run_of_patches_shares_the_weight_of_its_key() -> None:
    model = timm.create_model("nextvit_small", depths=(1, 1, 5, 1), num_classes=7)
    maps = mh.attention_maps(model.eval(), torch.randn(1, 3, 64, 64), heads=[0])
    block = maps.blocks[0]
    keys = block.maps.shape[-1]
    assert block.key_run == 64 // keys > 1
    laid = block.on_grid(torch.arange(keys).float()).flatten()
    assert laid[: block.key_run].eq(0).all()
    assert laid[block.key_run].item() == pytest.approx(1 / block.key_run)


_SHALLOW = {"depths": (1, 1, 1, 1), "num_classes": 7}


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
@pytest.mark.parametrize(
    ("name", "size", "grids"),
    [
        ("pvt_v2_b0", (100, 100), [(3, 3), (3, 3), (3, 3), (4, 4)]),
        # One row of keys: squares of patches that only their number tells.
        ("pvt_v2_b0", (60, 132), [(1, 4), (2, 4), (2, 4), (2, 5)]),
        ("pvt_v2_b2_li", (100, 132), [(7, 7)] * 4),
        ("nextvit_small", (100, 100), [(13, 13), (7, 7), (4, 4)]),
        ("nextvit_small", (40, 60), [(5, 8), (3, 4), (2, 2)]),
    ],
)
def test_pyramids_are_drawn_at_sizes_that_are_no_whole_cells(
    name: str,
    size: tuple[int, int],
    grids: list[tuple[int, int]],
    converted: bool,
    tmp_path: Path,
) -> None:
    changes = _SHALLOW | ({"depths": (1, 1, 5, 1)} if "next" in name else {})
    model = timm.create_model(name, **changes).eval()
    if converted:
        model = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Hydra()))).eval()
    images = torch.randn(1, 3, *size)
    maps = mh.attention_maps(model, images, heads=[0], queries=[0])
    assert [block.grid for block in maps.blocks] == grids
    for block in maps.blocks:
        laid = block.on_grid(block.influence)
        assert laid.shape[-2:] == block.grid
        assert_close(laid.sum(dim=(-2, -1)), block.influence.sum(dim=-1))
    assert draw(maps, tmp_path / "maps.png").exists()


def test_a_run_is_as_long_where_it_is_the_only_one() -> None:
    model = timm.create_model("nextvit_small", depths=(1, 1, 5, 1), num_classes=7)
    images = torch.randn(1, 3, 40, 40)
    block = mh.attention_maps(model.eval(), images, heads=[0]).blocks[0]
    # 25 patches, pooled by 16: the last nine are no part of any key.
    assert (block.grid, block.maps.shape[-1], block.key_run) == ((5, 5), 1, 16)
    laid = block.on_grid(torch.ones(1)).flatten()
    assert laid[:16].eq(1 / 16).all()
    assert laid[16:].eq(0).all()
