"""Every verb on models of every library: what goes in and comes out is the host's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import manyheads as mh
from manyheads.drawing import draw
from manyheads.errors import DataError, ManyheadsError, NotHealable
from manyheads.hosts import find_host
from tests.helpers import tiny_vit
from tests.hosts import laws
from tests.hosts.hf_models import build

QUICK = {"block_epochs": 3, "logit_epochs": 6, "batch_size": 16, "progress": False}
QUICK |= {"block_learning_rate": 5e-3, "learning_rate": 5e-3, "warmup_epochs": 0}


def vision() -> nn.Module:
    arguments = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    return laws.randomise(
        torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_classes=5, **arguments
        )
    )


SCORES: dict[str, Callable[[], nn.Module]] = {
    "transformers-vit": lambda: build("ViTForImageClassification", num_labels=5),
    "transformers-siglip": lambda: build("SiglipForImageClassification", num_labels=5),
    "torchvision": vision,
}
FEATURES: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: laws.randomise(tiny_vit(num_classes=0)),
    "transformers-vit": lambda: build("ViTModel"),
    "transformers-clip": lambda: build("CLIPVisionModelWithProjection"),
    "transformers-dinov3": lambda: build("DINOv3ViTModel", drop_path_rate=0.2),
    "transformers-mae": lambda: build("ViTMAEModel"),
}
MODELS = {f"{name}-scores": make for name, make in SCORES.items()}
MODELS |= {f"{name}-features": make for name, make in FEATURES.items()}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)
BOTH = mh.Recipe(
    mh.Swap(blocks=[1], attention=mh.Hydra()), mh.Swap(ffn=mh.Compact(rank=8))
)


def photographs(count: int = 48) -> Tensor:
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    return nn.functional.interpolate(coarse, size=32, mode="bilinear")


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_healed_by_divergence(name: str) -> None:
    teacher = SCORES[name]()
    healed = mh.heal(mh.convert(teacher, BOTH), teacher, photographs(), **QUICK)
    assert healed.divergence is not None
    assert healed.divergence[1] < healed.divergence[0]
    assert healed.agreement is not None
    assert healed.feature_error is None
    assert healed.stages[0].losses[-1] < healed.stages[0].losses[0]


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_healed_by_their_squared_error(name: str) -> None:
    teacher = FEATURES[name]()
    healed = mh.heal(mh.convert(teacher, BOTH), teacher, photographs(), **QUICK)
    assert healed.divergence is None
    assert healed.agreement is None
    assert healed.feature_error is not None
    before, after = healed.feature_error
    assert after < before
    assert f"features: error {before:.3g} -> {after:.3g}" in str(healed)


def test_the_error_of_features_is_what_it_says() -> None:
    teacher = FEATURES["transformers-vit"]()
    student = mh.convert(teacher, BOTH)
    images = photographs(8)
    target = laws.answer(teacher, images)
    error = (laws.answer(student, images) - target).square().sum()
    healed = mh.heal(student, teacher, images, **QUICK)
    assert healed.feature_error is not None
    expected = float(error / target.square().sum())
    assert healed.feature_error[0] == pytest.approx(expected, rel=1e-4)


def test_other_features_than_the_teachers_are_refused() -> None:
    teacher = build("CLIPVisionModelWithProjection")
    other = build("CLIPVisionModelWithProjection", projection_dim=16)
    with pytest.raises(NotHealable, match=r"features \[16\] and the teacher \[512\]"):
        mh.heal(mh.convert(other, BOTH), teacher, photographs(4), **QUICK)


@pytest.mark.parametrize("name", SCORES)
def test_a_classifier_is_trained_and_evaluated(name: str) -> None:
    student = mh.convert(SCORES[name](), BOTH)
    images = photographs(20)
    labelled = images, torch.arange(20) % 5
    trained = mh.train(
        student, labelled, epochs=12, batch_size=10, learning_rate=5e-3, progress=False
    )
    assert trained.losses[-1] < trained.losses[0]
    measured = mh.evaluate(student, labelled, progress=False)
    scores = laws.answer(student.eval(), images)
    right = (scores.argmax(-1) == labelled[1]).float().mean()
    assert measured.top1 == pytest.approx(float(right))


@pytest.mark.parametrize("name", FEATURES)
def test_features_have_no_labels_to_be_trained_on(name: str) -> None:
    labelled = photographs(4), torch.zeros(4, dtype=torch.long)
    with pytest.raises(DataError, match=r"gives features \[1, .*classifier"):
        mh.evaluate(FEATURES[name](), labelled, progress=False)


@EACH_MODEL
def test_models_are_timed_against_each_other(name: str) -> None:
    teacher = MODELS[name]()
    student = mh.convert(teacher, BOTH)
    found = mh.bench(teacher, student, rounds=1, memory=False, progress=False)
    assert len(found.rows) == 2
    assert all(row.latency_ms > 0 for row in found.rows)


def test_models_of_two_libraries_are_timed_against_each_other() -> None:
    found = mh.bench(
        SCORES["torchvision"](),
        mh.convert(SCORES["transformers-vit"](), BOTH),
        rounds=1,
        progress=False,
    )
    assert not found.warnings
    assert all(row.peak_mib for row in found.rows)


@EACH_MODEL
def test_maps_are_taken_and_drawn(name: str, tmp_path: Path) -> None:
    student = mh.convert(MODELS[name](), BOTH)
    maps = mh.attention_maps(student, photographs(1), heads=range(2))
    assert [block.path for block in maps.blocks] == [
        site.attention_path for site in find_host(student)[1]
    ]
    if any(block.grid is None for block in maps.blocks):
        # ViT-MAE shuffles its patches and drops most: they have no place to be drawn.
        with pytest.raises(ManyheadsError):
            draw(maps, tmp_path / "maps.png")
        return
    assert draw(maps, tmp_path / "maps.png").stat().st_size > 10_000


@EACH_MODEL
def test_images_say_where_new_parts_start(name: str) -> None:
    teacher = MODELS[name]()
    images = photographs(8)
    blind = mh.convert(teacher, mh.Recipe(mh.Swap(ffn=mh.Compact(rank=8))))
    seeing = mh.convert(
        teacher, mh.Recipe(mh.Swap(ffn=mh.Compact(rank=8))), images=images
    )
    target = laws.answer(teacher, images)
    errors = [
        (laws.answer(m.eval(), images) - target).square().mean()
        for m in (seeing, blind)
    ]
    assert errors[0] < errors[1]


@torch.no_grad()
def loud(model: nn.Module) -> nn.Module:
    """Scale matrices up, so that blocks do something and scores differ."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(4)
    return model


