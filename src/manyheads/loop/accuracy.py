"""How well a model names labelled images, in one process or in many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import Batch, Images, ImageSource, image_source
from manyheads.errors import DataError, ManyheadsError, NonFiniteLoss
from manyheads.hosts import find_host, respond
from manyheads.loop.devices import Processes, autocast
from manyheads.loop.feeding import portions
from manyheads.loop.interrupts import Stopped
from manyheads.loop.logs import progress_bar
from manyheads.loop.probes import broken_block, like, try_one
from manyheads.loop.weights import keeping_modes

__all__ = [
    "Evaluated",
    "labelled_source",
    "measure",
    "require_labels",
    "require_same_classes",
]


class _Wording(NamedTuple):
    """How messages speak of the classes of one kind of source."""

    classes: str
    number: str
    images: str
    same: str


_WORDINGS = {
    "folder": _Wording(
        "class subfolders", "its folder's name", "a folder", "subfolders"
    ),
    "table": _Wording("classes in the label column", "its class", "a table", "classes"),
    "shards": _Wording("classes in the .cls members", "its word", "shards", "classes"),
}
"""By the kind that a source states; others have classes and no more."""
_OTHER = _Wording("classes", "its class", "images", "classes")


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


@torch.no_grad()
def measure(
    model: nn.Module,
    source: ImageSource,
    processes: Processes,
    *,
    batch_size: int,
    num_workers: int = 0,
    precision: str = "fp32",
    progress: bool = False,
    received: Callable[[], int] = lambda: 0,
    sharded: bool = False,
) -> Evaluated:
    """Count hits over all images, each in one process only.

    Args:
        model: A hosted model; it keeps its training flags.
        source: Labelled images.
        processes: Who shares the images; all of them get the same answer.
        batch_size: Images at a time, all processes together.
        num_workers: Loading processes of each process.
        precision: Type of matrix products.
        progress: Whether the main process shows a progress bar.
        received: Gives the signal that asked this process to stop, or 0.
        sharded: Whether the model is in shards.

    Raises:
        DataError: No picture can be read, or labels do not fit the scores.
        NonFiniteLoss: The model gives scores that are not finite.
    """
    show = progress and processes.is_main
    sums, width, problem = [0.0, 0.0, 0.0, 0.0], 0, None
    with keeping_modes(model), progress_bar(show) as bar:
        model.eval()
        task = bar.add_task("evaluate", total=len(source), told="images")
        for batch, images, stop in portions(
            processes,
            source,
            range(len(source)),
            batch_size,
            num_workers=num_workers,
            received=received,
        ):
            if stop:
                raise Stopped(stop)
            if sharded or (len(batch.images) and problem is None):
                # Of a model in shards every process has to run its part.
                shown = batch if len(batch.images) else source.sample(1)
                try:
                    with autocast(model, precision):
                        scores = respond(model, like(shown.images, model)).float()
                    width = scores.shape[1]
                    if len(batch.images):
                        counted = _count(model, batch, scores, sharded=sharded)
                        sums = [a + b for a, b in zip(sums, counted, strict=True)]
                except ManyheadsError as error:
                    problem = error
            bar.advance(task, images)
            if processes.count == 1:
                processes.agree(problem)
    processes.agree(problem)
    loss, first, among, count = processes.sum(*sums)
    width = max(processes.gather(width))
    if not count:
        raise source.too_many()
    return Evaluated(
        top1=first / count,
        top5=among / count if width > 5 else None,
        loss=loss / count,
        images=int(count),
        skipped=tuple(sorted(source.skipped)),
    )


def labelled_source(
    model: nn.Module,
    images: Images,
    max_unreadable: float | int,
    *,
    held_out: bool,
) -> tuple[ImageSource, int]:
    """Make a source whose labels fit the model's scores, and count its classes.

    Raises:
        DataError: The images are missing, unreadable, unlabelled, labelled beyond the
            model's classes, or not what the model takes.
    """
    source = image_source(
        model, images, labelled=True, max_unreadable=max_unreadable, held_out=held_out
    )
    scores = try_one(model, source.sample(8).images, source.where, scored=True)
    if source.labels is not None:
        require_labels(source.labels, scores.shape[1])
    if source.classes and len(source.classes) != scores.shape[1]:
        wording = _wording(source)
        raise DataError(
            asked=f"labelled images from {source.where}",
            found=f"it has {len(source.classes)} {wording.classes} and the model names "
            f"{scores.shape[1]} classes",
            why=f"a label is the position of {wording.number} among all",
            fix=f"Build the model with num_classes={len(source.classes)}, in the "
            f"terminal with --model-arguments num_classes={len(source.classes)}, or "
            f"give {wording.images} with every class.",
        )
    return source, scores.shape[1]


def require_labels(labels: Tensor, width: int) -> None:
    """See that labels are classes of the model.

    Raises:
        DataError: One of them is not.
    """
    outside = labels[(labels < 0) | (labels >= width)]
    if len(outside):
        raise DataError(
            asked=f"labels for a model of {width} classes",
            found=f"{len(outside)} labels lie outside, {int(outside[0])} first",
            fix=f"Use labels 0 to {width - 1}.",
        )


def require_same_classes(ours: ImageSource, theirs: ImageSource) -> None:
    """See that a label means the same in both sources.

    Raises:
        DataError: Their classes differ, or have another order.
    """
    if ours.classes and theirs.classes and ours.classes != theirs.classes:
        differing = sorted(set(ours.classes) ^ set(theirs.classes))
        told = f": {', '.join(differing[:5])}" if differing else " in their order"
        alike = ours.identity["kind"] == theirs.identity["kind"]
        wording = _wording(theirs)
        raise DataError(
            asked=f"validation on {theirs.where}",
            found=f"its {wording.classes} differ{told}",
            why=f"a label is the position of {wording.number} among all",
            fix=f"Give the same {wording.same if alike else 'classes'} in both.",
        )


def _wording(source: ImageSource) -> _Wording:
    return _WORDINGS.get(source.identity["kind"], _OTHER)


def _count(
    model: nn.Module, batch: Batch, scores: Tensor, *, sharded: bool
) -> tuple[float, int, int, int]:
    """Give summed loss, hits, hits among five, and images of one batch."""
    width = scores.shape[1]
    require_labels(batch.labels, width)
    if not scores.isfinite().all():
        paths = [] if sharded else [site.path for site in find_host(model)[1]]
        broken = None if sharded else broken_block(model, batch.images, paths)
        raise NonFiniteLoss(
            asked="evaluating a model",
            found="it gives scores that are not finite",
            where=broken or "its last layers",
            fix="Load good weights; in half types try float32.",
        )
    labels = batch.labels.to(scores.device)
    loss = float(F.cross_entropy(scores, labels, reduction="sum"))
    hits = scores.topk(min(5, width)).indices == labels[:, None]
    return loss, int(hits[:, 0].sum()), int(hits.any(1).sum()), len(batch.images)
