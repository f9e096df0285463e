"""What a run is made of: stages, the options that hold for all, and their records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from manyheads.data import Batch
from manyheads.errors import InvalidOption

__all__ = ["Losses", "RunOptions", "Stage", "StageRecord", "require_positive"]

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
        augment: Whether pictures get random crops and flips.
        after_epoch: Called with the number of epochs done; what it gives is recorded.
    """

    name: str
    epochs: int
    learning_rate: float | int
    weight_decay: float | int
    warmup_epochs: float | int
    trains: tuple[str, ...]
    loss: Callable[[Batch], Losses]
    blame: Callable[[Batch], str]
    augment: bool
    after_epoch: Callable[[int], dict[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What happened in one stage.

    Attributes:
        name: Name of the stage.
        steps: Updates of the weights.
        losses: Mean loss of each epoch.
        measured: What was measured after each epoch, if anything was.
    """

    name: str
    steps: int
    losses: tuple[float, ...]
    measured: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the loop runs, whatever it optimises.

    Attributes:
        batch_size: Images per step.
        seed: What all randomness of the run comes from.
        run_dir: Folder that makes the run resumable, or None.
        progress: Whether a progress bar is shown, on the error stream.
        num_workers: Processes that load images; 0 for this one.
        checkpoint_every: Steps between two writings to `run_dir`.
        max_grad_norm: Length to which longer gradients are cut.
    """

    batch_size: int
    seed: int
    run_dir: str | Path | None
    progress: bool
    num_workers: int
    checkpoint_every: int
    max_grad_norm: float | int

    def __post_init__(self) -> None:
        for name in ("batch_size", "checkpoint_every"):
            require_positive(name, getattr(self, name))


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
