"""One file with every option of a verb; and what the run keeps of it repeats it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import manyheads as mh
from tests.terminal.session import Terminal

# Every keyword with a value that is not its default, where it can have one here.
COMMON: dict[str, Any] = {
    "batch_size": 7,
    "precision": "bf16",
    "max_unreadable": 0.25,
    "num_workers": 1,
    "progress": False,
}
LEARNING: dict[str, Any] = COMMON | {
    "learning_rate": 0.002,
    "weight_decay": 0.01,
    "warmup_epochs": 0.25,
    "max_grad_norm": "none",
    "accumulation": 2,
    "ema_decay": 0.75,
    "temperature": 2.0,
    "augment": {"flip": 0.5, "crop_area": [0.5, 1.0], "rand_magnitude": 3},
    "seed": 11,
    "checkpoint_every": 3,
    "log_every": 2,
    "tensorboard": True,
}
EVERY: dict[str, dict[str, Any]] = {
    "train": LEARNING
    | {
        "epochs": 2,
        "layer_decay": 0.9,
        "distillation": "hard",
        "distillation_weight": 0.25,
        "compile": False,
        "sharded": False,
        "recipe": "deit",
    },
    "heal": LEARNING
    | {
        "refit_images": 8,
        "refit_unswapped": True,
        "block_epochs": 1,
        "logit_epochs": 2,
        "block_learning_rate": 0.003,
        "feature_weight": 0.5,
        "inherited_rate_factor": 0.5,
    },
    "evaluate": COMMON,
}


def toml(values: dict[str, Any]) -> str:
    def written(value: Any) -> str:
        if isinstance(value, dict):
            pairs = (f"{name} = {written(inner)}" for name, inner in value.items())
            return f"{{ {', '.join(pairs)} }}"
        return json.dumps(value)

    return "\n".join(f"{name} = {written(value)}" for name, value in values.items())


@pytest.fixture
def places(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> dict[str, dict[str, Any]]:
    """Models, images and folders of each verb."""
    student = str(tmp_path / "student")
    swaps = ("--attention", "interactive:landmarks=2x2", "--ffn", "compact")
    code, _, err = terminal("convert", teacher, *swaps, "--out", student)
    assert code == 0, err
    kept = {"out": str(tmp_path / "out"), "run_dir": str(tmp_path / "run")}
    learning = {"model": student, "teacher": teacher, "validation": pictures} | kept
    return {
        "train": learning | {"images": pictures, "pretrained": False},
        "heal": {"student": student, "teacher": teacher, "images": pictures}
        | kept
        | {"pretrained": False},
        "evaluate": {"model": student, "images": pictures, "pretrained": False},
    }


@pytest.mark.parametrize("ending", ["toml", "json"])
@pytest.mark.parametrize("verb", [mh.train, mh.heal, mh.evaluate])
def test_one_file_holds_every_option_and_what_is_kept_repeats_the_run(
    verb: Callable[..., Any],
    ending: str,
    terminal: Terminal,
    places: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorboard")
    name = verb.__name__
    told = EVERY[name] | places[name]
    beside = {"out", "recipe", "pretrained"}
    assert set(inspect.signature(verb).parameters) == told.keys() - beside
    file = tmp_path / f"every.{ending}"
    file.write_text(toml(told) if ending == "toml" else json.dumps(told))
    found = terminal.json(name, "--config", str(file))
    for option, value in told.items():
        kept = found["config"][option]
        if option == "augment":
            assert {k: kept[k] for k in value} == value
        else:
            assert kept == (None if value == "none" else value), option
    again = tmp_path / "again.json"
    again.write_text(json.dumps(found))
    if name == "evaluate":
        assert terminal.json(name, "--config", str(again)) == found
        return
    run, out = Path(told["run_dir"]), Path(told["out"])
    assert list((run / "tensorboard").iterdir())
    ours = (run / "config.json", out / "command.json") if ending == "toml" else (again,)
    for kept in ours:
        anew = tmp_path / kept.stem
        words = ("--out", str(anew / "out"), "--run-dir", str(anew / "run"))
        terminal.json(name, "--config", str(kept), *words)
        first, second = (mh.load(folder).state_dict() for folder in (out, anew / "out"))
        assert all(torch.equal(first[key], second[key]) for key in first)
