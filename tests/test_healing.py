"""Law 9 over every mechanism: healing lowers the loss and moves the student only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from manyheads import Compact, Hydra, Recipe, Softmax, Swap, convert, heal
from manyheads.data import digits
from manyheads.errors import (
    CheckpointError,
    DataError,
    InvalidOption,
    NonFiniteLoss,
    NotHealable,
)
from manyheads.healing import Healed
from manyheads.training import evaluate, train
from tests.helpers import tiny_vit

SWAPS = {
    "hydra": Swap(attention=Hydra()),
    "hydra-mean": Swap(attention=Hydra(kernel="mean")),
    "hydra-aft": Swap(attention=Hydra(kernel="aft")),
    "compact": Swap(ffn=Compact(rank=4)),
    "both": Swap(blocks=[1, 2], attention=Hydra(), ffn=Compact(rank=8)),
}
# The two stages that train; tests/test_refit.py looks at what comes before them.
QUICK = {
    "refit_images": 0,
    "block_learning_rate": 1e-3,
    "learning_rate": 1e-3,
    "warmup_epochs": 0.5,
    "block_epochs": 3,
    "logit_epochs": 3,
    "batch_size": 16,
    "progress": False,
}


def noise(count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=32, mode="bilinear")


def spread(model: nn.Module) -> nn.Module:
    """Scale weights up, so that blocks do something and scores differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def pair(swap: Swap = SWAPS["hydra"], **changes: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = spread(tiny_vit(**changes))
    return convert(teacher, Recipe(swap)), teacher


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    now = model.state_dict()
    return {name for name in before if not torch.equal(now[name], before[name])}


@pytest.mark.parametrize("name", SWAPS)
def test_healing_lowers_every_loss_and_only_the_student_moves(name: str) -> None:
    student, teacher = pair(SWAPS[name])
    before = copy_of(teacher)
    healed = heal(student, teacher, noise(), **QUICK)
    assert len(healed.blocks) == (2 if name == "both" else 3)
    assert all(block.after < block.before for block in healed.blocks)
    assert healed.divergence[1] < healed.divergence[0]
    for stage in healed.stages:
        assert stage.losses[-1] < stage.losses[0]
        assert stage.steps == 12
    assert moved(teacher, before) == set()
    assert all(p.grad is None for m in (student, teacher) for p in m.parameters())


def test_stage_one_moves_converted_blocks_only_and_stage_two_everything() -> None:
    student, teacher = pair(Swap(blocks=[1], attention=Hydra()))
    before = copy_of(student)
    heal(student, teacher, noise(), **QUICK | {"logit_epochs": 0})
    assert moved(student, before) == {n for n in before if n.startswith("blocks.1.")}
    heal(student, teacher, noise(), **QUICK | {"block_epochs": 0})
    assert moved(student, before) == set(before)


def test_blocks_learn_apart_from_each_other() -> None:
    together, teacher = pair(SWAPS["hydra"])
    alone, _ = pair(Swap(blocks=[2], attention=Hydra()))
    # Cutting the gradient would couple them through its common length.
    options = QUICK | {"logit_epochs": 0, "max_grad_norm": 1e9}
    heal(together, teacher, noise(), **options)
    heal(alone, teacher, noise(), **options)
    for ours, theirs in zip(
        together.blocks[2].parameters(), alone.blocks[2].parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_flags_and_modes_of_both_models_come_back() -> None:
    student, teacher = pair()
    teacher.train().requires_grad_(False)
    student.requires_grad_(False)
    student.blocks[0].train()
    models = student, teacher
    modes = [[m.training for m in model.modules()] for model in models]
    before = copy_of(student)
    heal(student, teacher, noise(), **QUICK)
    assert [[m.training for m in model.modules()] for model in models] == modes
    assert not any(p.requires_grad for model in models for p in model.parameters())
    assert moved(student, before) == set(before)


def test_dropout_rests_while_healing() -> None:
    student, teacher = pair()
    dropping, _ = pair(proj_drop_rate=0.5, drop_path_rate=0.5)
    heal(student, teacher, noise(), **QUICK)
    heal(dropping, teacher, noise(), **QUICK)
    assert moved(student, copy_of(dropping)) == set()


@pytest.mark.parametrize("matched", [0.0, 2.0])
@pytest.mark.parametrize("temperature", [1, 4.0])
def test_temperature_and_features_are_options(
    matched: float, temperature: float
) -> None:
    student, teacher = pair()
    options = {"temperature": temperature, "feature_weight": matched}
    healed = heal(student, teacher, noise(), **QUICK | options)
    assert healed.divergence[1] < healed.divergence[0]


def test_labels_are_not_looked_at() -> None:
    students = []
    for labels in (torch.zeros(64, dtype=torch.long), torch.arange(64)):
        student, teacher = pair()
        heal(student, teacher, (noise(), labels), **QUICK)
        students.append(student)
    plain, teacher = pair()
    heal(plain, teacher, noise(), **QUICK)
    assert moved(students[0], copy_of(students[1])) == set()
    assert moved(students[0], copy_of(plain)) == set()


def test_a_folder_of_pictures_is_enough(tmp_path: Path) -> None:
    for number, image in enumerate(noise(12)):
        pixels = (image.permute(1, 2, 0) * 60 + 128).clamp(0, 255).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_text("no picture")
    student, teacher = pair()
    healed = heal(student, teacher, tmp_path, **QUICK)
    assert healed.images == 13
    assert healed.skipped == ("broken.png",)
    assert healed.divergence[1] < healed.divergence[0]


def test_a_model_with_parallel_branches_heals_where_it_was_converted() -> None:
    torch.manual_seed(0)
    parallel = timm.create_model(
        "vit_small_patch16_18x2_224",
        img_size=32,
        patch_size=16,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=5,
        init_values=0.5,
    )
    teacher = spread(parallel.eval())
    swap = Swap(blocks=[1], attention=Hydra(), ffn=Compact(rank=4))
    student = convert(teacher, Recipe(swap))
    healed = heal(
        student, teacher, noise(), **QUICK | {"logit_epochs": 0, "block_epochs": 8}
    )
    assert {block.path for block in healed.blocks} == {
        "blocks.0.attns.1",
        "blocks.0.ffns.1",
    }
    for block in healed.blocks:
        assert block.after < block.before


def test_a_converted_model_can_be_the_teacher() -> None:
    teacher, _ = pair(Swap(blocks=[2], attention=Hydra()))
    student = convert(teacher, Recipe(Swap(blocks=[1], attention=Hydra())))
    healed = heal(student, teacher, noise(), **QUICK)
    assert [block.path for block in healed.blocks] == ["blocks.1"]


def test_a_teacher_in_bfloat16_teaches_a_student_in_float32() -> None:
    student, teacher = pair()
    healed = heal(student, teacher.bfloat16(), noise(), **QUICK)
    assert healed.divergence[1] < healed.divergence[0]


def unlike() -> dict[str, tuple[nn.Module, nn.Module, str]]:
    student, teacher = pair()
    sharing = convert(teacher, Recipe(SWAPS["hydra"]))
    sharing.head = teacher.head
    same = convert(teacher, Recipe(Swap(blocks=[0], attention=Softmax())))
    return {
        "one": (student, student, "one and the same"),
        "unchanged": (same, teacher, "no block differs"),
        "deeper": (student, tiny_vit(depth=4), "3 blocks"),
        "sharing": (sharing, teacher, "'head.weight'"),
        "half": (
            convert(teacher, Recipe(SWAPS["hydra"])).bfloat16(),
            teacher,
            "bfloat16",
        ),
        "classes": (student, tiny_vit(num_classes=7), "10 scores and the teacher 7"),
    }


@pytest.mark.parametrize(
    "name", ["one", "unchanged", "deeper", "sharing", "half", "classes"]
)
def test_models_that_do_not_pair_up_are_refused_by_what_differs(name: str) -> None:
    student, teacher, fact = unlike()[name]
    before = copy_of(student)
    with pytest.raises(NotHealable) as caught:
        heal(student, teacher, noise(), **QUICK)
    assert fact in str(caught.value)
    assert moved(student, before) == set()


def test_images_the_model_was_not_built_for_are_refused_before_anything_moves() -> None:
    student, teacher = pair()
    before = copy_of(student)
    with pytest.raises(DataError, match=r"refuses an image \[3, 48, 48\]"):
        heal(student, teacher, torch.zeros(4, 3, 48, 48), **QUICK)
    assert moved(student, before) == set()


@pytest.mark.parametrize("stage", ["blocks", "logits"])
def test_a_broken_block_is_named_with_its_stage_and_step(stage: str) -> None:
    student, teacher = pair()
    student.blocks[1].mlp.fc2.bias.data[0] = torch.inf
    before = copy_of(student)
    epochs = {"block_epochs": 3 * (stage == "blocks")}
    with pytest.raises(NonFiniteLoss) as caught:
        heal(student, teacher, noise(), **QUICK | epochs)
    assert caught.value.where == "blocks.1 (block 1)"
    assert f"stage {stage!r}, step 1 of 12" in caught.value.asked
    assert moved(student, before) == set()


def test_a_broken_teacher_is_named_as_such() -> None:
    student, teacher = pair()
    teacher.blocks[0].mlp.fc2.bias.data[0] = torch.nan
    with pytest.raises(NonFiniteLoss, match=r"the teacher's blocks\.0 \(block 0\)"):
        heal(student, teacher, noise(), **QUICK)


@pytest.mark.parametrize("stage", ["blocks", "logits"])
def test_divergence_leaves_the_last_weights_that_were_good(stage: str) -> None:
    student, teacher = pair()
    wild = {"block_learning_rate": 1e25, "learning_rate": 1e25, "warmup_epochs": 0}
    wild["block_epochs"] = 3 * (stage == "blocks")
    with pytest.raises(NonFiniteLoss, match=f"stage '{stage}', step [2-9]"):
        heal(student, teacher, noise(), **QUICK | wild)
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert student(noise(2)).isfinite().all()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [5, 17])
def test_healing_goes_on_in_either_stage_bit_for_bit(
    tmp_path: Path, after: int
) -> None:
    straight, teacher = pair()
    expected = heal(straight, teacher, noise(), **QUICK)
    stopped, calls = pair()[0], []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) == after + 8:
            raise Stopped

    options = QUICK | {"run_dir": tmp_path / "run", "checkpoint_every": 2}
    handle = stopped.blocks[0].register_forward_hook(stop)
    with pytest.raises(Stopped):
        heal(stopped, teacher, noise(), **options)
    handle.remove()
    resumed, _ = pair()
    found = heal(resumed, teacher, noise(), **options)
    assert moved(resumed, copy_of(straight)) == set()
    assert found.stages == expected.stages
    assert found.divergence == expected.divergence
    again, _ = pair()
    assert heal(again, teacher, noise(), **options) == found
    assert moved(again, copy_of(straight)) == set()


