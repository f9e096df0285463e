"""Last matrices solved for: the truth is lstsq on the stacked equations."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from manyheads import (
    Compact,
    Hallucinated,
    Hydra,
    Interactive,
    Recipe,
    Swap,
    convert,
    heal,
)
from manyheads.errors import InvalidOption, NonFiniteLoss
from manyheads.loop.probes import Recorder
from manyheads.pairing import Pair
from manyheads.refit import LeastSquares, refit
from tests.helpers import assert_close, tiny_vit

SWAPS = {
    "hydra": Swap(attention=Hydra()),
    "interactive": Swap(attention=Interactive(landmarks=(2, 2))),
    "hallucinated": Swap(attention=Hallucinated()),
    "compact": Swap(ffn=Compact(rank=4)),
    "branches": Swap(ffn=Compact(rank=4, branches=2)),
    "both": Swap(blocks=[1, 2], attention=Hydra(), ffn=Compact(rank=8)),
}
CALIBRATION = {"block_epochs": 0, "logit_epochs": 0, "progress": False}


def noise(count: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=32, mode="bilinear")


def pair(swap: Swap, **changes: object) -> tuple[nn.Module, nn.Module]:
    """A student and a teacher whose blocks do something."""
    torch.manual_seed(0)
    teacher = tiny_vit(**changes)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return convert(teacher, Recipe(swap)), teacher


def beside(student: nn.Module, teacher: nn.Module) -> Pair:
    return Pair(student, teacher, 1.0, 0.0)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    now = model.state_dict()
    return {name for name in before if not torch.equal(now[name], before[name])}


@pytest.mark.parametrize("bias", [True, False])
def test_the_solution_is_that_of_the_stacked_equations(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3, bias=bias).double()
    x, y = torch.randn(40, 6).double(), torch.randn(40, 3).double()
    sums = LeastSquares(layer)
    with torch.no_grad():
        for rows, wanted in zip(x.split(16), y.split(16), strict=True):
            sums.add(rows, wanted - layer(rows), wanted)
    held = layer.weight.detach().clone()
    # The ridge is one more equation a feature: stay where you are, with this weight.
    ridge = 1e-4 * x.square().sum(0).mean()
    ones, none = torch.ones(40, int(bias)), torch.zeros(6, int(bias))
    equations = torch.cat(
        [torch.cat([x, ones], 1), torch.cat([ridge.sqrt() * torch.eye(6), none], 1)]
    )
    wanted = torch.cat([y, ridge.sqrt() * held.t()])
    expected = torch.linalg.lstsq(equations, wanted).solution
    before, after = sums.solve()
    assert_close(layer.weight.detach(), expected[:6].t().contiguous(), slack=100)
    if bias:
        assert_close(layer.bias.detach(), expected[6], slack=100)
    left = (layer(x) - y).square().sum() / y.square().sum()
    assert after == pytest.approx(left.item(), rel=1e-9)
    assert after < before


def test_features_that_images_leave_out_keep_their_weights() -> None:
    layer = nn.Linear(3, 2).double()
    before = layer.weight.detach().clone()
    x = torch.randn(20, 3).double()
    x[:, 1] = 0
    sums = LeastSquares(layer)
    sums.add(x, torch.randn(20, 2).double(), torch.ones(20, 2).double())
    sums.solve()
    assert torch.equal(layer.weight[:, 1], before[:, 1])
    assert not torch.equal(layer.weight[:, 0], before[:, 0])


@pytest.mark.parametrize("name", SWAPS)
def test_no_error_grows_and_only_last_matrices_move(name: str) -> None:
    student, teacher = pair(SWAPS[name])
    before, taught = copy_of(student), copy_of(teacher)
    done = refit(beside(student, teacher), noise())
    assert all(0 <= one.after <= one.before for one in done)
    assert any(one.after < 0.95 * one.before for one in done)
    matrices = {"attn.proj"} if SWAPS[name].attention else set()
    ends = {"branches": "mlp.fc2.outer.plain", "compact": "mlp.fc2.outer"}
    matrices.add("mlp.fc2.outer" if name == "both" else ends.get(name, "mlp.fc2"))
    blocks = SWAPS[name].blocks or (0, 1, 2)
    assert moved(student, before) == {
        f"blocks.{block}.{matrix}.{part}"
        for block in blocks
        for matrix in matrices
        for part in ("weight", "bias")
    }
    assert moved(teacher, taught) == set()


def test_the_last_matrix_is_the_best_for_what_the_block_is_to_give() -> None:
    """The oracle: lstsq over all tokens at once, from the student's own input."""
    student, teacher = pair(Swap(blocks=[1], attention=Hydra()))
    refit(beside(student, teacher), noise())
    path, images = "blocks.1.mlp.fc2", noise()
    with torch.no_grad(), Recorder(teacher, ["blocks.1"]) as taught:
        teacher(images)
    with torch.no_grad(), Recorder(student, ["blocks.1", path]) as learned:
        student(images)
    found, wanted = learned["blocks.1"].output, taught["blocks.1"].output
    hidden = learned[path].args[0].flatten(0, 1).double()
    hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1)
    missing = (wanted - found).flatten(0, 1).double()
    change = torch.linalg.lstsq(hidden, missing, driver="gelsd").solution
    left = (missing - hidden @ change).square().sum()
    # What the ridge leaves on the table, and no more.
    assert missing.square().sum() < 1.01 * left


