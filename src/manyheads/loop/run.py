"""The one optimisation loop; healing and training give it their losses.

It steps, clips, warms up and cools down, shows how far it is, notices a loss that is
not finite before it reaches the weights, and can stop anywhere and go on. Devices and
processes are Hugging Face accelerate's business.

Nothing random carries over from step to step: every step, every epoch's order and
every image's augmentation is seeded from the run's seed and its own number. That is
why a run that goes on is bit for bit the run that was never stopped (on the CPU).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import Progress
from torch import nn

from manyheads.data import ImageSource, mix
from manyheads.errors import DataError
from manyheads.hosts import find_host
from manyheads.loop.averaging import Average
from manyheads.loop.devices import Processes, require_precision
from manyheads.loop.feeding import portions
from manyheads.loop.interrupts import Interrupts, Stopped
from manyheads.loop.journal import Journal
from manyheads.loop.logs import Logbook, Speed, progress_bar
from manyheads.loop.position import Position
from manyheads.loop.rates import optimizer_and_schedule
from manyheads.loop.sharding import Shards
from manyheads.loop.stages import RunOptions, Stage, StageRecord
from manyheads.loop.updates import Updater
from manyheads.loop.weights import (
    Origin,
    free_only,
    keeping_modes,
    keeping_randomness,
)

__all__ = ["Run"]


class Run:
    """A run of one or more stages over one source, from wherever it stopped last.

        with Run(model, source, options, config={...}) as run:
            if not run.finished:
                run.perform(Stage(...))
                run.finish()

    Launched as several processes, each of them makes the same run. If images end it by
    an error, the model gets back what it came with, unless it is in shards: then
    every process would hold one more copy of the whole.

    Args:
        model: The model that moves, in place.
        source: Its images.
        options: How it runs.
        config: What makes this run this run, as JSON values; compared with the folder.
        beside: Models that are only read; they go to the run's device with it.

    Raises:
        MissingExtra: accelerate, or TensorBoard where it was asked for, is missing.
        InvalidOption: The batch is too small for the processes, or the device lacks
            the precision.
        CheckpointError: See `Journal`.
    """

    def __init__(
        self,
        model: nn.Module,
        source: ImageSource,
        options: RunOptions,
        config: Mapping[str, Any],
        *,
        beside: Sequence[nn.Module] = (),
    ) -> None:
        self.model, self.source, self.options = model, source, options
        self._beside = tuple(beside)
        self.processes = Processes()
        options.require_possible(self.processes.count)
        self._journal: Journal | None = None
        if options.run_dir is not None:
            folder = options.run_dir
            ours = {"images": source.identity, "processes": self.processes.count}
            told = {**config, **ours, **options.identity()}
            self._journal = self.processes.on_main(lambda: Journal(folder, told))
        self._position = Position()
        self._average: Average | None = None
        self._shards: Shards | None = None
        self._whole = model
        self._origin: Origin | None = None
        self._updater_state: dict[str, Any] | None = None
        self._stages_seen = 0
        self._interrupts = Interrupts(active=options.run_dir is not None)
        self._clock = time.monotonic()
        self._held = ExitStack()
        self._logbook: Logbook

    def __enter__(self) -> Run:
        try:
            self._held.callback(self._close)
            ours = [] if self.options.sharded else [self.model]
            self._held.enter_context(self.processes.placed(*ours, *self._beside))
            require_precision(self.model, self.options.precision)
            if self.options.sharded:
                paths = [site.path for site in find_host(self.model)[1]]
                self._shards = Shards(self.model, paths, self.processes)
                self.model = self._shards.module
            else:
                self._origin = Origin(self.model)
            self._go_on()
            folder = self.options.run_dir if self.processes.is_main else None
            self._logbook = Logbook(
                None if folder is None else Path(folder),
                tensorboard=self.options.tensorboard and self.processes.is_main,
                kept=self._position.lines,
                step=self._position.total,
            )
            self._held.callback(self._logbook.close)
        except BaseException:
            self._held.close()
            raise
        self._clock = time.monotonic() - self._position.seconds
        self._held.enter_context(self._interrupts)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, DataError) and self._origin is not None:
            self._origin.restore()
        self._held.close()
        if isinstance(error, Stopped):
            error.leave()

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
        return self._position.told()

    def received(self) -> int:
        """Give the signal that asked this process to stop, or 0."""
        return self._interrupts.received

    def settle(self) -> None:
        """Give the model the averaged weights, if there are any, for good."""
        if self._average is not None and not self._position.settled:
            self._average.settle()
        self._position.settled = True

    def finish(self) -> None:
        """Note that all is done, so that the same call returns at once."""
        self.settle()
        self._position.finished = True
        self._save(None)
        if self._interrupts.received:
            raise Stopped(self._interrupts.received)

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
        show = self.options.progress and self.processes.is_main
        with (
            keeping_modes(self.model),
            keeping_randomness(next(self.model.parameters()).device),
            progress_bar(show) as bar,
        ):
            still = [name for name, factor in stage.rate_factors.items() if not factor]
            free_only(self.model, stage.trains, but=still)
            if self._average is not None and stage.epochs and not self._position.step:
                self._average.begin()
            overflows = self._follow(stage, bar)
        self._position.end_stage(stage.name, overflows)
        self._save(None)

    def _follow(self, stage: Stage, bar: Progress) -> int:
        """Do the steps that are left, and give the number of overflows of all."""
        here, size = self._position, self.options.batch_size
        per_epoch = math.ceil(len(self.source) / size)
        total = per_epoch * stage.epochs
        if not total:
            return 0
        optimizer, schedule = optimizer_and_schedule(
            self.model, stage, self.options, per_epoch
        )
        updater = Updater(
            self.model,
            stage,
            self.source,
            self.options,
            self.processes,
            optimizer,
            total,
            self._shards,
        )
        if self._updater_state is not None:
            updater.restore(self._updater_state)
            self._updater_state = None
        task = bar.add_task(stage.name, total=total, completed=here.step, told="")
        speed, seed = Speed(), mix(self.options.seed, stage.name)
        repeats = stage.augmentation.repeats if stage.augmentation else 1
        self._end_epoch(stage, updater, per_epoch)
        while here.step < total:
            epoch, within = divmod(here.step, per_epoch)
            for batch, images, stop in portions(
                self.processes,
                self.source,
                self.source.order(seed, epoch, repeats=repeats),
                size,
                start=within,
                augment_seed=mix(seed, epoch) if stage.augment else None,
                augmentation=stage.augmentation,
                num_classes=stage.num_classes,
                num_workers=self.options.num_workers,
                received=self.received,
            ):
                if stop:
                    self._save(updater)
                    raise Stopped(stop)
                schedule.step_update(here.step)
                if images:
                    seed_of_step = mix(seed, "step", here.step)
                    loss = updater.step(batch, images, seed_of_step, here.step)
                    self._after_update(loss)
                    rate = speed.images_per_second(images)
                    told = stage.told() if stage.told is not None else ""
                    told = f"loss {loss:.4g}  {told}{rate:,.0f} images/s"
                    bar.update(task, told=told)
                here.step += 1
                here.total += 1
                bar.advance(task)
                self._log_step(stage, optimizer, speed, per_epoch)
                self._end_epoch(stage, updater, per_epoch)
                if here.step % self.options.checkpoint_every == 0 and here.step < total:
                    self._save(updater)
        return updater.overflows

    def _after_update(self, loss: float) -> None:
        here = self._position
        here.loss_sum += loss
        here.loss_count += 1
        here.recent_sum += loss
        here.recent_count += 1
        if self._average is not None:
            self._average.update(here.step + 1)

    def _log_step(
        self, stage: Stage, optimizer: Any, speed: Speed, per_epoch: int
    ) -> None:
        here = self._position
        if here.step % self.options.log_every or not here.recent_count:
            return
        line = {
            "stage": stage.name,
            "epoch": here.step / per_epoch,
            "step": here.total,
            "loss": here.recent_sum / here.recent_count,
            "learning_rate": max(group["lr"] for group in optimizer.param_groups),
            "images_per_second": round(speed.rate, 1),
            "seconds": round(time.monotonic() - self._clock, 1),
        }
        here.recent_sum, here.recent_count = 0.0, 0
        self._logbook.note("steps", here.total, line)

    def _end_epoch(self, stage: Stage, updater: Updater, per_epoch: int) -> None:
        """Measure and note an epoch, if one is over and was not noted yet."""
        here = self._position
        done, within = divmod(here.step, per_epoch)
        if within or done == len(here.losses):
            return
        updater.require_finite_weights(here.step - 1)
        self._spread_buffers()
        try:
            measured = self._measure(stage, done)
        except Stopped:
            self._save(updater)
            raise
        here.losses.append(here.loss_sum / max(1, here.loss_count))
        here.loss_sum, here.loss_count = 0.0, 0
        if measured is not None:
            here.measured.append(measured)
        line = {
            "stage": stage.name,
            "epoch": done,
            "step": here.total,
            "loss": here.losses[-1],
            "seconds": round(time.monotonic() - self._clock, 1),
        }
        told = {f"validation_{name}": x for name, x in (measured or {}).items()}
        self._logbook.note("epochs", here.total, line | told)

    def _measure(self, stage: Stage, done: int) -> dict[str, float] | None:
        """Ask what the stage measures, of the weights and then of their average."""
        if stage.after_epoch is None:
            return None
        measured = stage.after_epoch(done)
        if self._average is not None:
            with self._average.worn():
                averaged = stage.after_epoch(done)
            measured |= {f"average_{name}": x for name, x in averaged.items()}
        return measured

    def _models(self) -> dict[str, nn.Module]:
        """Give what is kept as weights, by the name of its file."""
        models = {"model": self._whole}
        if self._average is not None:
            models["average"] = self._average.module
        return models

    def _go_on(self) -> None:
        """Take up the run where the folder left it; give all processes the same."""
        if self.options.ema_decay is not None:
            self._average = Average(self.model, self.options.ema_decay)
        if self.options.run_dir is not None:
            state = self.processes.tell(self.processes.on_main(self._read))
            if state is not None:
                self._updater_state = state.pop("updater")
                self._position = Position(**state)
                self.source.skipped.update(self._position.skipped)
        for model in self._models().values():
            self.processes.spread(list(model.state_dict().values()))
        if self._shards is not None:
            self._shards.deal()

    def _read(self) -> dict[str, Any] | None:
        return None if self._journal is None else self._journal.read(self._models())

    def _save(self, updater: Updater | None) -> None:
        here = self._position
        if updater is not None:
            updater.require_finite_weights(here.step - 1)
        here.seconds = time.monotonic() - self._clock
        here.skipped = dict(self.source.skipped)
        if self._shards is not None:
            self._shards.collect()
        if self.options.run_dir is not None:
            moments = None if updater is None else updater.state()
            self.processes.on_main(lambda: self._write(moments))

    def _write(self, updater: dict[str, Any] | None) -> None:
        self._logbook.flush()
        here = self._position
        here.lines = dict(self._logbook.kept)
        state = dict(vars(here))
        state["updater"] = updater
        if self._journal is not None:
            self._journal.write(self._models(), here.total, state)

    def _spread_buffers(self) -> None:
        """Let all processes have the main one's statistics of batch norms."""
        for model in self._models().values():
            self.processes.spread(list(model.buffers()))

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
