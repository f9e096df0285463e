"""What test_processes.py does in one process and, through torchrun, in two.

Each function makes a run and gives what came out of it, as values that can be compared.
As a program: python -m tests.shared_runs FOLDER NAME...
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from manyheads import Compact, Hydra, Recipe, Swap, convert
from manyheads.data import Augmentation
from manyheads.errors import ManyheadsError
from manyheads.healing import heal
from manyheads.training import Trained, evaluate, train
from tests.helpers import tiny_vit

QUICK = {"epochs": 2, "batch_size": 8, "progress": False}
TOGETHER = 2


def images(count: int = 41) -> tuple[Tensor, Tensor]:
    """With batches of 8 the last one is a single image: one process has none."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 10
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    return noise + labels.view(-1, 1, 1, 1) / 5, labels


def model(**changes: object) -> nn.Module:
    """Float64, so that Adam has no rounding noise to blow up where gradients vanish."""
    torch.manual_seed(0)
    return tiny_vit(depth=2, **changes).double()


class Pictures(Dataset[tuple[Image.Image, int]]):
    """Small pictures, some of which cannot be read."""

    def __init__(self, broken: set[int], kill_at: int | None = None) -> None:
        self.broken, self.kill_at = broken, kill_at

    def __len__(self) -> int:
        return 30

    def __getitem__(self, position: int) -> tuple[Image.Image, int]:
        if position in self.broken:
            raise OSError("it is broken")
        shade = (8 * position, 255 - 8 * position, 100)
        return Image.new("RGB", (32, 32), shade), position % 10


def outcome(student: nn.Module, trained: Any) -> dict[str, Any]:
    return {
        "weights": {k: v.clone() for k, v in student.state_dict().items()},
        "losses": getattr(trained, "losses", None),
        "skipped": trained.skipped,
    }


def odd_batch(folder: Path) -> dict[str, Any]:
    student = model()
    trained = train(student, images(), validation=images(13), **QUICK)
    return outcome(student, trained) | {
        "top1": trained.validation.top1,
        "validation loss": trained.validation.loss,
        "processes": trained.processes,
    }


def everything_on(folder: Path) -> dict[str, Any]:
    student = model()
    trained = train(
        student,
        images(),
        accumulation=2,
        layer_decay=0.7,
        ema_decay=0.9,
        max_grad_norm=0.1,
        teacher=model(embed_dim=24),
        distillation="soft",
        validation=images(13),
        run_dir=folder / f"everything-{os.environ.get('WORLD_SIZE', '1')}",
        **QUICK,
    )
    return outcome(student, trained) | {"history": trained.history}


def unreadable(folder: Path) -> dict[str, Any]:
    # Of the last batch of six, one process may be left with nothing at all.
    student, pictures = model(), Pictures({1, 3, 5, 7, 9, 11, 13})
    augment = replace(Augmentation.deit(), rand_magnitude=2)
    options = QUICK | {"max_unreadable": 0.5, "augment": augment}
    trained = train(student, pictures, **options)
    found = evaluate(
        student, pictures, batch_size=7, max_unreadable=0.5, progress=False
    )
    return outcome(student, trained) | {
        "images": found.images,
        "top1": found.top1,
        "evaluation skipped": found.skipped,
    }


def too_many_unreadable(folder: Path) -> dict[str, Any]:
    try:
        train(model(), Pictures({7}), max_unreadable=0.0, **QUICK)
    except ManyheadsError as error:
        return {"error": type(error).__name__, "item": "item 7" in str(error)}
    return {}


def an_unused_parameter(folder: Path) -> dict[str, Any]:
    student = model()
    student.idle = nn.Parameter(torch.ones(3, dtype=torch.float64))
    return outcome(student, train(student, images(16), **QUICK))


