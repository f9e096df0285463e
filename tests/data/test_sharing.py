"""Batches are the same whoever loads them: workers, ranks, or one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manyheads.data import Augmentation, Batch, ImageSource, image_source
from manyheads.data.mixing import share
from manyheads.errors import InvalidOption
from tests.helpers import tiny_vit


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    """Thirteen pictures of four classes, one of them unreadable."""
    generator = np.random.default_rng(0)
    for number in range(13):
        folder = tmp_path / f"class{number % 4}"
        folder.mkdir(exist_ok=True)
        pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (tmp_path / "class1" / "05.png").write_bytes(b"no picture")
    return image_source(tiny_vit(), tmp_path, labelled=True, max_unreadable=0.2)


def load(source: ImageSource, **options: object) -> list[Batch]:
    order = source.order(0, 0, repeats=3)
    return list(
        source.batches(
            order,
            6,
            augment_seed=1,
            augmentation=Augmentation.deit(),
            num_classes=4,
            **options,
        )
    )


def assert_equal(ours: Batch, theirs: Batch) -> None:
    assert len(ours.images) == len(theirs.images)
    if len(ours.images):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("start", [0, 2])
def test_workers_change_nothing(source: ImageSource, workers: int, start: int) -> None:
    alone = load(source, start=start)
    source.skipped.clear()
    helped = load(source, start=start, num_workers=workers)
    assert len(alone) == len(helped) == 3 - start
    for ours, theirs in zip(alone, helped, strict=True):
        assert_equal(ours, theirs)
    assert all(name == "class1/05.png" for name in source.skipped)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_parts_of_all_processes_are_the_batch_of_one(
    source: ImageSource, world_size: int, workers: int
) -> None:
    whole = load(source)
    parts = [
        load(source, rank=rank, world_size=world_size, num_workers=workers)
        for rank in range(world_size)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        full = [part for part in shares if len(part.images)]
        joined = Batch(*(torch.cat(column) for column in zip(*full, strict=True)))
        assert_equal(joined, batch)


def test_real_processes_share_a_batch(source: ImageSource, tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from manyheads.data import Augmentation, image_source\n"
        "from tests.helpers import tiny_vit\n"
        "folder, rank, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]\n"
        "source = image_source(tiny_vit(), folder, labelled=True, max_unreadable=0.2)\n"
        "made = source.batches(source.order(0, 0, repeats=3), 6, augment_seed=1,\n"
        "    augmentation=Augmentation.deit(), num_classes=4,\n"
        "    rank=rank, world_size=2)\n"
        "torch.save([tuple(batch) for batch in made], out)\n"
    )
    root, files = Path(__file__).parents[2], []
    for rank in (0, 1):
        files.append(tmp_path / f"{rank}.pt")
        command = [sys.executable, "-c", code, source.where, str(rank), files[-1]]
        subprocess.run(command, check=True, cwd=root, env={**os.environ})
    parts = [torch.load(file) for file in files]
    for batch, *shares in zip(load(source), *parts, strict=True):
        full = [part for part in shares if len(part[0])]
        for column, *pieces in zip(batch, *full, strict=True):
            assert torch.equal(torch.cat(pieces), column)


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_row_is_in_one_part_and_pairs_stay_whole(
    unit: int, world_size: int
) -> None:
    for rows in range(1, 30):
        parts = [share(rows, r, world_size, unit=unit) for r in range(world_size)]
        taken = [row for part in parts for row in range(rows)[part]]
        assert taken == list(range(rows))
        sizes = [len(range(rows)[part]) for part in parts]
        assert max(sizes) - min(sizes) <= 2 * unit - 1
        assert all(part.start % unit == 0 or part.start == rows for part in parts)


def test_a_small_last_batch_may_leave_a_process_without_images() -> None:
    source = image_source(tiny_vit(), torch.zeros(5, 3, 32, 32), labelled=False)
    sizes = [
        [len(b.images) for b in source.batches(range(5), 4, rank=r, world_size=2)]
        for r in (0, 1)
    ]
    assert sizes == [[2, 0], [2, 1]]


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_is_not_there_is_refused(rank: int, world_size: int) -> None:
    source = image_source(tiny_vit(), torch.zeros(5, 3, 32, 32), labelled=False)
    with pytest.raises(InvalidOption, match=f"part {rank} of batches"):
        source.batches(range(5), 4, rank=rank, world_size=world_size)
