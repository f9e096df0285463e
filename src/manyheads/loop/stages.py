"""What a run is made of: stages, the options that hold for all, and their records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from manyheads.data import Augmentation, Batch
from manyheads.errors import InvalidOption

__all__ = [
    "Losses",
    "RunOptions",
    "Stage",
    "StageRecord",
    "require_augment",
    "require_positive",
    "require_share",
    "require_warmup",
]

Losses = Mapping[str, Tensor]
"""Parts of a loss by the place they belong to; their sum is made small."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One objective and how long it is followed.

    Attributes:
        name: For messages and records.
        epochs: Passes over all images; 0 passes the stage over.
        learning_rate: Highest rate, reached after the warm-up; a cosine brings it
            down to zero.
        weight_decay: For matrices; biases, norms and embeddings that the library
            exempts have none.
        warmup_epochs: Epochs, or a part of one, in which the rate rises.
        trains: Paths of the modules whose parameters move; "" is the whole model.
        loss: Gives the loss of a batch in parts.
        blame: Names the place at which a batch stops being finite.
        augment: What happens to images: an augmentation, or whether pictures get
            random crops and flips.
        rate_factors: Factor of the learning rate of some parameters, by their names;
            0 holds them still.
        sizes: Gives means over the images of a batch by which the loss of all of it is
            divided, and `resize` takes those of all processes and parts. Asked only
            where a batch is worked on in pieces, which cannot know them.
        resize: See `sizes`.
        num_classes: Classes of the model, where an augmentation softens labels; None
            where labels are not looked at.
        after_epoch: Called with the number of epochs done; what it gives is recorded,
            so in runs of several processes it has to be the same in all.
        told: Gives what the progress bar shows beside the loss.
    """

    name: str
    epochs: int
    learning_rate: float | int
    weight_decay: float | int
    warmup_epochs: float | int
    trains: tuple[str, ...]
    loss: Callable[[Batch], Losses]
    blame: Callable[[Batch], str]
    augment: bool | Augmentation
    rate_factors: Mapping[str, float | int] = field(default_factory=dict)
    sizes: Callable[[Batch], Mapping[str, float]] | None = None
    resize: Callable[[Mapping[str, float]], None] | None = None
    num_classes: int | None = None
    after_epoch: Callable[[int], dict[str, float]] | None = None
    told: Callable[[], str] | None = None

    @property
    def augmentation(self) -> Augmentation | None:
        """The augmentation, if one was given as such."""
        return self.augment if isinstance(self.augment, Augmentation) else None


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What happened in one stage.

    Attributes:
        name: Name of the stage.
        steps: Updates of the weights.
        losses: Mean loss of each epoch.
        measured: What was measured after each epoch, if anything was; names of what
            was measured on averaged weights begin with "average_".
        overflows: Updates that float16 was too narrow for and that were left out.
    """

    name: str
    steps: int
    losses: tuple[float, ...]
    measured: tuple[dict[str, float], ...] = ()
    overflows: int = 0


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the loop runs, whatever it optimises.

    Attributes:
        batch_size: Images per step, all processes together.
        seed: What all randomness of the run comes from.
        run_dir: Folder that makes the run resumable, or None.
        progress: Whether a progress bar is shown, on the error stream.
        num_workers: Processes that load images; 0 for this one.
        checkpoint_every: Steps between two writings to `run_dir`.
        max_grad_norm: Length to which longer gradients are cut; None for any length.
        accumulation: Parts into which a process cuts its images of a step; they go
            through the model one after another, which saves memory.
        precision: Type of matrix products: "fp32", "bf16" or "fp16".
        ema_decay: Decay of a running average of the weights; None for no average.
        layer_decay: Factor by which the learning rate falls from layer to layer, from
            the classifier down; None for one rate.
        log_every: Steps between two lines of steps.csv.
        tensorboard: Whether to write TensorBoard events to `run_dir`.
        sharded: Whether weights and optimiser are dealt out over processes.
    """

    batch_size: int
    seed: int
    run_dir: str | Path | None
    progress: bool
    num_workers: int
    checkpoint_every: int
    max_grad_norm: float | int | None
    accumulation: int = 1
    precision: str = "fp32"
    ema_decay: float | int | None = None
    layer_decay: float | int | None = None
    log_every: int = 10
    tensorboard: bool = False
    sharded: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "checkpoint_every", "accumulation", "log_every"):
            require_positive(name, getattr(self, name))
        require_positive("num_workers", self.num_workers, zero=True)
        if self.max_grad_norm is not None:
            require_positive("max_grad_norm", self.max_grad_norm)
        for name in ("ema_decay", "layer_decay"):
            require_share(name, getattr(self, name))

    def require_possible(self, count: int) -> None:
        """See that so many processes can run like this.

        Raises:
            InvalidOption: Some would never get an image, or the model cannot be dealt
                out to them.
        """
        least = count * self.accumulation
        if self.batch_size < least:
            raise InvalidOption(
                asked=f"batch_size={self.batch_size}, accumulation={self.accumulation} "
                f"in {count} processes",
                found="some of them would never get an image",
                why="a batch is what all processes see together in one step",
                fix=f"Use batch_size={least} or more.",
            )
        problem = _unshardable(self, count) if self.sharded else None
        if problem:
            raise InvalidOption(
                asked="sharded=True",
                found=problem,
                fix="Use torchrun --nproc-per-node 2, bf16 or fp32, and no ema_decay.",
            )

    def identity(self) -> dict[str, Any]:
        """Give what makes a run another run, as JSON values."""
        names = ["batch_size", "seed", "max_grad_norm", "accumulation", "precision"]
        names += ["ema_decay", "layer_decay", "sharded"]
        return {name: getattr(self, name) for name in names}


def _unshardable(options: RunOptions, count: int) -> str | None:
    if count == 1:
        return "there is one process, which would get the only shard"
    if options.ema_decay is not None:
        return "a running average would need a second set of shards"
    if options.precision == "fp16":
        return "the scale of a float16 loss is not shared between shards"
    return None


def require_augment(value: object) -> None:
    """Refuse what says nothing of augmentation, such as the name of one.

    Raises:
        InvalidOption: It is neither a truth value nor an augmentation.
    """
    if not isinstance(value, bool | Augmentation):
        raise InvalidOption(
            asked=f"augment={value!r}",
            found=f"it is a {type(value).__name__}",
            why="it is True, False, or what happens to images",
            fix="Use augment=Augmentation.deit() of manyheads.data, or another of its "
            "ready ones.",
        )


def require_warmup(value: float | int, epochs: int, name: str) -> None:
    """Refuse a warm-up that is longer than what it leads to.

    Raises:
        InvalidOption: The rate would never reach its height.
    """
    require_positive("warmup_epochs", value, zero=True)
    if value > epochs > 0:
        raise InvalidOption(
            asked=f"warmup_epochs={value}, {name}={epochs}",
            found="the rate would still rise when it is over",
            fix=f"Use warmup_epochs={epochs / 20:g}, a twentieth of it.",
        )


def require_share(name: str, value: float | int | None) -> None:
    """Refuse a factor that is neither None nor strictly between 0 and 1.

    Raises:
        InvalidOption: It is not.
    """
    if value is not None and not 0 < value < 1:
        raise InvalidOption(
            asked=f"{name}={value}",
            found="it must lie between 0 and 1, both excluded",
            fix="Leave it out for none.",
        )


def require_positive(name: str, value: float | int, *, zero: bool = False) -> None:
    """Refuse an option that is not a positive, finite number.

    Raises:
        InvalidOption: It is not; zero passes where `zero` says so.
    """
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise InvalidOption(
            asked=f"{name}={value}",
            found=f"it must be a {'non-negative' if zero else 'positive'} number",
            fix="Leave it out for the default.",
        )