def test_another_teacher_is_another_run(tmp_path: Path) -> None:
    student, teacher = pair()
    options = QUICK | {"run_dir": tmp_path / "run", "block_epochs": 1}
    heal(student, teacher, noise(), **options)
    teacher.head.bias.data += 1
    with pytest.raises(CheckpointError, match="teacher was"):
        heal(student, teacher, noise(), **options)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0},
        {"block_epochs": -1},
        {"feature_weight": -1.0},
        {"learning_rate": 0.0},
        {"batch_size": 0},
        {"num_workers": -1},
        {"warmup_epochs": 9},
        {"block_epochs": 0, "logit_epochs": 0},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(change: dict[str, object]) -> None:
    student, teacher = pair()
    with pytest.raises(InvalidOption) as caught:
        heal(student, teacher, noise(), **QUICK | change)
    assert next(iter(change)) in caught.value.asked


def test_the_result_reads_well_and_is_json() -> None:
    student, teacher = pair()
    healed = heal(student, teacher, noise(), **QUICK)
    value = json.loads(json.dumps(healed.to_json()))
    assert value["images"] == value["sample"] == 64
    assert len(value["stages"][0]["losses"]) == 3
    assert "blocks.2  error" in str(healed)
    assert "agreement" in str(healed)
    assert isinstance(healed, Healed)


@pytest.mark.slow
def test_two_blocks_of_hydra_read_digits_again_after_healing() -> None:
    """The main promise, small and real: swapped is bad, healed is nearly as good."""
    learned, unseen = digits(image_size=32)
    torch.manual_seed(0)
    teacher = tiny_vit(depth=2)
    train(teacher, learned, epochs=20, learning_rate=3e-3, progress=False)
    student = convert(teacher, Recipe(Swap(attention=Hydra())))
    before, swapped = (
        evaluate(model, unseen, progress=False).top1 for model in (teacher, student)
    )
    # Shorter than the defaults, to keep the suite quick.
    short = {"block_epochs": 2, "logit_epochs": 5, "learning_rate": 2e-3}
    heal(student, teacher, learned[0], progress=False, **short)
    healed = evaluate(student, unseen, progress=False).top1
    assert before > 0.85, before
    assert swapped < before - 0.2, swapped
    assert healed > before - 0.03, healed