def test_layer_scale_is_divided_out() -> None:
    swap = Swap(blocks=[1], attention=Hydra())
    student, teacher = pair(swap, init_values=0.1)
    with torch.no_grad():
        for model in (student, teacher):
            for block in model.blocks:
                block.ls2.gamma.copy_(torch.linspace(0.05, 2, 48))
    done = refit(beside(student, teacher), noise())
    assert done[-1].path == "blocks.1.mlp.fc2"
    images = noise()
    with torch.no_grad(), Recorder(teacher, ["blocks.1"]) as taught:
        teacher(images)
    with torch.no_grad(), Recorder(student, ["blocks.1"]) as learned:
        student(images)
    wanted = taught["blocks.1"].output.double()
    error = (learned["blocks.1"].output - wanted).square().sum() / wanted.square().sum()
    assert error.item() < done[-1].before


def test_the_same_images_always_give_the_same_weights() -> None:
    students = []
    for size in (32, 32):
        student, teacher = pair(SWAPS["hydra"])
        refit(beside(student, teacher), noise(), batch_size=size)
        students.append(copy_of(student))
    assert all(torch.equal(students[0][n], students[1][n]) for n in students[0])


def test_an_unmoved_student_is_left_as_it_is() -> None:
    """Where nothing is lacking, nothing changes: the ridge pulls to what is there."""
    student, teacher = pair(Swap(blocks=[2], ffn=Compact(rank=48)))
    before = copy_of(student)
    refit(beside(student, teacher), noise())
    for name, tensor in student.state_dict().items():
        assert_close(tensor, before[name], slack=20)


def test_calibration_is_healing_without_epochs() -> None:
    student, teacher = pair(SWAPS["hydra"])
    other, _ = pair(SWAPS["hydra"])
    healed = heal(student, teacher, noise(), refit_images=96, **CALIBRATION)
    refit(beside(other, teacher), noise())
    assert moved(student, copy_of(other)) == set()
    assert healed.divergence is not None
    assert healed.divergence[1] < healed.divergence[0]
    assert [one.path for one in healed.refits] == [
        f"blocks.{n}.{part}" for n in range(3) for part in ("attn.proj", "mlp.fc2")
    ]
    assert all(stage.steps == 0 for stage in healed.stages)
    assert "6 refits over 96 images" in str(healed)


