"""What train can be told: precision, parts, averages, layers, a teacher, logs."""

from __future__ import annotations

import csv
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import Augmentation
from manyheads.errors import DataError, InvalidOption, MissingExtra, NonFiniteLoss
from manyheads.loop.averaging import Average
from manyheads.loop.rates import optimizer_and_schedule
from manyheads.loop.stages import RunOptions, Stage
from manyheads.training import DEIT, DEIT_MODEL, Trained, evaluate, train
from tests.helpers import tiny_vit
from tests.shared_runs import Pictures

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "progress": False}


def images(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 10
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    return noise + labels.view(-1, 1, 1, 1) / 5, labels


def model(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit(depth=2, **changes)


def run(student: nn.Module, **changes: object) -> Trained:
    return train(student, images(), **(QUICK | changes))


def weights(student: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in student.state_dict().items()}


@pytest.mark.parametrize("accumulation", [2, 3, 8])
def test_parts_of_a_batch_do_what_the_batch_does(accumulation: int) -> None:
    whole, parts = model().double(), model().double()
    expected = run(whole).losses
    found = run(parts, accumulation=accumulation).losses
    assert found == pytest.approx(expected, rel=1e-12)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_types_learn_like_float32_and_leave_weights_wide(precision: str) -> None:
    wide, half = model(), model()
    seen = set()
    hook = half.blocks[0].attn.qkv.register_forward_hook(
        lambda module, _, output: seen.add(output.dtype) if module.training else None
    )
    expected, found = run(wide, epochs=4), run(half, epochs=4, precision=precision)
    hook.remove()
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert found.losses == pytest.approx(expected.losses, rel=0.02)
    assert found.losses != expected.losses
    assert evaluate(half, images(), precision=precision, progress=False).images == 24


def test_float16_leaves_overflows_out_and_counts_them() -> None:
    student = model()
    # A gradient beyond 65504 at the first scale of 65536, and not at smaller ones.
    student.head.weight.register_hook(lambda gradient: gradient * 1e34)
    trained = run(student, precision="fp16", epochs=1)
    assert trained.overflows > 0
    assert f"{trained.overflows} updates overflowed" in str(trained)
    assert all(p.isfinite().all() for p in student.parameters())


def test_a_gradient_that_no_scale_saves_is_an_error() -> None:
    student = model()
    student.head.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteLoss, match="the gradient is"):
        run(student, precision="fp16", epochs=8)


def test_the_average_is_that_of_the_formula_and_the_model_ends_with_it() -> None:
    student, decay = model(), 0.9
    seen: list[Tensor] = []
    hook = student.register_forward_pre_hook(
        lambda module, _: (
            seen.append(module.head.weight.detach().clone())
            if module.training
            else None
        )
    )
    trained = run(student, ema_decay=decay, validation=images(8))
    hook.remove()
    plain = model()
    without = run(plain, validation=images(8))
    expected = seen[0]
    for done, weight in enumerate([*seen[1:], plain.head.weight.detach()], start=1):
        share = min(decay, done / (10 + done))
        expected = share * expected + (1 - share) * weight
    torch.testing.assert_close(student.head.weight.detach(), expected)
    for ours, theirs in zip(trained.history, without.history, strict=True):
        assert ours["loss"] == theirs["loss"]
        assert ours["average_loss"] != ours["loss"]
    assert trained.validation.loss == pytest.approx(trained.history[-1]["average_loss"])


def test_the_average_of_half_weights_is_wide() -> None:
    average = Average(model().bfloat16(), 0.99)
    assert average.module.head.weight.dtype == torch.float32


def test_layers_learn_slower_the_deeper_they_lie() -> None:
    student = model()
    before = weights(student)
    # One step of Adam moves every weight by its rate.
    options = {"epochs": 1, "batch_size": 24, "weight_decay": 0.0, "warmup_epochs": 0}
    run(student, layer_decay=0.5, learning_rate=1e-3, **options)
    moved = {
        name: (weight - before[name]).abs().median().item()
        for name, weight in student.state_dict().items()
    }
    head = moved["head.weight"]
    assert head == pytest.approx(1e-3, rel=0.01)
    assert moved["blocks.1.mlp.fc1.weight"] == pytest.approx(head / 2, rel=0.01)
    assert moved["blocks.0.mlp.fc1.weight"] == pytest.approx(head / 4, rel=0.01)
    assert moved["patch_embed.proj.weight"] == pytest.approx(head / 8, rel=0.01)


@pytest.mark.parametrize("library", ["torchvision", "transformers"])
def test_layers_of_other_libraries_are_known_by_their_host(library: str) -> None:
    if library == "torchvision":
        student = torchvision.models.VisionTransformer(
            32, 8, 3, 4, 48, 96, num_classes=10
        )
        stem, block = "conv_proj.weight", "encoder.layers.encoder_layer_{}.mlp.0.weight"
    else:
        config = transformers.ViTConfig(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=32,
            patch_size=8,
            num_labels=10,
        )
        student = transformers.ViTForImageClassification(config)
        stem = "vit.embeddings.patch_embeddings.projection.weight"
        old = transformers.__version__.startswith("4.")
        block = "vit.layers.{}.mlp.fc1.weight"
        if old:
            block = "vit.encoder.layer.{}.intermediate.dense.weight"
    task = Stage(
        name="any",
        epochs=1,
        learning_rate=1.0,
        weight_decay=0.1,
        warmup_epochs=0,
        trains=("",),
        loss=lambda _: {},
        blame=lambda _: "",
        augment=False,
    )
    options = RunOptions(
        batch_size=8,
        seed=0,
        run_dir=None,
        progress=False,
        num_workers=0,
        checkpoint_every=1,
        max_grad_norm=1.0,
        layer_decay=0.5,
    )
    optimizer, _ = optimizer_and_schedule(student, task, options, per_epoch=10)
    scales = {
        id(p): group["lr_scale"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    found = {name: scales[id(p)] for name, p in student.named_parameters()}
    assert [found[block.format(i)] for i in range(3)] == [0.125, 0.25, 0.5]
    assert found[stem] == 0.0625
    assert {v for n, v in found.items() if "class" in n and "token" not in n} <= {1.0}
    assert list(found.values())[-1] == 1.0
    assert not hasattr(student, "group_matcher")


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_teacher_s_part_of_the_loss_is_that_of_the_formula(kind: str) -> None:
    student, teacher = model(), model(embed_dim=24)
    student.head.weight.data *= 20
    pixels, labels = images(8)
    with torch.no_grad():
        ours, theirs = student(pixels), teacher(pixels)
    if kind == "hard":
        taught = F.cross_entropy(ours, theirs.argmax(1))
    else:
        p, q = (theirs / 2).softmax(1), (ours / 2).softmax(1)
        taught = 4 * (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.7 * F.cross_entropy(ours, labels) + 0.3 * taught
    before, modes = weights(teacher), [m.training for m in teacher.modules()]
    found = train(
        student,
        (pixels, labels),
        teacher=teacher,
        distillation=kind,
        distillation_weight=0.3,
        temperature=2.0,
        **QUICK | {"epochs": 1},
    )
    assert found.losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert modes == [m.training for m in teacher.modules()]
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_need_not_be_a_model_that_can_be_converted() -> None:
    teacher = timm.create_model("resnet10t", num_classes=10, pretrained=False)
    taught = run(model(), teacher=teacher, epochs=1)
    assert taught.losses != run(model(), epochs=1).losses


def test_a_teacher_that_does_not_fit_is_refused_before_anything_moves() -> None:
    student = model()
    before = weights(student)
    normalised = model()
    normalised.pretrained_cfg = {**normalised.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    for teacher, found in (
        (model(num_classes=7), r"\[10\] and the teacher \[7\]"),
        (model(img_size=64), "refuses an image"),
        (normalised, "normalised otherwise"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), r"the teacher \[3\]"),
    ):
        with pytest.raises(DataError, match=found):
            run(student, teacher=teacher)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_and_stays_itself() -> None:
    plain, compiled = model().double(), model().double()
    keys = list(compiled.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(compiled, compile=True, validation=images(8))
    expected = run(plain, validation=images(8))
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert list(compiled.state_dict()) == keys
    assert type(compiled) is type(plain)


def test_logs_say_what_happened_at_which_step(tmp_path: Path) -> None:
    trained = run(
        model(), run_dir=tmp_path, validation=images(8), log_every=2, ema_decay=0.9
    )
    with (tmp_path / "steps.csv").open(newline="") as file:
        steps = list(csv.DictReader(file))
    assert [line["step"] for line in steps] == ["2", "4", "6"]
    assert [float(line["epoch"]) for line in steps] == pytest.approx([2 / 3, 4 / 3, 2])
    assert all(float(line["loss"]) > 0 for line in steps)
    assert float(steps[-1]["learning_rate"]) < float(steps[1]["learning_rate"])
    with (tmp_path / "epochs.csv").open(newline="") as file:
        epochs = list(csv.DictReader(file))
    assert [float(line["loss"]) for line in epochs] == list(trained.losses)
    for line, measured in zip(epochs, trained.history, strict=True):
        assert float(line["validation_top1"]) == measured["top1"]
        assert float(line["validation_average_loss"]) == measured["average_loss"]


def test_the_progress_bar_shows_loss_accuracy_and_speed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    run(model(), progress=True)
    shown = capfd.readouterr().err
    assert "loss " in shown
    assert "top-1 " in shown
    assert "images/s" in shown
    assert "0:00" in shown
    run(model(), progress=True, validation=images(8))
    assert "validation " in capfd.readouterr().err


def test_tensorboard_gets_every_step_once_even_after_a_stop(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )

    class Enough(Exception):
        pass

    student, seen = model(), 0

    def stop(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 5:
            raise Enough

    options = {"log_every": 1, "checkpoint_every": 2, "tensorboard": True}
    hook = student.patch_embed.register_forward_hook(stop)
    with pytest.raises(Enough):
        run(student, run_dir=tmp_path, **options)
    hook.remove()
    run(model(), run_dir=tmp_path, **options)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("steps/loss")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(events.Scalars("epochs/loss")) == 2


def test_without_tensorboard_the_install_line_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra) as caught:
        run(model(), tensorboard=True, run_dir=tmp_path)
    assert caught.value.fix == 'pip install "manyheads[tensorboard]"'


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"precision": "fp8"}, "fp32, bf16, fp16"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"layer_decay": 0.0}, "layer_decay=0.0"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"accumulation": 9}, "batch_size=9 or more"),
        ({"log_every": 0}, "log_every=0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"distillation": "sof"}, "Did you mean 'soft'"),
        ({"distillation_weight": 1.5}, "distillation_weight=1.5"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"tensorboard": True}, "run_dir"),
        ({"sharded": True}, "there is one process"),
        ({"sharded": True, "compile": True}, "compile=True"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(
    changes: dict[str, object], told: str
) -> None:
    with pytest.raises(InvalidOption) as caught:
        run(model(), **changes)
    assert told in str(caught.value)


def test_clipping_can_be_left_out() -> None:
    assert run(model(), max_grad_norm=None).losses != run(model()).losses


def test_the_deit_recipe_is_what_train_takes() -> None:
    student = model(**DEIT_MODEL)
    shorter = dict(DEIT) | {"epochs": 5, "batch_size": 8, "progress": False}
    trained = train(student, Pictures(set()), **shorter)
    assert trained.steps == 20
    # Mixed and smoothed labels cost more than the class alone can.
    assert trained.losses[0] > 1.5


def test_augmentation_that_needs_pictures_is_refused_on_tensors() -> None:
    with pytest.raises(InvalidOption, match="it gives tensors"):
        run(model(), augment=Augmentation.deit())


def test_softened_labels_are_the_targets_of_the_loss() -> None:
    student, (pixels, labels) = model(), images(8)
    with torch.no_grad():
        expected = F.cross_entropy(student(pixels), labels, label_smoothing=0.4)
    smooth = Augmentation(label_smoothing=0.4)
    options = QUICK | {"epochs": 1, "augment": smooth}
    found = train(student, (pixels, labels), accumulation=2, **options)
    assert found.losses[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_would_run_alone_are_told_so(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(InvalidOption, match="torchrun"):
        run(model())


def test_a_single_process_where_several_were_promised_is_an_error_or_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.warns(RuntimeWarning, match="torchrun --nproc-per-node 2"):
        run(model(), epochs=1)
