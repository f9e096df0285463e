"""One step: from the images of a batch to new weights.

    loss      of process p, part k      mean over its n_pk images
    weight    n_pk / N                  N images in all processes and parts together
    gradient  sum over p and k          so it is that of the mean over all N images

Wherever an image is worked on, it counts the same: shares may be uneven, and images
that could not be read are simply not there. Losses must be means over images for that;
where they are divided by a mean over the batch, that of all processes and parts is
found first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from manyheads.data import Batch, ImageSource, mix
from manyheads.errors import NonFiniteLoss
from manyheads.loop.devices import Processes, autocast
from manyheads.loop.sharding import Shards
from manyheads.loop.stages import Losses, RunOptions, Stage
from manyheads.loop.weights import Keeper, is_finite, seed_all

__all__ = ["Updater"]


class Updater:
    """Moves the weights of a model, a step at a time.

    Args:
        model: The model, with the parameters that move set free.
        stage: What its loss is.
        source: Its images; a process without a share borrows one.
        options: How it is done.
        processes: Who takes part.
        optimizer: What turns gradients into updates.
        total: Steps of the stage, for messages.
        shards: The shards of the model, if it is in shards.

    Attributes:
        overflows: Updates left out because float16 was too narrow.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        source: ImageSource,
        options: RunOptions,
        processes: Processes,
        optimizer: torch.optim.Optimizer,
        total: int,
        shards: Shards | None = None,
    ) -> None:
        self.model, self.stage, self.source = model, stage, source
        self.options, self.processes, self.optimizer = options, processes, optimizer
        self.total, self.overflows, self.shards = total, 0, shards
        self.keeper = Keeper(model)
        self._borrowed: Batch | None = None
        self._scaler = torch.amp.GradScaler(
            next(model.parameters()).device.type, enabled=options.precision == "fp16"
        )
        objective = _Objective(model, stage, options.precision)
        self._objective: Any = objective
        if processes.count > 1 and shards is None:
            self._leave_out_unused(objective)
            self._objective = processes.averaging(objective)
        self._moving = [p for p in model.parameters() if p.requires_grad]

    def state(self) -> dict[str, Any]:
        """Give what has to be kept, as tensors and plain values."""
        state = (
            self.optimizer.state_dict()
            if self.shards is None
            else self.shards.optimizer_state(self.optimizer)
        )
        return {
            "optimizer": state,
            "scaler": self._scaler.state_dict(),
            "overflows": self.overflows,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what was kept."""
        if self.shards is None:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.shards.restore_optimizer(self.optimizer, state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.overflows = state["overflows"]

    def step(self, batch: Batch, images: int, seed: int, step: int) -> float:
        """Move the weights by one batch and give its loss.

        Args:
            batch: The images of this process; there may be none.
            images: Those of all processes; there is at least one.
            seed: What dropout and stochastic depth come from.
            step: Number of the step, for messages.

        Raises:
            NonFiniteLoss: The loss or its gradient is not finite, in any process; the
                weights are the last ones whose loss was finite.
        """
        parts = self._parts(batch)
        self._share_sizes(parts, len(batch.images), images)
        total, broken = 0.0, None
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            seed_all(mix(seed, self.processes.index, number))
            # Gradients are averaged once, in the backward pass of the last part.
            with nullcontext() if last else self._alone():
                losses: Losses = self._objective(part)
                loss = _total(losses)
                weight = len(part.images) / images if len(batch.images) else 0.0
                value = float(loss.detach())
                if not math.isfinite(value) and broken is None:
                    broken = part
                total += value * weight
                if last:
                    (total,) = self.processes.sum(total)
                    if not math.isfinite(total):
                        self._raise_for_loss(total, broken, step)
                scaled = loss * (weight * self.processes.count)
                with _quiet_about_strides():
                    torch.autograd.backward(self._scaler.scale(scaled))
        self._apply(step)
        return total

    def require_finite_weights(self, step: int) -> None:
        """See that the last update left every weight finite, before it is kept.

        Raises:
            NonFiniteLoss: It did not; the update was taken back.
        """
        found = self.processes.gather(self.keeper.first_broken())
        broken = next((name for name in found if name), None)
        if broken:
            self.keeper.restore()
            raise self._not_finite(
                "the update made weights that are not finite", broken, step
            )

    def _apply(self, step: int) -> None:
        self._scaler.unscale_(self.optimizer)
        moving = [p for p in self._moving if p.grad is not None]
        limit = self.options.max_grad_norm
        length = nn.utils.clip_grad_norm_(moving, math.inf if limit is None else limit)
        norm = float(length.full_tensor() if isinstance(length, DTensor) else length)
        if math.isfinite(norm):
            self.keeper.keep()
        elif self._scaler.get_scale() > 1.0 and self._scaler.is_enabled():
            # The scaler leaves this update out and halves its scale.
            self.overflows += 1
        else:
            named = self.model.named_parameters()
            where = next(
                (n for n, p in named if p.grad is not None and not is_finite(p.grad)),
                "the shard of another process",
            )
            self.optimizer.zero_grad(set_to_none=True)
            raise self._not_finite(f"the gradient is {norm}", where, step)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _parts(self, batch: Batch) -> list[Batch]:
        """Cut the images of this process into parts; there is always one."""
        count = len(batch.images)
        if not count:
            if self._borrowed is None:
                self._borrowed = self.source.sample(1)
            return [self._borrowed]
        size = math.ceil(count / self.options.accumulation)
        soft = batch.targets
        return [
            Batch(
                batch.images[at : at + size],
                batch.labels[at : at + size],
                None if soft is None else soft[at : at + size],
            )
            for at in range(0, count, size)
        ]

    def _share_sizes(self, parts: list[Batch], ours: int, images: int) -> None:
        """Let every piece of a batch know what the loss of all of it is divided by."""
        stage, options = self.stage, self.options
        whole = self.processes.count == options.accumulation == 1
        if whole or stage.sizes is None or stage.resize is None:
            return
        found: dict[str, float] = {}
        for part in parts:
            weight = len(part.images) / images if ours else 0.0
            with torch.no_grad(), autocast(self.model, options.precision):
                sizes = stage.sizes(part)
            for name, size in sizes.items():
                found[name] = found.get(name, 0.0) + weight * size
        if found:
            shared = self.processes.sum(*found.values())
            stage.resize(dict(zip(found, shared, strict=True)))

    def _alone(self) -> Any:
        """Keep gradients to this process for now."""
        if self.processes.count == 1:
            return nullcontext()
        if self.shards is not None:
            return self.shards.alone()
        return self._objective.no_sync()

    def _leave_out_unused(self, objective: nn.Module) -> None:
        """Hold still what no loss reaches, or processes would wait for its gradient.

        One process would not move these parameters either: they have no gradient.
        """
        losses: Losses = objective(self.source.sample(2))
        torch.autograd.backward(_total(losses))
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.requires_grad_(False)
            parameter.grad = None
        self.keeper.restore()

    def _raise_for_loss(self, total: float, broken: Batch | None, step: int) -> None:
        where = "the images of another process"
        if self.shards is not None:
            where = "a block of a model in shards, which cannot be looked into"
        elif broken is not None:
            where = self.stage.blame(broken)
        self.optimizer.zero_grad(set_to_none=True)
        self.keeper.restore()
        raise self._not_finite(f"the loss is {total}", where, step)

    def _not_finite(self, found: str, where: str, step: int) -> NonFiniteLoss:
        return NonFiniteLoss(
            asked=f"stage {self.stage.name!r}, step {step + 1} of {self.total}",
            found=found,
            where=where,
            why="one such step would spoil every weight",
            fix="The model keeps the last weights whose loss was finite. Use a lower "
            f"learning rate than {self.stage.learning_rate:g}, a longer warm-up, or "
            "look at the images of this step.",
        )


@contextmanager
def _quiet_about_strides() -> Iterator[None]:
    """Pass over a remark on the layout of class tokens: one row is no matter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view")
        yield


def _total(losses: Losses) -> Tensor:
    """Add the parts up, in float32 or wider."""
    kinds = [torch.promote_types(x.dtype, torch.float32) for x in losses.values()]
    return torch.stack([x.to(kinds[0]) for x in losses.values()]).sum()


class _Objective(nn.Module):
    """The loss as a module, which is what can be wrapped for many processes."""

    def __init__(self, model: nn.Module, stage: Stage, precision: str) -> None:
        super().__init__()
        self.model, self.stage, self.precision = model, stage, precision

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Give the parts of the loss of a batch."""
        with autocast(self.model, self.precision):
            return dict(self.stage.loss(batch))
