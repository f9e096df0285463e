"""save and load: data only, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

import manyheads as mh
from manyheads.errors import CheckpointError
from tests.helpers import tiny_vit

RECIPE = mh.Recipe(
    mh.Swap(blocks=[1, 2], attention=mh.Hydra(kernel="aft")), mh.Swap(ffn=mh.Compact())
)


@pytest.fixture
def student() -> torch.nn.Module:
    return mh.convert(tiny_vit(), RECIPE)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.ones(1, 3, 32, 32))


def _edit(folder: Path, **changes: object) -> None:
    card = json.loads((folder / "manyheads.json").read_text())
    (folder / "manyheads.json").write_text(json.dumps(card | changes))


def test_the_folder_holds_json_and_safetensors_only(
    student: torch.nn.Module, tmp_path: Path
) -> None:
    folder = mh.save(student, tmp_path / "deep" / "student")
    assert sorted(p.name for p in folder.iterdir()) == [
        "manyheads.json",
        "model.safetensors",
    ]
    card = json.loads((folder / "manyheads.json").read_text())
    assert card["format"] == "manyheads.checkpoint"
    assert card["version"] == 1
    assert card["host"] == "timm"
    assert card["model"]["architecture"].startswith("vit_tiny_patch16_224")
    assert mh.Recipe.from_dict(card["recipe"])
    assert os.listdir(tmp_path / "deep") == ["student"]


def test_an_unconverted_model_is_saved_too(tmp_path: Path) -> None:
    model = tiny_vit()
    assert torch.equal(_logits(mh.load(mh.save(model, tmp_path / "m"))), _logits(model))


def test_a_resized_model_in_half_precision_comes_back_as_it_was(tmp_path: Path) -> None:
    model = tiny_vit()
    model.set_input_size(img_size=(40, 64))
    model.reset_classifier(3)
    student = mh.convert(model, RECIPE).bfloat16()
    again = mh.load(mh.save(student, tmp_path / "m"))
    image = torch.ones(1, 3, 40, 64, dtype=torch.bfloat16)
    assert torch.equal(again(image), student(image))
    assert again(image).shape == (1, 3)


def test_a_checkpoint_is_replaced_and_nothing_else_ever_is(
    student: torch.nn.Module, tmp_path: Path
) -> None:
    mh.save(tiny_vit(), tmp_path / "m")
    mh.save(student, tmp_path / "m")
    assert torch.equal(_logits(mh.load(tmp_path / "m")), _logits(student))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    with pytest.raises(CheckpointError, match="mine"):
        mh.save(student, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "three years"


def test_loading_does_not_disturb_the_random_state(
    student: torch.nn.Module, tmp_path: Path
) -> None:
    mh.save(student, tmp_path / "m")
    state = torch.get_rng_state()
    mh.load(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), state)


def test_buffers_outside_the_state_dict_come_back(tmp_path: Path) -> None:
    model = timm.create_model("mobilevit_xxs", num_classes=3).eval()
    image = torch.ones(1, 3, 64, 64)
    again = mh.load(mh.save(model, tmp_path / "m"))
    assert torch.equal(again(image), model(image))
    assert not any(b.device.type == "meta" for b in again.buffers())


def test_a_model_built_by_hand_is_refused_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=4
    )
    with pytest.raises(CheckpointError, match=r"timm\.create_model"):
        mh.save(model, tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_a_model_changed_after_it_was_built_is_refused(tmp_path: Path) -> None:
    model = tiny_vit()
    model.head = torch.nn.Linear(48, 99)
    model.extra = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointError):
        mh.save(model, tmp_path / "m")
    assert os.listdir(tmp_path) == []


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "cut short"),
    "altered": (_flip, "altered"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "missing"),
    "no card": (lambda f: (f / "manyheads.json").unlink(), "cannot be read"),
    "not JSON": (lambda f: (f / "manyheads.json").write_text("{"), "cannot be read"),
    "foreign": (
        lambda f: (f / "manyheads.json").write_text("{}"),
        "manyheads.checkpoi",
    ),
    "newer": (lambda f: _edit(f, version=2), "version 2, this reads 1"),
    "odd field": (lambda f: _edit(f, hook="os.system"), "hook"),
    "library": (lambda f: _edit(f, host="elsewhere"), "'elsewhere'"),
    "type": (lambda f: _edit(f, dtype="object"), "'object'"),
    "buffer": (lambda f: _edit(f, buffers={"bias": "float16"}), "unknown buffer"),
    "buffers": (lambda f: _edit(f, buffers=[]), "wrong or missing fields"),
    "recipe": (lambda f: _edit(f, recipe={"version": 1}), "do not fit"),
    "other model": (
        lambda f: _edit(
            f, model={"architecture": "vit_tiny_patch16_224", "arguments": {}}
        ),
        "do not fit",
    ),
    "unknown model": (
        lambda f: _edit(f, model={"architecture": "vit_tini", "arguments": {}}),
        "registers no such model",
    ),
    "address": (
        lambda f: _edit(f, model={"architecture": "hf-hub:x/y", "arguments": {}}),
        "registers no such model",
    ),
    "file argument": (
        lambda f: _edit(
            f,
            model={
                "architecture": "vit_tiny_patch16_224",
                "arguments": {"checkpoint_path": "/etc/passwd"},
            },
        ),
        "'checkpoint_path' is not allowed",
    ),
    "bad argument": (
        lambda f: _edit(
            f,
            model={"architecture": "vit_tiny_patch16_224", "arguments": {"depht": 2}},
        ),
        "depht",
    ),
}


@pytest.mark.parametrize(("damage", "fact"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_refused_with_its_place(
    student: torch.nn.Module,
    tmp_path: Path,
    damage: Callable[[Path], object],
    fact: str,
) -> None:
    folder = mh.save(student, tmp_path / "m")
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        mh.load(folder)
    assert fact in str(error.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        mh.load(tmp_path / "nowhere")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_half_written(
    student: torch.nn.Module, tmp_path: Path
) -> None:
    whole = mh.save(student, tmp_path / "measured")
    room = 3 * sum(file.stat().st_size for file in whole.iterdir()) // 2
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount") or "mount"
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)], check=False
    )
    if done.returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        mh.save(student, disk / "m")
        with pytest.raises(CheckpointError, match="cannot be written"):
            mh.save(student, disk / "n")
        with pytest.raises(CheckpointError, match="cannot be written"):
            mh.save(student, disk / "m")
        assert os.listdir(disk) == ["m"]
        assert torch.equal(_logits(mh.load(disk / "m")), _logits(student))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
