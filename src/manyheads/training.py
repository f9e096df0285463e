"""Training with labels, from scratch or from where a model stands, and its measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from manyheads.data import Augmentation, Images, ImageSource
from manyheads.errors import InvalidOption
from manyheads.hosts import find_host
from manyheads.loop import Run
from manyheads.loop.accuracy import (
    Evaluated,
    labelled_source,
    measure,
    require_same_classes,
)
from manyheads.loop.devices import Processes, require_precision
from manyheads.loop.labelling import LabelTask
from manyheads.loop.lessons import Lesson
from manyheads.loop.stages import (
    RunOptions,
    require_augment,
    require_positive,
    require_warmup,
)
from manyheads.loop.weights import fingerprint, keeping_modes

__all__ = ["DEIT", "DEIT_MODEL", "Evaluated", "Trained", "evaluate", "train"]

DEIT: Mapping[str, Any] = MappingProxyType(
    {
        "epochs": 300,
        "batch_size": 1024,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "warmup_epochs": 5,
        "max_grad_norm": None,
        "ema_decay": 0.99996,
        "augment": Augmentation.deit(),
    }
)
"""What `train` takes to follow DeiT (Touvron and others, 2020, arXiv 2012.12877), as
the papers of Hydra and hallucinated attention do: `train(model, images, **DEIT)`."""

DEIT_MODEL: Mapping[str, Any] = MappingProxyType({"drop_path_rate": 0.1})
"""What the model of that recipe is built with."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training did.

    Attributes:
        losses: Mean loss of each epoch.
        steps: Updates of the weights.
        validation: What `evaluate` gives at the end, if there are validation images.
        history: Top-1 and loss on them after each epoch; with a running average of the
            weights also its own, as average_top1 and average_loss.
        images: Images of the source.
        skipped: Pictures that could not be read.
        seconds: Time spent, all calls of a resumed run together.
        run_dir: The folder of the run, if there is one.
        processes: Processes that shared the work.
        overflows: Updates left out because float16 was too narrow for them.
    """

    losses: tuple[float, ...]
    steps: int
    validation: Evaluated | None
    history: tuple[dict[str, float], ...]
    images: int
    skipped: tuple[str, ...]
    seconds: float
    run_dir: str | None
    processes: int = 1
    overflows: int = 0

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        line = (
            f"loss {self.losses[0]:.4f} -> {self.losses[-1]:.4f} in {self.steps} steps "
            f"over {self.images:,} images{skipped} in {self.seconds:.0f} s"
        )
        if self.processes > 1:
            line += f" by {self.processes} processes"
        if self.overflows:
            line += f"; {self.overflows} updates overflowed float16 and were left out"
        return line if self.validation is None else f"{line}\n{self.validation}"


def train(
    model: nn.Module,
    images: Images,
    *,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float | int = 1e-3,
    weight_decay: float | int = 0.05,
    warmup_epochs: float | int = 1.0,
    layer_decay: float | int | None = None,
    max_grad_norm: float | int | None = 1.0,
    accumulation: int = 1,
    precision: str = "fp32",
    ema_decay: float | int | None = None,
    teacher: nn.Module | None = None,
    distillation: str = "soft",
    distillation_weight: float | int = 0.5,
    temperature: float | int = 1.0,
    compile: bool = False,
    sharded: bool = False,
    validation: Images | None = None,
    augment: bool | Augmentation = True,
    max_unreadable: float | int = 0.1,
    num_workers: int = 0,
    seed: int = 0,
    run_dir: str | Path | None = None,
    checkpoint_every: int = 200,
    log_every: int = 10,
    tensorboard: bool = False,
    progress: bool = True,
) -> Trained:
    """Teach a model labelled images: AdamW, cosine with warm-up, cross-entropy.

        loss   (1 - w) CE(S, label) + w t^2 KL(softmax(T / t) || softmax(S / t))   soft
               (1 - w) CE(S, label) + w CE(S, argmax T)                            hard

    S and T are the scores of model and teacher, t the temperature, w the
    `distillation_weight`; without a teacher w is 0. All parameters move, frozen ones
    too; biases, norms and what the library exempts have no weight decay. The model is
    changed in place and keeps its training flags.

    Started with `torchrun`, every process takes its share of the same batches, and the
    weights come out as those of one process would, rounding and randomness inside the
    model aside. Batch norms see the share of their process. With `run_dir`, a run that
    is interrupted in whatever way goes on when it is started again, and on the CPU
    ends with the same bits.

    Args:
        model: A hosted model, converted or not.
        images: A folder with one subfolder per class, a dataset of (image, label), or
            preprocessed tensors (images, labels).
        epochs: Passes over the images.
        batch_size: Images per step, all processes and parts together.
        learning_rate: Highest rate.
        weight_decay: Of matrices.
        warmup_epochs: Epochs in which the rate rises; no more than there are.
        layer_decay: Factor by which the rate falls from layer to layer, from the
            classifier down; None for one rate.
        max_grad_norm: Length to which longer gradients are cut; None for any length.
        accumulation: Parts in which a process works through its images of a step, one
            after another; memory falls, the result stays.
        precision: "fp32", or matrix products in "bf16" or "fp16"; weights stay as they
            are, and fp16 scales the loss.
        ema_decay: Decay of a running average of the weights. It is validated beside
            the weights, and the model ends with it.
        teacher: A model to learn from as well. It is shown the images as this model
            is, and only read.
        distillation: Whether the teacher's scores teach, "soft", or its class, "hard".
        distillation_weight: Share of the teacher in the loss.
        temperature: Flattens both models' scores before they are compared, if soft.
        compile: Whether to run the model through torch.compile while it trains.
        sharded: Whether weights, gradients and optimiser are dealt out over processes
            (FSDP), for models that do not fit on one device; the model stays on the
            CPU. Not with `compile`, `ema_decay` or fp16.
        validation: Images to measure on after each epoch; they teach nothing.
        augment: What happens to images, such as Augmentation.deit(); or whether
            pictures get random crops and flips, and tensors nothing.
        max_unreadable: Share of unreadable pictures at which to stop.
        num_workers: Processes that load images, for each process; 0 for itself.
        seed: What order, augmentation and dropout come from.
        run_dir: A folder from which the same call goes on after an interruption. Gets
            steps.csv and epochs.csv as well.
        checkpoint_every: Steps between two writings to `run_dir`.
        log_every: Steps between two lines of steps.csv.
        tensorboard: Whether to write TensorBoard events to `run_dir` too.
        progress: Whether to show a progress bar.

    Raises:
        UnknownHost: No host knows the model.
        DataError: The images are missing, unreadable, unlabelled, labelled beyond the
            model's classes, or not what the model or the teacher takes. However late
            that comes out, the model has the weights then that it came with; with
            `sharded`, those of the last checkpoint.
        NonFiniteLoss: The loss stopped being finite; names step and block.
        CheckpointError: The run_dir belongs to another run, or cannot be written.
        InvalidOption: A number is out of range, a name is unknown, or the batch has
            fewer images than there are processes.
        MissingExtra: accelerate, or the TensorBoard asked for, is not installed.
    """
    options = RunOptions(
        batch_size=batch_size,
        seed=seed,
        run_dir=run_dir,
        progress=progress,
        num_workers=num_workers,
        checkpoint_every=checkpoint_every,
        max_grad_norm=max_grad_norm,
        accumulation=accumulation,
        precision=precision,
        ema_decay=ema_decay,
        layer_decay=layer_decay,
        log_every=log_every,
        tensorboard=tensorboard,
        sharded=sharded,
    )
    require_augment(augment)
    config: dict[str, Any] = {
        "verb": "train",
        "epochs": epochs,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup_epochs": warmup_epochs,
        "augment": augment.to_json() if isinstance(augment, Augmentation) else augment,
        "compile": compile,
    }
    _require_sound(config, sharded=sharded)
    lesson = Lesson(
        teacher=teacher,
        distillation=distillation,
        weight=distillation_weight,
        temperature=temperature,
    )
    source, classes = labelled_source(model, images, max_unreadable, held_out=False)
    if isinstance(augment, Augmentation):
        source.require_augmentable(augment)
    lesson.require_fitting(model, source)
    held_out = None
    if validation is not None:
        held_out, _ = labelled_source(model, validation, max_unreadable, held_out=True)
        require_same_classes(source, held_out)
        config["validation"] = held_out.identity
    config |= lesson.identity()
    config["model"] = fingerprint(model, values=False)
    config["converted"] = [repr(site) for site in find_host(model)[1]]
    beside = [] if teacher is None else [teacher]
    with (
        keeping_modes(*beside),
        Run(model, source, options, config, beside=beside) as run,
    ):
        task = LabelTask(
            run, lesson, held_out, options, num_classes=classes, compiled=compile
        )
        if not run.finished:
            run.perform(task.stage(config, augment))
            run.settle()
            measured = task.validate()
            run.notes["validation"] = measured and measured.to_json()
            run.finish()
        return _result(run, source, options)


def evaluate(
    model: nn.Module,
    images: Images,
    *,
    batch_size: int = 64,
    precision: str = "fp32",
    max_unreadable: float | int = 0.1,
    num_workers: int = 0,
    progress: bool = True,
) -> Evaluated:
    """Measure how well a model names labelled images; changes nothing.

    Started with `torchrun`, the processes share the images, none of which is counted
    twice; all of them have to call it, and all get the same answer.

    Args:
        model: A hosted model, converted or not.
        images: A folder with one subfolder per class, a dataset of (image, label), or
            preprocessed tensors (images, labels).
        batch_size: Images at a time, all processes together.
        precision: "fp32", or matrix products in "bf16" or "fp16".
        max_unreadable: Share of unreadable pictures at which to stop.
        num_workers: Processes that load images; 0 for this one.
        progress: Whether to show a progress bar.

    Raises:
        UnknownHost: No host knows the model.
        DataError: The images are missing, unreadable, unlabelled, labelled beyond the
            model's classes, or not what the model takes.
        NonFiniteLoss: The model gives scores that are not finite.
        InvalidOption: A number is out of range, or the precision is unknown.
        MissingExtra: It was started as several processes, and accelerate is missing.
    """
    require_positive("batch_size", batch_size)
    require_positive("num_workers", num_workers, zero=True)
    require_precision(model, precision)
    source, _ = labelled_source(model, images, max_unreadable, held_out=True)
    processes = Processes("evaluating", required=False)
    with processes.placed(model):
        return measure(
            model,
            source,
            processes,
            batch_size=max(batch_size, processes.count),
            num_workers=num_workers,
            precision=precision,
            progress=progress,
        )


def _result(run: Run, source: ImageSource, options: RunOptions) -> Trained:
    record, measured = run.records[0], run.notes["validation"]
    return Trained(
        losses=record.losses,
        steps=record.steps,
        validation=Evaluated(**measured) if measured else None,
        history=record.measured,
        images=len(source),
        skipped=tuple(sorted(source.skipped)),
        seconds=run.seconds,
        run_dir=None if options.run_dir is None else str(options.run_dir),
        processes=run.processes.count,
        overflows=record.overflows,
    )


def _require_sound(config: dict[str, Any], *, sharded: bool) -> None:
    if sharded and config["compile"]:
        raise InvalidOption(
            asked="sharded=True, compile=True",
            found="compiled code and shards were not tried together",
            fix="Leave one of them out.",
        )
    for name in ("epochs", "learning_rate"):
        require_positive(name, config[name])
    require_positive("weight_decay", config["weight_decay"], zero=True)
    require_warmup(config["warmup_epochs"], config["epochs"], "epochs")
