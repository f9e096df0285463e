"""The task of training: name labelled images, and be measured on others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.data import Augmentation, Batch, ImageSource
from manyheads.hosts import find_host
from manyheads.loop.accuracy import Evaluated, measure
from manyheads.loop.lessons import Lesson
from manyheads.loop.probes import broken_block, like
from manyheads.loop.run import Run
from manyheads.loop.stages import RunOptions, Stage

__all__ = ["LabelTask"]


class LabelTask:
    """Labels, and a teacher if there is one, with a look at held-out images.

    Args:
        run: The run that is entered; it says which model moves.
        lesson: What the loss is.
        held_out: Images to measure on after each epoch, or None.
        options: How the run runs.
        num_classes: Classes of the model.
        compiled: Whether the model learns through torch.compile.
    """

    def __init__(
        self,
        run: Run,
        lesson: Lesson,
        held_out: ImageSource | None,
        options: RunOptions,
        *,
        num_classes: int,
        compiled: bool,
    ) -> None:
        self.run, self.model, self.lesson = run, run.model, lesson
        self.held_out, self.options = held_out, options
        self.num_classes = num_classes
        self._host, sites = find_host(run.model)
        self.paths = [site.path for site in sites]
        # The model itself stays as it is: what looks inside it does not see through
        # compiled code.
        self._ask = torch.compile(self._answer) if compiled else self._answer
        self._hits: list[float] = []
        self._top1: float | None = None

    def stage(self, config: dict[str, Any], augment: bool | Augmentation) -> Stage:
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
            augment=augment,
            num_classes=self.num_classes,
            after_epoch=None if self.held_out is None else self.after_epoch,
            told=self.told,
        )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Give the loss of one batch."""
        self.model.train()
        images = like(batch.images, self.model)
        scores = self._ask(images)
        self._note_hits(scores, batch)
        return self.lesson.losses(scores, batch, images)

    def blame(self, batch: Batch) -> str:
        """Name the first block whose output is not finite."""
        broken = broken_block(self.model, batch.images, self.paths)
        return broken or "the comparison with labels"

    def told(self) -> str:
        """Give the accuracy last validated, else that of the last batches."""
        if self._top1 is not None:
            return f"validation {self._top1:.1%}  "
        return f"top-1 {sum(self._hits) / max(1, len(self._hits)):.1%}  "

    def after_epoch(self, done: int) -> dict[str, float]:
        """Measure on the held-out images."""
        measured = self.validate()
        if measured is None:
            return {}
        self._top1 = measured.top1
        return {"top1": measured.top1, "loss": measured.loss}

    def validate(self) -> Evaluated | None:
        """Give the full measure on the held-out images, if there are any."""
        if self.held_out is None:
            return None
        return measure(
            self.model,
            self.held_out,
            self.run.processes,
            batch_size=max(self.options.batch_size, self.run.processes.count),
            num_workers=self.options.num_workers,
            precision=self.options.precision,
            received=self.run.received,
            sharded=self.options.sharded,
        )

    def _answer(self, images: Tensor) -> Tensor:
        return self._host.output(self._host.feed(self.model, images))

    def _note_hits(self, scores: Tensor, batch: Batch) -> None:
        if self.held_out is None and self.options.progress:
            soft = batch.targets
            named = batch.labels if soft is None else soft.argmax(dim=-1)
            hits = scores.detach().argmax(dim=-1) == named.to(scores.device)
            self._hits = [*self._hits[-19:], float(hits.float().mean())]
