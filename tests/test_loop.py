"""Runs that stop, go on, break, and say so; with real processes and real signals."""

from __future__ import annotations

import inspect
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyheads as mh
from manyheads.errors import (
    CheckpointError,
    InvalidOption,
    MissingExtra,
    NonFiniteLoss,
)
from manyheads.loop.journal import Journal
from manyheads.training import Trained, train
from tests.helpers import tiny_vit

CONFIG = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3, "progress": False}


def images(count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 10
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    return noise + labels.view(-1, 1, 1, 1) / 5, labels


def model() -> nn.Module:
    torch.manual_seed(0)
    # Dropout, so that a resumed run must find the same random numbers again.
    return tiny_vit(proj_drop_rate=0.1, drop_path_rate=0.1)


def run(student: nn.Module, run_dir: Path | None = None, **changes: object) -> Trained:
    return train(student, images(), run_dir=run_dir, **(CONFIG | changes))


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


PROGRAM = """
import sys
from pathlib import Path
from tests.test_loop import model, run
run(model(), Path(sys.argv[1]), epochs=12, checkpoint_every=3)
"""


def start(run_dir: Path) -> subprocess.Popen[bytes]:
    """Start a run in its own process and wait until it has kept a step."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run_dir)], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(run_dir.glob("step-*")):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_whose_process_dies_goes_on_as_if_it_had_not(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path / "run")
    process.send_signal(number)
    errors = process.communicate()[1].decode()
    kept = [int(p.name[5:].split(".")[0]) for p in (tmp_path / "run").glob("step-*")]
    assert 1 <= len(kept) <= 2
    assert all(3 <= step < 60 for step in kept)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert not errors
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
    resumed, straight = model(), model()
    changes = {"epochs": 12}
    found = run(resumed, tmp_path / "run", checkpoint_every=3, **changes)
    expected = run(straight, **changes)
    assert_same(resumed, straight)
    assert found.losses == expected.losses
    assert found.steps == expected.steps == 60


def test_a_run_is_the_same_with_and_without_a_folder(tmp_path: Path) -> None:
    plain, kept = model(), model()
    assert run(plain).losses == run(kept, tmp_path / "run", checkpoint_every=1).losses
    assert_same(plain, kept)


def test_another_seed_is_another_run() -> None:
    assert run(model()).losses != run(model(), seed=1).losses


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    trained, again = model(), model()
    first = run(trained, tmp_path / "run")
    clock = time.monotonic()
    second = run(again, tmp_path / "run")
    assert time.monotonic() - clock < first.seconds + 1
    assert second == first
    assert_same(trained, again)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"learning_rate": 2e-3}, ["learning_rate was 0.001 and is 0.002"]),
        ({"seed": 5, "batch_size": 4}, ["seed was 0 and is 5", "batch_size was 8"]),
    ],
)
def test_a_folder_of_another_run_is_refused_by_what_differs(
    tmp_path: Path, changes: dict[str, object], names: list[str]
) -> None:
    run(model(), tmp_path / "run", epochs=1)
    with pytest.raises(CheckpointError) as caught:
        run(model(), tmp_path / "run", epochs=1, **changes)
    for name in names:
        assert name in str(caught.value)
    assert "epochs" not in str(caught.value)


def test_other_images_or_another_model_are_another_run(tmp_path: Path) -> None:
    run(model(), tmp_path / "run")
    with pytest.raises(CheckpointError, match="images was"):
        train(model(), images(32), run_dir=tmp_path / "run", **CONFIG)
    with pytest.raises(CheckpointError, match="model was"):
        run(tiny_vit(depth=2), tmp_path / "run")


def test_half_written_steps_are_removed_and_never_read(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    straight, resumed = model(), model()
    run(straight, folder)
    draft = folder / ".writing-999"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    run(resumed, folder)
    assert not draft.exists()
    assert_same(straight, resumed)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "sums.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "altered"])
def test_a_damaged_step_is_refused_with_what_to_remove(
    tmp_path: Path, name: str, damage: str
) -> None:
    run(model(), tmp_path / "run", epochs=1)
    older, step = sorted((tmp_path / "run").glob("step-*"))
    shutil.rmtree(older)
    content = bytearray((step / name).read_bytes())
    (step / name).unlink()
    if damage == "cut":
        (step / name).write_bytes(content[: len(content) // 2])
    if damage == "altered":
        content[-3] ^= 1
        (step / name).write_bytes(content)
    student = model()
    with pytest.raises(CheckpointError, match="cut short or altered") as caught:
        run(student, tmp_path / "run", epochs=1)
    assert str(step) in caught.value.fix
    assert_same(student, model())


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "sums.json"])
def test_a_damaged_step_gives_way_to_the_one_before_with_a_warning(
    tmp_path: Path, name: str
) -> None:
    straight, resumed = model(), model()
    run(straight, tmp_path / "run", checkpoint_every=4)
    older, newer = sorted((tmp_path / "run").glob("step-*"))
    content = (newer / name).read_bytes()
    (newer / name).write_bytes(content[: len(content) // 2])
    with pytest.warns(RuntimeWarning, match=f"{newer.name} is cut short") as caught:
        run(resumed, tmp_path / "run", checkpoint_every=4)
    assert f"goes on from {older.name}" in str(caught[0].message)
    assert_same(straight, resumed)


def test_the_last_two_steps_are_kept(tmp_path: Path) -> None:
    run(model(), tmp_path / "run", checkpoint_every=1)
    kept = sorted(p.name for p in (tmp_path / "run").glob("step-*"))
    assert kept == ["step-15.0", "step-15.1"]
    journal, student = Journal(tmp_path / "other", {}), model()
    for step in (1, 2, 3, 4):
        journal.write({"model": student}, step, {"step": step})
    kept = sorted(p.name for p in (tmp_path / "other").glob("step-*"))
    assert kept == ["step-3.0", "step-4.0"]
    journal.close()


def test_sigterm_while_validating_does_not_wait_for_its_end(tmp_path: Path) -> None:
    student, straight, looks = model(), model(), 0

    def stop(module: nn.Module, _: object) -> None:
        nonlocal looks
        looks += not module.training
        # Two looks of one image at the sources come first; then it is the third batch.
        if looks == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    held_out = {"validation": images(40), "checkpoint_every": 1000}
    hook = student.register_forward_pre_hook(stop)
    with pytest.raises(SystemExit) as caught:
        run(student, tmp_path / "run", **held_out)
    hook.remove()
    assert caught.value.code == 128 + signal.SIGTERM
    assert looks == 5
    assert [p.name for p in (tmp_path / "run").glob("step-*")] == ["step-5.0"]
    found = run(student, tmp_path / "run", **held_out)
    expected = run(straight, **held_out)
    assert_same(student, straight)
    assert found.history == expected.history


def test_a_folder_that_is_no_run_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no run"):
        run(model(), tmp_path)
    with pytest.raises(CheckpointError, match="it is a file"):
        run(model(), tmp_path / "thesis.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("card", ["[]", "{", '{"format": "other", "version": 1}'])
def test_a_foreign_card_is_refused(tmp_path: Path, card: str) -> None:
    (tmp_path / "run.json").write_text(card)
    with pytest.raises(CheckpointError, match=r"manyheads\.run"):
        run(model(), tmp_path)


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    first = Journal(tmp_path / "run", {})
    with pytest.raises(CheckpointError, match="another process"):
        Journal(tmp_path / "run", {})
    first.close()
    Journal(tmp_path / "run", {}).close()


def test_no_space_left_keeps_the_step_before(tmp_path: Path) -> None:
    journal, student = Journal(tmp_path / "run", {}), model()
    journal.write({"model": student}, 1, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            journal.write({"model": student}, 2, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / "run").glob("step-*")] == ["step-1.0"]
    assert not list((tmp_path / "run").glob(".writing*"))
    assert journal.read({"model": student}) == {"step": 1}
    journal.close()


def test_a_state_file_can_hold_data_only(tmp_path: Path) -> None:
    journal, student = Journal(tmp_path / "run", {}), model()
    journal.write({"model": student}, 1, {"harm": Harm()})
    with pytest.raises(CheckpointError, match="altered"):
        journal.read({"model": student})
    assert not (tmp_path / "harm").exists()
    journal.close()


class Harm:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (exec, ("raise SystemExit('ran')",))


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_good_weights() -> None:
    student = model()
    with pytest.raises(NonFiniteLoss) as caught:
        run(student, learning_rate=1e30, warmup_epochs=0)
    assert "stage 'train', step" in caught.value.asked
    assert "of 15" in caught.value.asked
    assert "last weights whose loss was finite" in caught.value.fix
    assert all(p.isfinite().all() for p in student.state_dict().values())
    assert student(images()[0][:2]).isfinite().all()


def test_an_update_that_overflows_is_taken_back() -> None:
    student = model()
    student.head.weight.data *= 5_000
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(NonFiniteLoss, match="the update") as caught:
        train(
            student,
            images(8),
            **CONFIG | {"epochs": 1, "learning_rate": 3e37, "weight_decay": 1.0},
        )
    assert "." in caught.value.where
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_a_weight_that_is_not_finite_is_found_by_block() -> None:
    student = model()
    student.blocks[1].mlp.fc2.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteLoss) as caught:
        run(student)
    assert caught.value.where == "blocks.1 (block 1)"
    assert "step 1 of 15" in caught.value.asked


def test_flags_modes_and_random_numbers_outside_are_left_alone() -> None:
    student = model().eval()
    student.blocks[0].requires_grad_(False)
    student.blocks[1].train()
    flags = [p.requires_grad for p in student.parameters()]
    modes = [m.training for m in student.modules()]
    before, weights = torch.get_rng_state(), model().state_dict()
    run(student)
    assert flags == [p.requires_grad for p in student.parameters()]
    assert modes == [m.training for m in student.modules()]
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in student.parameters())
    still = [n for n, p in student.named_parameters() if torch.equal(p, weights[n])]
    assert still == []


def test_handlers_of_signals_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    run(model(), tmp_path / "run", epochs=1)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_progress_goes_to_the_error_stream_and_can_be_silent(
    capfd: pytest.CaptureFixture[str],
) -> None:
    run(model())
    assert capfd.readouterr() == ("", "")
    run(model(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "15/15" in err
    assert "images/s" in err


def test_the_rate_rises_and_falls_to_nothing() -> None:
    slow = run(model(), epochs=1, warmup_epochs=1)
    assert slow.steps == 5


def test_without_accelerate_the_install_line_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra) as caught:
        run(model())
    assert caught.value.fix == 'pip install "manyheads[train]"'


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("epochs", 0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("checkpoint_every", 0),
        ("weight_decay", -0.1),
        ("warmup_epochs", -1.0),
        ("warmup_epochs", 50),
        ("num_workers", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidOption, match=f"{name}="):
        run(model(), **{name: value})


@pytest.mark.parametrize("value", ["deit", "none", None])
@pytest.mark.parametrize("verb", [mh.train, mh.heal])
def test_the_name_of_an_augmentation_is_none(
    verb: Callable[..., Any], value: object
) -> None:
    """Only the terminal reads names; in Python one would have stood for True."""
    models = (model(),) if verb is mh.train else (model(), model())
    options = {"epochs": 1} if verb is mh.train else {}
    # Without the check of annotations that tests have and users do not.
    bare = inspect.unwrap(verb)
    with pytest.raises(InvalidOption, match="augment="):
        bare(*models, images(), augment=value, **options)


def test_the_configuration_of_a_run_can_be_read(tmp_path: Path) -> None:
    run(model(), tmp_path / "run", epochs=1)
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert card["config"]["learning_rate"] == 1e-3
    assert card["config"]["verb"] == "train"