def in_shards(folder: Path) -> dict[str, Any]:
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    student = model()
    changes = {"accumulation": 2, "validation": images(13), "layer_decay": 0.7}
    options = QUICK | changes | {"sharded": not alone, "log_every": 1}
    if not alone:
        run_dir = folder / "in_shards"
        kept, seen = student.state_dict(), 0
        kept = {name: value.clone() for name, value in kept.items()}

        class Enough(Exception):
            pass

        def stop(*_: object) -> None:
            nonlocal seen
            seen += 1
            if seen == 10:
                raise Enough

        student.patch_embed.register_forward_hook(stop)
        with suppress(Enough):
            train(student, images(), run_dir=run_dir, checkpoint_every=2, **options)
        student.patch_embed._forward_hooks.clear()
        student.load_state_dict(kept)
        options |= {"run_dir": run_dir, "checkpoint_every": 2}
    trained = train(student, images(), **options)
    plain = all(type(p) is nn.Parameter for p in student.parameters())
    return outcome(student, trained) | {"history": trained.history, "plain": plain}


def a_loss_that_is_not_finite(folder: Path) -> dict[str, Any]:
    pixels, labels = images(16)
    pixels = pixels.double()
    pixels[3] *= 1e200
    student = model()
    try:
        train(student, (pixels, labels), **QUICK)
    except ManyheadsError as error:
        finite = all(bool(p.isfinite().all()) for p in student.parameters())
        return {"error": type(error).__name__, "finite": finite}
    return {}


def healing(folder: Path) -> dict[str, Any]:
    teacher = model()
    swap = Swap(attention=Hydra(), ffn=Compact(rank=8))
    student = convert(teacher, Recipe(swap))
    healed = heal(
        student,
        teacher,
        images(33)[0],
        block_epochs=2,
        logit_epochs=2,
        batch_size=8,
        feature_weight=0.5,
        inherited_rate_factor=0.5,
        accumulation=2,
        ema_decay=0.9,
        progress=False,
    )
    losses = [loss for stage in healed.stages for loss in stage.losses]
    told = {"divergence": healed.divergence, "losses": losses}
    return outcome(student, healed) | told


def resumable(
    folder: Path,
    *,
    name: str,
    kill_at: int | None,
    by: signal.Signals = signal.SIGKILL,
) -> dict[str, Any]:
    """Dropout and an average; the second process signals itself at a step."""
    torch.manual_seed(0)
    student = tiny_vit(depth=2, proj_drop_rate=0.1)
    index = int(os.environ.get("RANK", "0"))
    seen = 0

    def count(*_: object) -> None:
        nonlocal seen
        seen += 1
        if index == 1 and seen == kill_at:
            os.kill(os.getpid(), by)

    student.patch_embed.register_forward_hook(count)
    trained: Trained = train(
        student,
        images(),
        ema_decay=0.9,
        run_dir=folder / name,
        checkpoint_every=2,
        log_every=1,
        **QUICK,
    )
    return outcome(student, trained)


def stopped(folder: Path) -> dict[str, Any]:
    """One process is asked to leave; both save and leave, and go on when called."""
    code = None
    try:
        resumable(folder, name="stopped", kill_at=7, by=signal.SIGTERM)
    except SystemExit as leaving:
        code = leaving.code
    kept = sorted(step.name for step in (folder / "stopped").glob("step-*"))
    went_on = resumable(folder, name="stopped", kill_at=None)
    expected = resumable(folder, name="not stopped", kill_at=None)
    same = [
        torch.equal(value, went_on["weights"][name])
        for name, value in expected["weights"].items()
    ]
    losses = went_on["losses"] == expected["losses"]
    return {"code": code, "kept": kept, "same": all(same) and losses}


def killed(folder: Path) -> dict[str, Any]:
    return resumable(folder, name="killed", kill_at=13)


def resumed(folder: Path) -> dict[str, Any]:
    return resumable(folder, name="killed", kill_at=None)


def straight(folder: Path) -> dict[str, Any]:
    return resumable(folder, name="straight", kill_at=None)


def shown(folder: Path) -> dict[str, Any]:
    train(model(), images(16), **QUICK | {"progress": True})
    return {}


def main() -> None:
    folder, index = Path(sys.argv[1]), os.environ["RANK"]
    for name in sys.argv[2:]:
        result = globals()[name](folder)
        torch.save(result, folder / f"{name}-{index}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
