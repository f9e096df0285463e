"""Rates, warm-up and refit of healing where nobody says."""

from __future__ import annotations

import csv
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from benchmarks.accuracy.cases import BASE, CIFAR10

from manyheads import Hydra, Recipe, Swap, convert, heal
from manyheads.hosts import find_host
from manyheads.pacing import paced, rate_at, warmup_of
from tests.helpers import tiny_vit

NOTHING_SAID = {
    "refit_images": None,
    "refit_unswapped": None,
    "block_learning_rate": None,
    "learning_rate": None,
    "warmup_epochs": None,
    "block_epochs": 0,
    "logit_epochs": 1,
    "weight_decay": 0.0,
    "temperature": 1.0,
    "feature_weight": 0.0,
}


def test_the_study_heals_with_the_defaults() -> None:
    sites = find_host(timm.create_model("vit_tiny_patch16_224", **dict(CIFAR10.model)))
    found = paced(NOTHING_SAID, sites[1])
    found["warmup_epochs"] = warmup_of(found, 1)
    found["batch_size"] = inspect.signature(heal).parameters["batch_size"].default
    assert {name: found[name] for name in BASE} == BASE


@pytest.mark.parametrize(
    ("name", "width"),
    [("vit_tiny_patch16_224", 192), ("deit_base_patch16_224", 768), ("pvt_v2_b0", 256)],
)
def test_rates_fall_with_the_width_of_the_widest_block(name: str, width: int) -> None:
    sites = find_host(timm.create_model(name, device="meta"))[1]
    found = paced(NOTHING_SAID, sites)
    assert found["learning_rate"] == found["block_learning_rate"] == rate_at(width)
    assert rate_at(width) == pytest.approx(0.128 / width)


def test_what_is_said_stays() -> None:
    sites = find_host(tiny_vit())[1]
    said = NOTHING_SAID | {"refit_images": 7, "learning_rate": 5e-4, "warmup_epochs": 3}
    said |= {"logit_epochs": 10}
    found = paced(said, sites)
    assert (found["refit_images"], found["learning_rate"]) == (7, 5e-4)
    assert warmup_of(found, 10) == 3
    assert found["refit_unswapped"] is False


def test_without_training_all_is_solved_for_on_512_images() -> None:
    found = paced(NOTHING_SAID | {"logit_epochs": 0}, find_host(tiny_vit())[1])
    assert (found["refit_images"], found["refit_unswapped"]) == (512, True)


def test_a_run_says_what_it_took(tmp_path: Path) -> None:
    """Resolved numbers are in the card of the run, and steps follow them."""
    teacher = tiny_vit()
    student = convert(teacher, Recipe(Swap(attention=Hydra())))
    images = torch.randn(40, 3, 32, 32)
    options: dict[str, Any] = {"batch_size": 2, "log_every": 1, "progress": False}
    options |= {"block_epochs": 0, "logit_epochs": 1, "run_dir": tmp_path / "run"}
    healed = heal(student, teacher, images, **options)
    assert healed.refits == ()
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    rate = rate_at(find_host(teacher)[1][0].geometry.dim)
    assert card["config"]["learning_rate"] == rate
    with (tmp_path / "run" / "steps.csv").open() as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    # One step of twenty is the warm-up: the second has the highest rate.
    assert rates[1] == max(rates) <= rate
    assert rates[1] == pytest.approx(rate, rel=0.02)
