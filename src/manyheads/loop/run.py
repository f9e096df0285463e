"""The one optimisation loop; healing and training give it their losses.

It steps, clips, warms up and cools down, shows how far it is, notices a loss that is
not finite before it reaches the weights, and can stop anywhere and go on. Devices and
processes are Hugging Face accelerate's business; for now there is one process.

Nothing random carries over from step to step: every step, every epoch's order and
every image's augmentation is seeded from the run's seed and its own number. That is
why a run that goes on is bit for bit the run that was never stopped (on the CPU).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from manyheads.data import Batch, ImageSource, mix
from manyheads.errors import InvalidOption, MissingExtra, NonFiniteLoss
from manyheads.loop.interrupts import Interrupts
from manyheads.loop.journal import Journal
from manyheads.loop.stages import RunOptions, Stage, StageRecord
from manyheads.loop.weights import Keeper, free_only, keeping_modes

__all__ = ["Run", "progress_bar"]


@dataclass
class _Position:
    """How far a run is; what of it is not in the weights goes into the state file."""

    stage: int = 0
    step: int = 0
    total: int = 0
    finished: bool = False
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    losses: list[float] = field(default_factory=list)
    measured: list[dict[str, float]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class Run:
    """A run of one or more stages over one source, from wherever it stopped last.

        with Run(model, source, options, config={...}) as run:
            if not run.finished:
                run.perform(Stage(...))
                run.finish()

    Args:
        model: The model that moves, in place.
        source: Its images.
        options: How it runs.
        config: What makes this run this run, as JSON values; compared with the folder.

    Raises:
        MissingExtra: accelerate is not installed.
        InvalidOption: It was launched as several processes.
        CheckpointError: See `Journal`.
    """

    def __init__(
        self,
        model: nn.Module,
        source: ImageSource,
        options: RunOptions,
        config: Mapping[str, Any],
    ) -> None:
        self.model, self.source, self.options = model, source, options
        self.accelerator = _accelerator()
        self._journal: Journal | None = None
        if options.run_dir is not None:
            ours = {
                "images": source.identity,
                "batch_size": options.batch_size,
                "seed": options.seed,
                "max_grad_norm": options.max_grad_norm,
            }
            self._journal = Journal(options.run_dir, {**config, **ours})
        self._position = _Position()
        self._optimizer_state: dict[str, Any] | None = None
        self._stages_seen = 0
        self._interrupts = Interrupts(active=self._journal is not None)
        self._clock = time.monotonic()

    def __enter__(self) -> Run:
        try:
            state = self._journal.read(self.model) if self._journal else None
        except BaseException:
            self._close()
            raise
        if state is not None:
            self._optimizer_state = state.pop("optimizer")
            self._position = _Position(**state)
            self.source.skipped.update(self._position.skipped)
        self._clock = time.monotonic() - self._position.seconds
        self._interrupts.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._interrupts.__exit__(kind, error, trace)
        self._close()

    @property
    def finished(self) -> bool:
        """Whether everything was done by an earlier call."""
        return self._position.finished

    @property
    def notes(self) -> dict[str, Any]:
        """Plain values of the caller that are kept with the run."""
        return self._position.notes

    @property
    def seconds(self) -> float:
        """Time spent so far, in all calls together."""
        return self._position.seconds

    @property
    def records(self) -> tuple[StageRecord, ...]:
        """What happened in the stages done so far."""
        return tuple(
            StageRecord(
                name=record["name"],
                steps=record["steps"],
                losses=tuple(record["losses"]),
                measured=tuple(record["measured"]),
            )
            for record in self._position.records
        )

    def finish(self) -> None:
        """Note that all is done, so that the same call returns at once."""
        self._position.finished = True
        self._save(None)
        if self._interrupts.received:
            self._interrupts.leave()

    def perform(self, stage: Stage) -> None:
        """Follow one stage to its end; does nothing where it was done before.

        Raises:
            NonFiniteLoss: The loss or its gradient stopped being finite; the model
                holds the last weights whose loss was finite.
            KeyboardInterrupt: Ctrl-C came, and the run was saved first.
            SystemExit: SIGTERM came, and the run was saved first.
        """
        number, self._stages_seen = self._stages_seen, self._stages_seen + 1
        if number < self._position.stage:
            return
        device = next(self.model.parameters()).device
        cuda = [device] if device.type == "cuda" else []
        with (
            keeping_modes(self.model),
            torch.random.fork_rng(devices=cuda),
            progress_bar(self.options.progress) as bar,
        ):
            free_only(self.model, stage.trains)
            self._follow(stage, bar)
        here = self._position
        record = {"name": stage.name, "steps": here.step}
        here.records.append(record | {"losses": here.losses, "measured": here.measured})
        here.stage, here.step, here.losses, here.measured = number + 1, 0, [], []
        self._save(None)

    def _follow(self, stage: Stage, bar: Progress) -> None:
        here, size = self._position, self.options.batch_size
        per_epoch = math.ceil(len(self.source) / size)
        total = per_epoch * stage.epochs
        if not total:
            return
        optimizer = create_optimizer_v2(
            self.model,
            opt="adamw",
            lr=stage.learning_rate,
            weight_decay=stage.weight_decay,
        )
        schedule = CosineLRScheduler(
            optimizer,
            t_initial=total,
            warmup_t=min(total - 1, round(stage.warmup_epochs * per_epoch)),
            warmup_lr_init=stage.learning_rate / 100,
            t_in_epochs=False,
        )
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None
        optimizer = self.accelerator.prepare_optimizer(optimizer)
        keeper = Keeper(self.model)
        task = bar.add_task(stage.name, total=total, completed=here.step, told="")
        speed = _Speed()
        seed = mix(self.options.seed, stage.name)
        while here.step < total:
            epoch, within = divmod(here.step, per_epoch)
            for batch in self.source.batches(
                self.source.order(seed, epoch),
                size,
                start=within,
                augment_seed=mix(seed, epoch) if stage.augment else None,
                num_workers=self.options.num_workers,
            ):
                schedule.step_update(here.step)
                torch.manual_seed(mix(seed, "step", here.step))
                if len(batch.images):
                    loss = self._step(stage, batch, optimizer, keeper, total)
                    here.loss_sum += loss
                    here.loss_count += 1
                    rate = speed.images_per_second(len(batch.images))
                    bar.update(task, told=f"loss {loss:.4g}  {rate:,.0f} images/s")
                here.step += 1
                here.total += 1
                bar.advance(task)
                if here.step % per_epoch == 0:
                    self._end_epoch(stage, here.step // per_epoch)
                self._after_step(optimizer, keeper, stage, total)

    def _step(
        self, stage: Stage, batch: Batch, optimizer: Any, keeper: Keeper, total: int
    ) -> float:
        parts = stage.loss(batch)
        loss = torch.stack([part.float() for part in parts.values()]).sum()
        value = float(loss.detach())
        if not math.isfinite(value):
            where = stage.blame(batch)
            keeper.restore()
            raise self._not_finite(stage, total, f"the loss is {value}", where)
        optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        moving = [p for p in self.model.parameters() if p.grad is not None]
        norm = self.accelerator.clip_grad_norm_(moving, self.options.max_grad_norm)
        if not math.isfinite(float(norm)):
            where = next(
                name
                for name, p in self.model.named_parameters()
                if p.grad is not None and not p.grad.isfinite().all()
            )
            optimizer.zero_grad(set_to_none=True)
            raise self._not_finite(stage, total, f"the gradient is {norm}", where)
        keeper.keep()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    def _end_epoch(self, stage: Stage, done: int) -> None:
        here = self._position
        here.losses.append(here.loss_sum / max(1, here.loss_count))
        here.loss_sum, here.loss_count = 0.0, 0
        if stage.after_epoch is not None:
            here.measured.append(stage.after_epoch(done))

    def _after_step(
        self, optimizer: Any, keeper: Keeper, stage: Stage, total: int
    ) -> None:
        """Save where it is time for that; leave where that was asked for."""
        here = self._position
        due = here.step % self.options.checkpoint_every == 0 and self._journal
        if due or here.step == total or self._interrupts.received:
            broken = keeper.first_broken()
            if broken:
                keeper.restore()
                raise self._not_finite(
                    stage, total, "the update made weights that are not finite", broken
                )
        if self._interrupts.received:
            self._save(optimizer)
            self._interrupts.leave()
        elif due and here.step < total:
            self._save(optimizer)

    def _not_finite(
        self, stage: Stage, total: int, found: str, where: str
    ) -> NonFiniteLoss:
        return NonFiniteLoss(
            asked=f"stage {stage.name!r}, step {self._position.step + 1} of {total}",
            found=found,
            where=where,
            why="one such step would spoil every weight",
            fix="The model keeps the last weights whose loss was finite. Use a lower "
            f"learning rate than {stage.learning_rate:g}, a longer warm-up, or look "
            "at the images of this step.",
        )

    def _save(self, optimizer: Any) -> None:
        here = self._position
        here.seconds = time.monotonic() - self._clock
        here.skipped = dict(self.source.skipped)
        if self._journal is not None:
            state = dict(vars(here))
            state["optimizer"] = None if optimizer is None else optimizer.state_dict()
            self._journal.write(self.model, here.total, state)

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()


class _Speed:
    """Images per second, smoothed over the last steps."""

    def __init__(self) -> None:
        self.last, self.seconds = time.monotonic(), 0.0

    def images_per_second(self, count: int) -> float:
        now = time.monotonic()
        each, self.last = (now - self.last) / count, now
        self.seconds = 0.9 * self.seconds + 0.1 * each if self.seconds else each
        return 1.0 / max(self.seconds, 1e-9)


def progress_bar(enabled: bool) -> Progress:
    """Make a progress bar on the error stream, so that output can be piped."""
    return Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[told]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtra(
            asked="healing or training",
            found="accelerate, which runs it, is not installed",
            fix='pip install "manyheads[train]"',
        ) from error
    # Models and images stay where the user put the model.
    accelerator = Accelerator(device_placement=False)
    if accelerator.num_processes > 1:
        raise InvalidOption(
            asked=f"a run of {accelerator.num_processes} processes",
            found="this version heals and trains in one process",
            fix="Start it without a launcher.",
        )
    return accelerator