@pytest.mark.parametrize("name", ["hydra", "both"])
def test_before_training_only_what_was_swapped_is_solved_for(name: str) -> None:
    student, teacher = pair(SWAPS[name])
    short = {"block_epochs": 0, "logit_epochs": 1, "batch_size": 48, "progress": False}
    short |= {"refit_images": 96}
    healed = heal(student, teacher, noise(), **short)
    found = {one.path.split(".", 2)[2] for one in healed.refits}
    assert found == {"attn.proj"} | ({"mlp.fc2"} if name == "both" else set())
    again, _ = pair(SWAPS[name])
    healed = heal(again, teacher, noise(), refit_unswapped=True, **short)
    assert {one.path.split(".", 2)[2] for one in healed.refits} == {
        "attn.proj",
        "mlp.fc2",
    }


def test_calibration_in_a_folder_is_done_once(tmp_path: Path) -> None:
    options = CALIBRATION | {"run_dir": tmp_path / "run", "refit_images": 32}
    student, teacher = pair(SWAPS["compact"])
    first = heal(student, teacher, noise(), **options)
    again, _ = pair(SWAPS["compact"])
    assert heal(again, teacher, noise(), **options) == first
    assert moved(again, copy_of(student)) == set()


def test_nothing_to_do_is_refused() -> None:
    student, teacher = pair(SWAPS["hydra"])
    with pytest.raises(InvalidOption, match="refit_images=0"):
        heal(student, teacher, noise(), refit_images=0, **CALIBRATION)
    with pytest.raises(InvalidOption, match="refit_images=-1"):
        heal(student, teacher, noise(), refit_images=-1)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_broken_block_changes_nothing_and_is_named(whose: str) -> None:
    student, teacher = pair(SWAPS["hydra"])
    broken = {"student": student, "teacher": teacher}[whose]
    broken.blocks[1].mlp.fc1.bias.data[0] = torch.nan
    before = copy_of(student)
    with pytest.raises(NonFiniteLoss) as caught:
        refit(beside(student, teacher), noise())
    assert str(caught.value.where).startswith("blocks.1.")
    now = student.state_dict()
    for name in before:
        torch.testing.assert_close(now[name], before[name], equal_nan=True)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [2, 24])
def test_a_run_goes_on_bit_for_bit_before_and_after_the_refit(
    tmp_path: Path, after: int
) -> None:
    options = {"block_epochs": 1, "logit_epochs": 2, "batch_size": 16}
    options |= {"progress": False, "refit_images": 32}
    straight, teacher = pair(SWAPS["hydra"])
    expected = heal(straight, teacher, noise(), **options)
    options |= {"run_dir": tmp_path / "run", "checkpoint_every": 2}
    stopped, calls = pair(SWAPS["hydra"])[0], []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) == after:
            raise Stopped

    handle = stopped.blocks[0].register_forward_hook(stop)
    with pytest.raises(Stopped):
        heal(stopped, teacher, noise(), **options)
    handle.remove()
    resumed, _ = pair(SWAPS["hydra"])
    found = heal(resumed, teacher, noise(), **options)
    assert moved(resumed, copy_of(straight)) == set()
    assert found.refits == expected.refits
    assert found.stages == expected.stages


HOSTED = {
    "torchvision": lambda: __import__("torchvision").models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=24,
        mlp_dim=48,
        num_classes=5,
    ),
    "timm-pyramid": lambda: timm.create_model("pvt_v2_b0", num_classes=5),
}


@pytest.mark.parametrize("name", HOSTED)
def test_other_libraries_are_refitted_too(name: str) -> None:
    torch.manual_seed(0)
    teacher = HOSTED[name]().eval()
    student = convert(teacher, Recipe(Swap(blocks=[1], attention=Hydra())))
    done = refit(beside(student, teacher), noise(24))
    assert done
    assert all(0 <= one.after <= one.before for one in done)


def test_transformers_models_are_refitted_too() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    teacher = transformers.ViTForImageClassification(config).eval()
    student = convert(teacher, Recipe(Swap(attention=Hydra())))
    done = refit(beside(student, teacher), noise(24))
    assert len(done) == 4
    # Version 4 and version 5 of the library name the projection differently.
    assert done[0].path.endswith(("attention.output.dense", "attention.o_proj"))
    assert all(0 <= one.after <= one.before for one in done)
