"""What tells one torch dataset from another, and what must not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from manyheads import train
from manyheads.data import image_source
from manyheads.data.glances import glance_at
from manyheads.errors import CheckpointError, DataError
from tests.helpers import tiny_vit

COUNT = 20


class Pictures(Dataset[Any]):
    """Pictures of one shade each, with labels, changed when they are asked for."""

    def __init__(self, change: Any = None, gone: tuple[int, ...] = ()) -> None:
        self.shades = [10 * number for number in range(COUNT)]
        self.labels = [number % 10 for number in range(COUNT)]
        self.change, self.gone = change, gone
        self.own = np.random.default_rng()

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, position: int) -> tuple[Any, int]:
        if position in self.gone:
            raise OSError("the disk is gone")
        shade = self.shades[position]
        image = Image.new("RGB", (32, 32), (shade, 0, 0))
        if self.change is not None:
            image = self.change(image, self)
        return image, self.labels[position]


def shifted(shift: float) -> torch.Tensor:
    return torch.full((3, 32, 32), float(shift))


CHANGES = {
    "torch": lambda image, data: shifted(torch.rand(()).item()),
    "numpy": lambda image, data: shifted(np.random.rand()),
    "python": lambda image, data: shifted(random.random()),
    "own": lambda image, data: shifted(data.own.random()),
}


def identity(data: Dataset[Any]) -> dict[str, Any]:
    return image_source(tiny_vit(), data, labelled=False).identity


def test_another_item_or_label_is_another_dataset() -> None:
    before = identity(Pictures())
    assert identity(Pictures()) == before
    for changed in ("shades", "labels"):
        for position in (0, COUNT - 1):
            other = Pictures()
            getattr(other, changed)[position] += 1
            assert identity(other) != before


@pytest.mark.parametrize("source", CHANGES)
def test_random_items_are_the_same_dataset_each_time(source: str) -> None:
    before = identity(Pictures(CHANGES[source]))
    torch.rand(3), np.random.rand(3), random.random()
    assert identity(Pictures(CHANGES[source])) == before
    other = Pictures(CHANGES[source])
    other.labels[0] += 1
    assert identity(other) != before


def test_a_glance_leaves_the_generators_as_they_were() -> None:
    # Not Python's: under test beartype draws from it to check the arguments.
    noise = torch.get_rng_state(), np.random.get_state()[1].copy()
    for change in CHANGES.values():
        glance_at(Pictures(change), COUNT)
    assert torch.equal(noise[0], torch.get_rng_state())
    assert (noise[1] == np.random.get_state()[1]).all()


def test_a_run_on_random_items_goes_on_and_on_others_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 1, "batch_size": 10, "progress": False}
    options["run_dir"] = tmp_path / "run"
    for change in (CHANGES["own"], CHANGES["own"]):
        train(tiny_vit(), Pictures(change), **options)
    other = Pictures(CHANGES["own"])
    other.labels[0] += 1
    with pytest.raises(CheckpointError, match="images"):
        train(tiny_vit(), other, **options)


def test_a_first_item_that_cannot_be_read_is_skipped() -> None:
    data = Pictures(gone=(0,))
    source = image_source(tiny_vit(), data, labelled=True)
    assert sum(len(b.images) for b in source.batches(range(COUNT), 8)) == COUNT - 1
    assert set(source.skipped) == {"item 0"}
    with pytest.raises(DataError, match="none of its items that were tried"):
        identity(Pictures(gone=tuple(range(COUNT))))
