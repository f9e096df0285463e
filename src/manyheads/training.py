"""Training with labels, from scratch or from where a model stands, and its measure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import Batch, Images, ImageSource, image_source
from manyheads.errors import DataError, NonFiniteLoss
from manyheads.hosts import find_host, respond
from manyheads.loop import Run, progress_bar
from manyheads.loop.probes import broken_block, like, try_one
from manyheads.loop.stages import RunOptions, Stage, require_positive
from manyheads.loop.weights import fingerprint, keeping_modes

__all__ = ["Evaluated", "Trained", "evaluate", "train"]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """How well a model names labelled images.

    Attributes:
        top1: Share of images whose label has the highest score.
        top5: Share of images whose label is among the five highest scores; None for
            models of five classes or fewer.
        loss: Mean cross-entropy in nats.
        images: Images that were looked at.
        skipped: Pictures that could not be read.
    """

    top1: float
    top5: float | None
    loss: float
    images: int
    skipped: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.2%}"
        skipped = f" ({len(self.skipped)} skipped)" if self.skipped else ""
        return (
            f"top-1 {self.top1:.2%}{top5}, loss {self.loss:.4f} "
            f"on {self.images:,} images{skipped}"
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training did.

    Attributes:
        losses: Mean loss of each epoch.
        steps: Updates of the weights.
        validation: What `evaluate` gives at the end, if there are validation images.
        history: Top-1 and loss on them after each epoch.
        images: Images of the source.
        skipped: Pictures that could not be read.
        seconds: Time spent, all calls of a resumed run together.
        run_dir: The folder of the run, if there is one.
    """

    losses: tuple[float, ...]
    steps: int
    validation: Evaluated | None
    history: tuple[dict[str, float], ...]
    images: int
    skipped: tuple[str, ...]
    seconds: float
    run_dir: str | None

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        line = (
            f"loss {self.losses[0]:.4f} -> {self.losses[-1]:.4f} in {self.steps} steps "
            f"over {self.images:,} images{skipped} in {self.seconds:.0f} s"
        )
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
    max_grad_norm: float | int = 1.0,
    validation: Images | None = None,
    augment: bool = True,
    max_unreadable: float | int = 0.1,
    num_workers: int = 0,
    seed: int = 0,
    run_dir: str | Path | None = None,
    checkpoint_every: int = 200,
    progress: bool = True,
) -> Trained:
    """Teach a model labelled images: AdamW, cosine with warm-up, cross-entropy.

    All parameters move, frozen ones too; biases, norms and what the library exempts
    have no weight decay. The model is changed in place and keeps its training flags.

    Args:
        model: A hosted model, converted or not.
        images: A folder with one subfolder per class, a dataset of (image, label), or
            preprocessed tensors (images, labels).
        epochs: Passes over the images.
        batch_size: Images per step.
        learning_rate: Highest rate.
        weight_decay: Of matrices.
        warmup_epochs: Epochs in which the rate rises.
        max_grad_norm: Length to which longer gradients are cut.
        validation: Images to measure on after each epoch; they teach nothing.
        augment: Whether pictures get random crops and flips; tensors never do.
        max_unreadable: Share of unreadable pictures at which to stop.
        num_workers: Processes that load images; 0 for this one.
        seed: What order, augmentation and dropout come from.
        run_dir: A folder from which the same call goes on after an interruption.
        checkpoint_every: Steps between two writings to `run_dir`.
        progress: Whether to show a progress bar.

    Raises:
        UnknownHost: No host knows the model.
        DataError: The images are missing, unreadable, unlabelled, labelled beyond the
            model's classes, or not what the model takes.
        NonFiniteLoss: The loss stopped being finite; names step and block.
        CheckpointError: The run_dir belongs to another run, or cannot be written.
        InvalidOption: A number is out of range.
        MissingExtra: accelerate is not installed.
    """
    options = RunOptions(
        batch_size=batch_size,
        seed=seed,
        run_dir=run_dir,
        progress=progress,
        num_workers=num_workers,
        checkpoint_every=checkpoint_every,
        max_grad_norm=max_grad_norm,
    )
    config: dict[str, Any] = {
        "verb": "train",
        "epochs": epochs,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup_epochs": warmup_epochs,
        "augment": augment,
    }
    require_positive("epochs", epochs)
    require_positive("learning_rate", learning_rate)
    require_positive("weight_decay", weight_decay, zero=True)
    require_positive("warmup_epochs", warmup_epochs, zero=True)
    source = _labelled(model, images, max_unreadable)
    held_out = None
    if validation is not None:
        held_out = _labelled(model, validation, max_unreadable)
        _require_same_classes(source, held_out)
        config["validation"] = held_out.identity
    config["model"] = fingerprint(model, values=False)
    config["converted"] = [repr(site) for site in find_host(model)[1]]
    task = _Task(model, held_out, options)
    with Run(model, source, options, config) as run:
        if not run.finished:
            run.perform(task.stage(config))
            measured = task.validate()
            run.notes["validation"] = measured and measured.to_json()
            run.finish()
        return _result(run, source, options)


