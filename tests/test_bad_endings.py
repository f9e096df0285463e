"""A run that bad images end leaves the model as it came, however late they are met."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from manyheads import Hydra, Recipe, Swap, convert, heal, train
from manyheads.errors import DataError
from manyheads.loop.weights import Origin
from tests.helpers import tiny_vit

OPTIONS = {"batch_size": 4, "checkpoint_every": 1, "progress": False}
COUNT = 24


class Fading(Dataset[Any]):
    """Images of a disk that fails, or labels that go wrong, after so many readings."""

    def __init__(self, good: int, *, label: int | None = None) -> None:
        self.good, self.label = good, label

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        self.good -= 1
        label = position % 10
        if self.good < 0 and self.label is None:
            raise OSError("the disk is gone")
        if self.good < 0 and self.label is not None:
            label = self.label
        return torch.full((3, 32, 32), position / COUNT), label


def trained(model: nn.Module, images: Any, run_dir: Path) -> None:
    train(model, images, epochs=5, run_dir=run_dir, **OPTIONS)


def healed(model: nn.Module, images: Any, run_dir: Path) -> None:
    torch.manual_seed(0)
    teacher = tiny_vit()
    heal(model, teacher, images, logit_epochs=5, run_dir=run_dir, **OPTIONS)


@pytest.mark.parametrize(
    ("verb", "label", "fact"),
    [
        (trained, None, "of 24 cannot be read"),
        (trained, 99, "labels lie outside, 99 first"),
        (healed, None, "of 24 cannot be read"),
    ],
    ids=["train-unreadable", "train-label", "heal-unreadable"],
)
def test_the_model_has_the_weights_that_it_came_with(
    verb: Callable[..., None], label: int | None, fact: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = convert(tiny_vit(), Recipe(Swap(attention=Hydra())))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=fact):
        verb(model, Fading(80, label=label), tmp_path / "run")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # Steps were made, and are kept where the run would go on from.
    steps = [folder.name for folder in (tmp_path / "run").glob("step-*")]
    assert steps
    assert "step-0.0" not in steps


def test_what_a_model_came_with_includes_its_buffers() -> None:
    norm = nn.BatchNorm1d(3)
    origin = Origin(norm)
    norm(torch.randn(8, 3))
    norm.weight.data += 1
    norm.to(torch.float64)
    origin.restore()
    for name, value in nn.BatchNorm1d(3).state_dict().items():
        assert torch.equal(norm.state_dict()[name].to(value.dtype), value), name
