"""What a model is taught: labels, and a teacher's scores or choices if it has one.

The soft form is Hinton's (Hinton, Vinyals, Dean, 2015, arXiv 1503.02531), the hard one
DeiT's (Touvron and others, 2020, arXiv 2012.12877, section 4). Both work on any
classifier; DeiT's distillation token is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import Batch, ImageSource
from manyheads.errors import DataError, InvalidOption, UnknownHost, nearest
from manyheads.hosts import find_host, respond
from manyheads.loop.accuracy import require_labels
from manyheads.loop.probes import like, try_one
from manyheads.loop.stages import require_positive
from manyheads.loop.weights import fingerprint, keeping_modes

__all__ = ["Lesson"]

_KINDS = ("soft", "hard")


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Labels, and how much a teacher has to say beside them.

    Attributes:
        teacher: The teacher, or None.
        distillation: "soft" for its scores, "hard" for the class it names.
        weight: Its share of the loss.
        temperature: Flattens scores before they are compared, if soft.

    Raises:
        InvalidOption: A number is out of range, or the kind is unknown.
    """

    teacher: nn.Module | None
    distillation: str
    weight: float | int
    temperature: float | int

    def __post_init__(self) -> None:
        if self.distillation not in _KINDS:
            raise InvalidOption(
                asked=f"distillation={self.distillation!r}",
                found="there is no such kind",
                fix=nearest(self.distillation, _KINDS),
            )
        if not 0 <= self.weight <= 1:
            raise InvalidOption(
                asked=f"distillation_weight={self.weight}",
                found="it is a share of the loss, from 0 to 1",
                fix="Leave it out for a half.",
            )
        require_positive("temperature", self.temperature)

    def identity(self) -> dict[str, Any]:
        """Give what makes this lesson another than others, as JSON values."""
        if self.teacher is None:
            return {}
        return {
            "teacher": fingerprint(self.teacher, values=True),
            "distillation": self.distillation,
            "distillation_weight": self.weight,
            "temperature": self.temperature,
        }

    def require_fitting(self, model: nn.Module, source: ImageSource) -> None:
        """See that the teacher takes such images and names the same classes.

        Raises:
            DataError: It does not.
        """
        if self.teacher is None:
            return
        images = source.sample(1).images
        ours = try_one(model, images, source.where, scored=True)
        with keeping_modes(self.teacher):
            try:
                problem = _difference(ours, self._target(images))
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                problem = f"it refuses an image {list(images.shape[1:])}: {error}"
        if problem is None and not _see_alike(model, self.teacher):
            problem = "its images are normalised otherwise than the model's"
        if problem:
            raise DataError(
                asked=f"a {type(self.teacher).__name__} as teacher",
                found=problem,
                why="both are shown the same tensors, and their scores are compared",
                fix="Give a teacher of the same classes, image size and preprocessing.",
            )

    def losses(self, scores: Tensor, batch: Batch, images: Tensor) -> dict[str, Tensor]:
        """Give the parts of the loss, each a mean over images.

        Args:
            scores: The model's, [n, classes].
            batch: Labels, or shares of classes where they were softened.
            images: What the teacher is shown.
        """
        # In float32 or wider: half types have too few digits for a sum over classes.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if batch.targets is None:
            require_labels(batch.labels, scores.shape[1])
            told = F.cross_entropy(scores, batch.labels.to(scores.device))
        else:
            shares = batch.targets.to(scores.device, scores.dtype)
            told = F.cross_entropy(scores, shares)
        if self.teacher is None:
            return {"labels": told}
        with torch.no_grad():
            target = self.teacher.eval()(like(images, self.teacher))
        target = target.to(scores.device, scores.dtype)
        if self.distillation == "hard":
            taught = F.cross_entropy(scores, target.argmax(dim=-1))
        else:
            taught = self.temperature**2 * F.kl_div(
                F.log_softmax(scores / self.temperature, dim=-1),
                F.log_softmax(target / self.temperature, dim=-1),
                reduction="batchmean",
                log_target=True,
            )
        return {"labels": (1 - self.weight) * told, "teacher": self.weight * taught}

    @torch.no_grad()
    def _target(self, images: Tensor) -> Tensor:
        """Give the teacher's scores; it need not be a model that any host knows."""
        teacher = self.teacher
        if teacher is None:
            raise TypeError("there is no teacher")
        shown = like(images, teacher.eval())
        try:
            return respond(teacher, shown)
        except UnknownHost:
            target = teacher(shown)
        if not isinstance(target, Tensor):
            raise TypeError(f"it answers with a {type(target).__name__}, not a tensor")
        return target


def _difference(ours: Tensor, theirs: Tensor) -> str | None:
    if ours.shape[1:] == theirs.shape[1:]:
        return None
    return (
        f"the model gives scores {list(ours.shape[1:])} and the teacher "
        f"{list(theirs.shape[1:])}"
    )


def _see_alike(model: nn.Module, teacher: nn.Module) -> bool:
    """Whether both want images normalised alike, as far as that is known."""
    try:
        theirs = find_host(teacher)[0].image_input(teacher)
    except UnknownHost:
        return True
    ours = find_host(model)[0].image_input(model)
    return (ours.mean, ours.std) == (theirs.mean, theirs.std)
