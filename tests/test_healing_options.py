"""What heal can be told beside its stages: rates, precision, parts, averages, logs."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from manyheads import Compact, Hallucinated, Hydra, Interactive, Recipe, Swap, convert
from manyheads.data import Augmentation
from manyheads.errors import CheckpointError, InvalidOption
from manyheads.healing import Healed, heal
from manyheads.loop.rates import optimizer_and_schedule
from manyheads.loop.stages import RunOptions, Stage
from manyheads.pairing import Pair
from tests.test_healing import Stopped, copy_of, moved, noise, pair

SWAPS = {
    "interactive": Swap(attention=Interactive(landmarks=(2, 2))),
    "hallucinated": Swap(blocks=[1, 2], attention=Hallucinated()),
    "compact": Swap(ffn=Compact(rank=8)),
    "one": Swap(blocks=[1], attention=Hallucinated(), ffn=Compact(rank=8)),
}
NEW = {
    "interactive": ("attn.core.mix_queries", "attn.core.mix_keys"),
    "hallucinated": (
        *("attn.qkv.weight", "attn.qkv.bias"),
        *("attn.core.query_kernel", "attn.core.key_kernel"),
    ),
    "compact": ("mlp.fc2.inner.weight", "mlp.fc2.outer.weight", "mlp.fc2.outer.bias"),
}
NEW["one"] = (*NEW["hallucinated"], *NEW["compact"])
QUICK: dict[str, Any] = {
    "refit_images": 0,
    "block_learning_rate": 1e-3,
    "learning_rate": 1e-3,
    "warmup_epochs": 0.5,
    "block_epochs": 2,
    "logit_epochs": 2,
    "batch_size": 16,
    "progress": False,
}
EVERYTHING: dict[str, Any] = QUICK | {
    "refit_images": 8,
    "inherited_rate_factor": 0.25,
    "accumulation": 2,
    "precision": "fp16",
    "ema_decay": 0.9,
    "max_grad_norm": 0.5,
    "weight_decay": 0.05,
    "feature_weight": 0.5,
}


def healed(student: nn.Module, teacher: nn.Module, **changes: object) -> Healed:
    return heal(student, teacher, noise(), **(QUICK | changes))


def is_new(name: str, swap: str) -> bool:
    blocks = SWAPS[swap].blocks or range(3)
    return name in {f"blocks.{block}.{part}" for block in blocks for part in NEW[swap]}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_groups_of_the_optimiser_have_the_rates(swap: str, decay: float) -> None:
    student, teacher = pair(SWAPS[swap])
    stage = Stage(
        name="any",
        epochs=2,
        learning_rate=1e-3,
        weight_decay=decay,
        warmup_epochs=1,
        trains=("",),
        loss=lambda _: {},
        blame=lambda _: "",
        augment=False,
        rate_factors=Pair(student, teacher, 1.0, 0.0).rate_factors(0.1),
    )
    options = RunOptions(
        batch_size=8,
        seed=0,
        run_dir=None,
        progress=False,
        num_workers=0,
        checkpoint_every=1,
        max_grad_norm=1.0,
    )
    student.requires_grad_(True)
    optimizer, schedule = optimizer_and_schedule(student, stage, options, per_epoch=10)
    for step, rate in ((0, 1e-5), (5, 5.05e-4), (10, 5e-4), (20, 0.0)):
        schedule.step_update(step)
        found = {
            id(parameter): (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        assert len(found) == len(list(student.parameters()))
        for name, parameter in student.named_parameters():
            wanted = rate if is_new(name, swap) else rate / 10
            assert found[id(parameter)][0] == pytest.approx(wanted), (step, name)
            if name.endswith("weight"):
                decays = decay if parameter.ndim > 1 else 0.0
                assert found[id(parameter)][1] == decays, name


@pytest.mark.parametrize("stage", ["block", "logit"])
def test_the_first_step_moves_every_weight_by_its_rate(stage: str) -> None:
    student, teacher = pair(SWAPS["one"])
    before = copy_of(student)
    once = {"block_epochs": 0, "logit_epochs": 0, f"{stage}_epochs": 1}
    rates = {"learning_rate": 1e-3, "block_learning_rate": 1e-3, "warmup_epochs": 0}
    healed(student, teacher, batch_size=64, inherited_rate_factor=0.25, **once, **rates)
    for name, parameter in student.named_parameters():
        # One step of Adam moves a weight by its rate; no gradient reaches key biases.
        step = (parameter.detach() - before[name]).abs().max().item()
        if stage == "block" and not name.startswith("blocks.1."):
            assert step == 0
        else:
            wanted = 1e-3 if is_new(name, "one") else 2.5e-4
            assert step == pytest.approx(wanted, rel=0.02), name


@pytest.mark.parametrize("swap", SWAPS)
def test_a_factor_of_zero_leaves_inherited_parameters_as_they_are(swap: str) -> None:
    student, teacher = pair(SWAPS[swap])
    before = copy_of(student)
    options = {"inherited_rate_factor": 0, "weight_decay": 0.1, "ema_decay": 0.9}
    found = healed(student, teacher, **options)
    names = {name for name, _ in student.named_parameters()}
    assert moved(student, before) & names == {n for n in names if is_new(n, swap)}
    assert found.divergence[1] < found.divergence[0]
    flags = {p.requires_grad for p in student.parameters()}
    assert flags == {True}


def test_a_factor_of_one_is_no_factor() -> None:
    plain, teacher = pair(SWAPS["one"])
    told, _ = pair(SWAPS["one"])
    healed(plain, teacher)
    healed(told, teacher, inherited_rate_factor=1)
    assert moved(told, copy_of(plain)) == set()
    scaled, _ = pair(SWAPS["one"])
    healed(scaled, teacher, inherited_rate_factor=0.5)
    assert moved(scaled, copy_of(plain))


def test_where_nothing_is_new_nothing_is_left_to_move() -> None:
    student, teacher = pair(Swap(attention=Hydra()))
    before = copy_of(student)
    with pytest.raises(InvalidOption, match="brings no new ones"):
        healed(student, teacher, inherited_rate_factor=0)
    assert moved(student, before) == set()
    # Any other factor holds for all of it: a lower rate.
    healed(student, teacher, inherited_rate_factor=0.5)
    lower, _ = pair(Swap(attention=Hydra()))
    healed(lower, teacher, learning_rate=5e-4, block_learning_rate=5e-4)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(lower.state_dict()[name], tensor)


def test_what_was_converted_before_is_inherited_from_its_teacher() -> None:
    _, plain = pair()
    first = convert(plain, Recipe(Swap(blocks=[2], ffn=Compact(rank=8))))
    second = convert(first, Recipe(Swap(blocks=[1], ffn=Compact(rank=8))))
    inherited = Pair(second, first, 1.0, 0.0).rate_factors(0.5)
    new = {name for name, _ in second.named_parameters()} - inherited.keys()
    assert new == {f"blocks.1.{name}" for name in NEW["compact"]}


def test_projections_that_a_swap_renames_are_inherited() -> None:
    teacher = torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=10)
    layer = "encoder.layers.encoder_layer_{}.self_attention.{}"
    for swap, new in (
        ("interactive", ("core.mix_queries", "core.mix_keys")),
        (
            "hallucinated",
            ("qkv.weight", "qkv.bias", "core.query_kernel", "core.key_kernel"),
        ),
    ):
        changed = Swap(attention=SWAPS[swap].attention)
        student = convert(teacher.eval(), Recipe(changed))
        inherited = Pair(student, teacher, 1.0, 0.0).rate_factors(0.5)
        found = {name for name, _ in student.named_parameters()} - inherited.keys()
        assert found == {layer.format(i, name) for i in (0, 1) for name in new}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_both_models_run_in_half_types_and_weights_stay_wide(precision: str) -> None:
    wide, teacher = pair(SWAPS["one"])
    half, _ = pair(SWAPS["one"])
    kind = torch.bfloat16 if precision == "bf16" else torch.float16
    expected = healed(wide, teacher, block_epochs=4, logit_epochs=4)
    seen: dict[nn.Module, list[torch.dtype]] = {half: [], teacher: []}
    hooks = [
        model.blocks[1].mlp.fc1.register_forward_hook(
            lambda _, __, output, model=model: seen[model].append(output.dtype)
        )
        for model in seen
    ]
    found = healed(half, teacher, block_epochs=4, logit_epochs=4, precision=precision)
    for hook in hooks:
        hook.remove()
    for types in seen.values():
        # What is measured before and after is measured in float32.
        assert set(types) == {kind, torch.float32}
        assert types[0] == types[-1] == torch.float32
        assert types.count(kind) >= 32
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    for ours, theirs in zip(found.stages, expected.stages, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=0.1)
        assert ours.losses != theirs.losses
    assert found.divergence[1] == pytest.approx(expected.divergence[1], rel=0.2)


def test_updates_too_wide_for_float16_are_counted() -> None:
    student, teacher = pair()
    student.head.weight.register_hook(lambda gradient: gradient * 1e34)
    found = healed(student, teacher, precision="fp16", block_epochs=0)
    overflows = found.stages[1].overflows
    assert overflows > 0
    assert f"{overflows} updates overflowed float16" in str(found)


@pytest.mark.parametrize("accumulation", [2, 3])
@pytest.mark.parametrize("scored", [True, False], ids=["scores", "features"])
def test_parts_of_a_batch_heal_like_the_batch(accumulation: int, scored: bool) -> None:
    changes = {} if scored else {"num_classes": 0}
    whole, teacher = pair(SWAPS["one"], **changes)
    parts, _ = pair(SWAPS["one"], **changes)
    models = [model.double() for model in (whole, parts, teacher)]
    # Images of very different sizes, and a last batch that divides by nothing.
    images = noise(35).double() * torch.linspace(0.1, 3, 35).view(-1, 1, 1, 1)
    options = QUICK | {"feature_weight": 0.5}
    expected = heal(models[0], teacher, images, **options)
    found = heal(models[1], teacher, images, accumulation=accumulation, **options)
    for ours, theirs in zip(found.stages, expected.stages, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-10)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], weight, rtol=0, atol=1e-8)


@pytest.mark.parametrize("stage", ["block", "logit"])
def test_the_average_is_that_of_the_last_stage(stage: str) -> None:
    student, teacher = pair(SWAPS["one"])
    epochs = {"block": {"logit_epochs": 0}, "logit": {}}[stage]
    seen: list[Tensor] = []
    name = "blocks.1.mlp.fc2.outer.weight"
    layer = student.get_submodule(name.removesuffix(".weight"))
    hook = layer.register_forward_pre_hook(
        lambda module, _: (
            seen.append(module.weight.detach().clone()) if module.training else None
        )
    )
    found = healed(student, teacher, ema_decay=0.8, **epochs)
    hook.remove()
    plain, _ = pair(SWAPS["one"])
    without = healed(plain, teacher, **epochs)
    # A step runs the layer once.
    steps = [*seen[-8:], plain.get_parameter(name).detach()]
    expected = steps[0]
    for done, weight in enumerate(steps[1:], start=1):
        share = min(0.8, done / (10 + done))
        expected = share * expected + (1 - share) * weight
    torch.testing.assert_close(student.get_parameter(name).detach(), expected)
    assert found.stages == without.stages
    # What is told of the end is told of the averaged weights.
    assert found.divergence[1] != without.divergence[1]
    sample = noise()[:64]
    assert Pair(student, teacher, 1.0, 0.0).measure(sample)["divergence"] == (
        pytest.approx(found.divergence[1])
    )


def test_clipping_can_be_left_out() -> None:
    student, teacher = pair(SWAPS["one"])
    cut, _ = pair(SWAPS["one"])
    free = healed(student, teacher, max_grad_norm=None)
    assert free.stages != healed(cut, teacher, max_grad_norm=1e-3).stages


@pytest.mark.parametrize("after", [3, 12, 20, 28])
def test_with_everything_on_healing_goes_on_bit_for_bit(
    tmp_path: Path, after: int
) -> None:
    swap = SWAPS["one"]
    straight, teacher = pair(swap)
    expected = healed(straight, teacher, **EVERYTHING)
    stopped, calls = pair(swap)[0], []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) == after + 12:
            raise Stopped

    options = EVERYTHING | {"run_dir": tmp_path / "run", "checkpoint_every": 3}
    handle = stopped.blocks[1].register_forward_hook(stop)
    with pytest.raises(Stopped):
        healed(stopped, teacher, **options)
    handle.remove()
    resumed, _ = pair(swap)
    found = healed(resumed, teacher, **options)
    assert moved(resumed, copy_of(straight)) == set()
    assert found.stages == expected.stages
    assert found.divergence == expected.divergence
    again, _ = pair(swap)
    assert healed(again, teacher, **options) == found
    assert moved(again, copy_of(straight)) == set()


def test_an_augmentation_heals_too_and_is_part_of_the_run(tmp_path: Path) -> None:
    augment = Augmentation(flip=0.5, crop_padding=2, mixup=0.8, erasing=0.25)
    student, teacher = pair(SWAPS["one"])
    found = healed(student, teacher, augment=augment, run_dir=tmp_path)
    plain, _ = pair(SWAPS["one"])
    assert found.stages != healed(plain, teacher).stages
    assert found.divergence[1] < found.divergence[0]
    again, _ = pair(SWAPS["one"])
    other = replace(augment, mixup=0.4)
    with pytest.raises(CheckpointError, match=r"'mixup': 0\.8"):
        healed(again, teacher, augment=other, run_dir=tmp_path)
    with pytest.raises(InvalidOption, match="it gives tensors"):
        healed(again, teacher, augment=Augmentation.deit())


def test_steps_and_epochs_are_logged(tmp_path: Path) -> None:
    student, teacher = pair(SWAPS["one"])
    rates = {"inherited_rate_factor": 0.1, "learning_rate": 1e-3, "warmup_epochs": 0}
    healed(student, teacher, run_dir=tmp_path, log_every=2, **rates)
    with (tmp_path / "steps.csv").open(newline="") as file:
        steps = list(csv.DictReader(file))
    assert [line["step"] for line in steps] == [str(2 * n) for n in range(1, 9)]
    assert [line["stage"] for line in steps] == ["blocks"] * 4 + ["logits"] * 4
    assert 5e-4 < float(steps[4]["learning_rate"]) <= 1e-3
    with (tmp_path / "epochs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_events_are_written_if_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    student, teacher = pair(SWAPS["one"])
    healed(student, teacher, run_dir=tmp_path, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"inherited_rate_factor": -0.5}, "inherited_rate_factor=-0.5"),
        ({"inherited_rate_factor": float("nan")}, "inherited_rate_factor=nan"),
        ({"precision": "fp8"}, "fp32, bf16, fp16"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"accumulation": 17}, "batch_size=17 or more"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"log_every": 0}, "log_every=0"),
        ({"tensorboard": True}, "run_dir"),
        (
            {"ema_decay": 0.9, "refit_images": 8, "block_epochs": 0, "logit_epochs": 0},
            "no weights to average",
        ),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_by_name(
    changes: dict[str, object], told: str
) -> None:
    student, teacher = pair(SWAPS["one"])
    before = copy_of(student)
    with pytest.raises(InvalidOption) as caught:
        healed(student, teacher, **changes)
    assert told in str(caught.value)
    assert moved(student, before) == set()


def test_another_factor_is_another_run(tmp_path: Path) -> None:
    student, teacher = pair(SWAPS["one"])
    healed(student, teacher, run_dir=tmp_path, inherited_rate_factor=0.5)
    again, _ = pair(SWAPS["one"])
    told = "inherited_rate_factor was 0.5 and is None"
    with pytest.raises(CheckpointError, match=told):
        healed(again, teacher, run_dir=tmp_path)
