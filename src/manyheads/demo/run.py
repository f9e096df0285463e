"""The main job end to end, on handwritten digits that ship with a dependency.

A small Vision Transformer learns to read digits; its attention becomes Hydra in the
last two blocks and in all of them; both are healed and measured. Then DeiT-S, with
random weights, is counted and timed at 224 and at 1080p, where it pays.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.attention import Hydra
from manyheads.checkpoint import load, save
from manyheads.conversion import convert, preview
from manyheads.costs import cost
from manyheads.data import digits
from manyheads.demo.figures import draw_demo
from manyheads.demo.findings import Demo, DemoRow, LargeRow
from manyheads.drafts import draft_of
from manyheads.drawing import draw
from manyheads.errors import CheckpointError, ManyheadsError
from manyheads.healing import heal
from manyheads.maps import attention_maps
from manyheads.recipe import Recipe, Swap
from manyheads.report import report
from manyheads.terminal.console import note
from manyheads.terminal.sources import open_model
from manyheads.timing import bench
from manyheads.training import evaluate, train

__all__ = ["demo"]

Labelled = tuple[Tensor, Tensor]
Accuracies = tuple[float, float | None, float | None]
"""Before, swapped and healed, as shares."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is done: minutes for people, seconds for tests."""

    embed_dim: int
    depth: int
    train_epochs: int
    heal_epochs: int
    rounds: int
    memory: bool
    large: str
    large_sizes: tuple[tuple[tuple[int, int], int], ...]
    """Image sizes for `large`, each with its number of timed rounds."""


FULL = Effort(
    embed_dim=64,
    depth=4,
    train_epochs=25,
    heal_epochs=12,
    rounds=30,
    memory=True,
    large="deit_small_patch16_224",
    large_sizes=(((224, 224), 30), ((1080, 1920), 3)),
)
QUICK = Effort(
    embed_dim=24,
    depth=3,
    train_epochs=1,
    heal_epochs=1,
    rounds=2,
    memory=False,
    large="deit_tiny_patch16_224",
    large_sizes=(((32, 32), 2), ((40, 56), 2)),
)
IMAGE_SIZE, PATCH, HEADS, BATCH = 32, 4, 4, 64
LEARNING_RATE = 4e-3
_DRAWN = 2


def demo(folder: str | Path, *, quick: bool = False) -> Demo:
    """Train, convert, heal, measure; write what was found and check it.

    Cost: under five minutes on two CPU cores; `quick` takes seconds and shows nothing
    but that everything runs.

    Args:
        folder: Where to write demo.json, demo.png and the healed model.
        quick: Tiny models, one pass each.

    Raises:
        MissingExtra: scikit-learn or matplotlib is not installed.
        CheckpointError: The folder cannot be written.
    """
    effort = QUICK if quick else FULL
    target = _writable(Path(folder))
    train_set, test_set = digits(image_size=IMAGE_SIZE)
    if quick:
        train_set = (train_set[0][:BATCH], train_set[1][:BATCH])
    teacher = _teacher(effort, channels=train_set[0].shape[1])
    note(f"1/5 Training a softmax ViT for {effort.train_epochs} epochs")
    train(
        teacher,
        train_set,
        epochs=effort.train_epochs,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
    )
    before = evaluate(teacher, test_set).top1
    last = range(effort.depth - 2, effort.depth)
    recipes = {
        "Hydra in the last 2 blocks": Recipe(Swap(blocks=last, attention=Hydra())),
        "Hydra in all blocks": Recipe(Swap(attention=Hydra())),
    }
    students: list[nn.Module] = []
    found: list[Accuracies] = [(before, None, None)]
    for step, (name, recipe) in enumerate(recipes.items(), start=2):
        note(f"{step}/5 {name}: converting and healing")
        student = convert(teacher, recipe)
        swapped = evaluate(student, test_set).top1
        _heal(student, teacher, train_set, effort)
        found.append((before, swapped, evaluate(student, test_set).top1))
        students.append(student)
    note("4/5 Measuring the digit models")
    names = ["softmax", *recipes]
    rows, machine = _digit_rows([teacher, *students], names, found, effort)
    note(f"5/5 Measuring {effort.large} with random weights")
    result = Demo(
        rows=rows,
        large=_large_rows(effort),
        conditions=_conditions(effort, train_set, test_set, machine),
        folder=target,
    )
    _keep(result, teacher, students[-1], test_set[0])
    return result


def _teacher(effort: Effort, *, channels: int) -> nn.Module:
    arguments = {
        "img_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "embed_dim": effort.embed_dim,
        "depth": effort.depth,
        "num_heads": HEADS,
        "num_classes": 10,
        "in_chans": channels,
    }
    return open_model(
        "vit_tiny_patch16_224", pretrained=False, arguments=arguments, seed=0
    ).model