def evaluate(
    model: nn.Module,
    images: Images,
    *,
    batch_size: int = 64,
    max_unreadable: float | int = 0.1,
    num_workers: int = 0,
    progress: bool = True,
) -> Evaluated:
    """Measure how well a model names labelled images; changes nothing.

    Args:
        model: A hosted model, converted or not.
        images: A folder with one subfolder per class, a dataset of (image, label), or
            preprocessed tensors (images, labels).
        batch_size: Images at a time.
        max_unreadable: Share of unreadable pictures at which to stop.
        num_workers: Processes that load images; 0 for this one.
        progress: Whether to show a progress bar.

    Raises:
        UnknownHost: No host knows the model.
        DataError: The images are missing, unreadable, unlabelled, labelled beyond the
            model's classes, or not what the model takes.
        NonFiniteLoss: The model gives scores that are not finite.
        InvalidOption: A number is out of range.
    """
    require_positive("batch_size", batch_size)
    source = _labelled(model, images, max_unreadable)
    return _measure(model, source, batch_size, num_workers, progress)


class _Task:
    """Cross-entropy on one model, with a look at held-out images after each epoch."""

    def __init__(
        self, model: nn.Module, held_out: ImageSource | None, options: RunOptions
    ) -> None:
        self.model, self.held_out, self.options = model, held_out, options
        self.paths = [site.path for site in find_host(model)[1]]

    def stage(self, config: dict[str, Any]) -> Stage:
        """Describe the one stage of training."""
        return Stage(
            name="train",
            epochs=config["epochs"],
            learning_rate=config["learning_rate"],
            weight_decay=config["weight_decay"],
            warmup_epochs=config["warmup_epochs"],
            trains=("",),
            loss=self.loss,
            blame=self.blame,
            augment=config["augment"],
            after_epoch=None if self.held_out is None else self.after_epoch,
        )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Give the cross-entropy of one batch."""
        self.model.train()
        scores = respond(self.model, like(batch.images, self.model))
        _require_labels(batch.labels, scores.shape[1])
        labels = batch.labels.to(scores.device)
        return {"labels": F.cross_entropy(scores.float(), labels)}

    def blame(self, batch: Batch) -> str:
        """Name the first block whose output is not finite."""
        broken = broken_block(self.model, batch.images, self.paths)
        return broken or "the comparison with labels"

    def after_epoch(self, done: int) -> dict[str, float]:
        """Measure on the held-out images."""
        measured = self.validate()
        if measured is None:
            return {}
        return {"top1": measured.top1, "loss": measured.loss}

    def validate(self) -> Evaluated | None:
        """Give the full measure on the held-out images, if there are any."""
        if self.held_out is None:
            return None
        size, workers = self.options.batch_size, self.options.num_workers
        return _measure(self.model, self.held_out, size, workers, False)


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
    )


@torch.no_grad()
def _measure(
    model: nn.Module,
    source: ImageSource,
    batch_size: int,
    num_workers: int,
    progress: bool,
) -> Evaluated:
    loss, first, among, count, width = 0.0, 0, 0, 0, 0
    with keeping_modes(model), progress_bar(progress) as bar:
        model.eval()
        task = bar.add_task("evaluate", total=len(source), told="images")
        batches = source.batches(
            range(len(source)), batch_size, num_workers=num_workers
        )
        for images, labels, _ in batches:
            if not len(images):
                continue
            scores = respond(model, like(images, model)).float()
            width = scores.shape[1]
            _require_labels(labels, width)
            _require_finite(model, images, scores)
            labels = labels.to(scores.device)
            loss += float(F.cross_entropy(scores, labels, reduction="sum"))
            hits = scores.topk(min(5, width)).indices == labels[:, None]
            first += int(hits[:, 0].sum())
            among += int(hits.any(1).sum())
            count += len(images)
            bar.update(task, completed=count)
    if not count:
        raise source.too_many()
    return Evaluated(
        top1=first / count,
        top5=among / count if width > 5 else None,
        loss=loss / count,
        images=count,
        skipped=tuple(sorted(source.skipped)),
    )


def _labelled(
    model: nn.Module, images: Images, max_unreadable: float | int
) -> ImageSource:
    """Make a source whose labels fit the model's scores."""
    source = image_source(model, images, labelled=True, max_unreadable=max_unreadable)
    scores = try_one(model, source.sample(8).images, source.where, scored=True)
    if source.labels is not None:
        _require_labels(source.labels, scores.shape[1])
    if source.classes and len(source.classes) != scores.shape[1]:
        raise DataError(
            asked=f"labelled images from {source.where}",
            found=f"it has {len(source.classes)} class subfolders and the model names "
            f"{scores.shape[1]} classes",
            why="a label is the position of its folder's name among all, sorted",
            fix=f"Build the model with num_classes={len(source.classes)}, or give a "
            "folder with every class.",
        )
    return source


def _require_labels(labels: Tensor, width: int) -> None:
    outside = labels[(labels < 0) | (labels >= width)]
    if len(outside):
        raise DataError(
            asked=f"labels for a model of {width} classes",
            found=f"{len(outside)} labels lie outside, {int(outside[0])} first",
            fix=f"Use labels 0 to {width - 1}.",
        )


def _require_same_classes(ours: ImageSource, theirs: ImageSource) -> None:
    if ours.classes and theirs.classes and ours.classes != theirs.classes:
        differing = sorted(set(ours.classes) ^ set(theirs.classes))
        raise DataError(
            asked=f"validation on {theirs.where}",
            found=f"its class subfolders differ: {', '.join(differing[:5])}",
            why="a label is the position of its folder's name among all, sorted",
            fix="Give the same subfolders in both.",
        )


def _require_finite(model: nn.Module, images: Tensor, scores: Tensor) -> None:
    if not scores.isfinite().all():
        paths = [site.path for site in find_host(model)[1]]
        raise NonFiniteLoss(
            asked="evaluating a model",
            found="it gives scores that are not finite",
            where=broken_block(model, images, paths) or "its last layers",
            fix="Load good weights; in half types try float32.",
        )