STUDENTS = {
    "interactive": mh.Recipe(mh.Swap(attention=mh.Interactive(landmarks=(2, 2)))),
    "hallucinated-compact": mh.Recipe(
        mh.Swap(attention=mh.Hallucinated(), ffn=mh.Compact(rank=8, branches=2))
    ),
}


@pytest.mark.parametrize("recipe", STUDENTS.values(), ids=STUDENTS)
@pytest.mark.parametrize("name", ["timm", *SCORES])
def test_every_mechanism_heals_and_comes_back(
    name: str, recipe: mh.Recipe, tmp_path: Path
) -> None:
    teacher = loud(tiny_vit() if name == "timm" else SCORES[name]())
    student = mh.convert(teacher, recipe)
    slower = QUICK | {"block_learning_rate": 1e-3, "learning_rate": 3e-4}
    healed = mh.heal(student, teacher, photographs(), **slower)
    assert healed.divergence is not None
    assert healed.divergence[1] < healed.divergence[0]
    blocks = healed.stages[0].losses
    assert blocks[-1] < blocks[0]
    again = mh.load(mh.save(student, tmp_path / "student"))
    images = photographs(4)
    expected = laws.answer(student.eval(), images)
    assert torch.equal(laws.answer(again.eval(), images), expected)


@pytest.mark.parametrize("name", ["transformers-vit-scores", "torchvision-scores"])
def test_a_healed_student_saves_and_loads(name: str, tmp_path: Path) -> None:
    teacher = MODELS[name]()
    student = mh.convert(teacher, BOTH)
    mh.heal(student, teacher, photographs(16), **QUICK)
    again = mh.load(mh.save(student, tmp_path / "student"))
    images = photographs(4)
    expected = laws.answer(student.eval(), images)
    assert torch.equal(laws.answer(again.eval(), images), expected)
