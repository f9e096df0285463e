"""A run that is killed over and over, by SIGKILL, at seeded random points.

    python -m tests.killed_runs FOLDER VERB SEED KILLS

One parent has everything imported and forks a child for every attempt. Every second
attempt is killed from outside after a random time; the others kill themselves at a
random operation on files, most of which happen while a checkpoint is written. A run
that reaches its end gives way to a new one, until there were enough kills. What
happened is printed as JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  so that children need not
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from manyheads import Compact, Hydra, Recipe, Swap, convert
from manyheads.data import Augmentation
from manyheads.healing import heal
from manyheads.training import train
from tests.helpers import tiny_vit

ON_FILES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


Run = Callable[[Path], nn.Module]


def images(count: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 10


def make() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit(depth=1, embed_dim=24, proj_drop_rate=0.1, drop_path_rate=0.1)


def training(folder: Path) -> nn.Module:
    """Everything that has a state: optimiser, rate, scaler, average, parts, noise."""
    student = make()
    train(
        student,
        images(),
        epochs=6,
        batch_size=6,
        accumulation=2,
        precision="fp16",
        ema_decay=0.9,
        augment=Augmentation(flip=0.5, crop_padding=2, mixup=0.8, repeats=2),
        layer_decay=0.8,
        validation=images(8),
        run_dir=folder,
        checkpoint_every=3,
        log_every=2,
        progress=False,
    )
    return student


def healing(folder: Path) -> nn.Module:
    """All of that but the noise, over a refit and two stages."""
    teacher = make()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    student = convert(teacher, Recipe(Swap(attention=Hydra(), ffn=Compact(rank=8))))
    heal(
        student,
        teacher,
        images()[0],
        refit_images=8,
        block_epochs=3,
        logit_epochs=3,
        batch_size=6,
        inherited_rate_factor=0.5,
        accumulation=2,
        precision="fp16",
        ema_decay=0.9,
        run_dir=folder,
        checkpoint_every=3,
        log_every=2,
        progress=False,
    )
    return student


def die_at(operation: int, folder: Path) -> None:
    """Kill this process at its n-th operation on a file of the run."""
    left = itertools.count(1 - operation)

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ON_FILES and str(folder) in str(arguments[0]) and not next(left):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def attempt(run: Run, folder: Path, prepare: Callable[[], object]) -> int:
    """Fork a child that makes the run, or what is left of it."""
    pid = os.fork()
    if pid:
        return pid
    try:
        prepare()
        save_model(run(folder), str(folder) + ".safetensors")
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def main() -> None:
    root, dice, wanted = Path(sys.argv[1]), random.Random(sys.argv[3]), int(sys.argv[4])
    run: Run = {"train": training, "heal": healing}[sys.argv[2]]
    began = time.monotonic()
    os.waitpid(attempt(run, root / "straight", lambda: None), 0)
    whole = time.monotonic() - began
    kills, resumed, finished, ended = 0, 0, 0, False
    while kills < wanted or not ended:
        folder, pick = root / f"run-{finished}", dice.random()
        operation = dice.randrange(1, 80)
        if kills < wanted and pick < 0.5:
            pid = attempt(run, folder, lambda at=operation, of=folder: die_at(at, of))
        else:
            pid = attempt(run, folder, lambda: None)
            if kills < wanted:
                time.sleep(dice.uniform(0.0, 0.8 * whole))
                os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        ended = not os.WIFSIGNALED(status)
        if ended and os.WEXITSTATUS(status):
            sys.exit(1)
        finished += ended
        kills += not ended
        resumed += not ended and any(folder.glob("step-*"))
    sys.stdout.write(json.dumps({"kills": kills, "resumed": resumed, "runs": finished}))


if __name__ == "__main__":
    main()