def _heal(
    student: nn.Module, teacher: nn.Module, images: Labelled, effort: Effort
) -> None:
    heal(
        student,
        teacher,
        images[0],
        logit_epochs=effort.heal_epochs,
        batch_size=BATCH,
    )


def _digit_rows(
    models: list[nn.Module],
    names: list[str],
    found: list[Accuracies],
    effort: Effort,
) -> tuple[tuple[DemoRow, ...], dict[str, Any]]:
    timed = bench(
        *models,
        batch_size=BATCH,
        rounds=effort.rounds,
        memory=effort.memory,
        names=names,
    )
    rows = tuple(
        DemoRow(
            model=row.name,
            accuracy_before=before,
            accuracy_swapped=swapped,
            accuracy_healed=healed,
            parameters=row.parameters,
            flops=row.flops,
            latency_ms=row.latency_ms,
            peak_mib=row.peak_mib,
        )
        for row, (before, swapped, healed) in zip(timed.rows, found, strict=True)
    )
    return rows, timed.conditions


def _large_rows(effort: Effort) -> tuple[LargeRow, ...]:
    arguments: dict[str, Any] = {"img_size": 32} if effort is QUICK else {}
    base = open_model(effort.large, pretrained=False, arguments=arguments).model
    hydra = convert(base, Recipe(Swap(attention=Hydra())))
    rows: list[LargeRow] = []
    for size, rounds in effort.large_sizes:
        names = [effort.large, f"{effort.large} + Hydra"]
        timed = bench(
            base,
            hydra,
            image_size=size,
            rounds=rounds,
            memory=effort.memory,
            names=names,
        )
        for row, model in zip(timed.rows, (base, hydra), strict=True):
            rows.append(
                LargeRow(
                    model=row.name,
                    image_size=size,
                    parameters=row.parameters,
                    flops=cost(model, image_size=size).flops,
                    latency_ms=row.latency_ms,
                    latency_quartiles_ms=row.latency_quartiles_ms,
                    peak_mib=row.peak_mib,
                )
            )
    return tuple(rows)


def _conditions(
    effort: Effort, train_set: Labelled, test_set: Labelled, machine: dict[str, Any]
) -> dict[str, Any]:
    return {
        "data": "scikit-learn's handwritten digits, resampled to "
        f"{IMAGE_SIZE}x{IMAGE_SIZE}",
        "training_images": len(train_set[0]),
        "test_images": len(test_set[0]),
        "digit_latency": f"batch of {BATCH}",
        "large_latency": "batch of 1",
        "large_weights": "random",
        "patch": PATCH,
        "heads": HEADS,
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "effort": asdict(effort),
        "machine": machine,
    }


def _writable(folder: Path) -> Path:
    """Find out before the work, not after it, that nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def _keep(result: Demo, teacher: nn.Module, student: nn.Module, images: Tensor) -> None:
    """Write everything, and check that the model on disk gives the same logits."""
    checkpoint = save(student, result.folder / "student")
    with torch.no_grad():
        same = torch.equal(student.eval()(images), load(checkpoint)(images))
    if not same:
        raise ManyheadsError(
            asked=f"the model in {checkpoint}",
            found="its logits differ from those of the model that was saved",
            fix="Please report this with the demo.json beside it.",
        )
    hydra = Recipe(Swap(attention=Hydra()))
    try:
        draw_demo(result.to_json(), result.folder / "demo.png")
        converted = preview(teacher, hydra).to_json()
        recorded = result.to_json() | {"converted": converted}
        with draft_of(result.folder / "demo.json") as draft:
            draft.write_text(json.dumps(recorded, indent=2), encoding="utf-8")
        pictures = {"What was lost and what was gained": result.folder / "demo.png"}
        looked_at = {
            "teacher": teacher,
            "swapped, not healed": convert(teacher, hydra),
            "healed": student,
        }
        pictures |= _draw_maps(looked_at, images[:_DRAWN], result.folder)
        report(result.folder / "demo.json", figures=pictures)
    except OSError as error:
        raise _unwritable(result.folder, error) from error


def _draw_maps(
    models: dict[str, nn.Module], images: Tensor, folder: Path
) -> dict[str, Path]:
    """Draw what each model looks at in each digit, all of a block on one scale."""
    maps = {
        name: attention_maps(model.cpu().eval(), images.cpu(), heads=())
        for name, model in models.items()
    }
    drawn = {}
    for place in range(len(images)):
        title = f"Digit {place + 1}: Hydra in all blocks, before and after healing"
        file = folder / f"maps_{place + 1}.png"
        drawn[title] = draw(maps, file, title=title, image=place)
    return drawn


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        asked=f"writing to {folder}",
        found=f"it cannot be written: {error}",
        fix="Free space or choose another folder with --out.",
    )
