"""One cell of the study: make the model, treat it, measure it, and say all of it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.accuracy.budget import (
    REFIT_PASSES,
    healing_work,
    images_within,
    training_work,
)
from benchmarks.accuracy.cases import Case, Setting
from benchmarks.accuracy.pictures import Data, Views
from benchmarks.accuracy.records import FORMAT, VERSION
from manyheads import Recipe, Swap, convert, cost, evaluate, heal, load, save, train
from manyheads.gauges.machine import conditions
from manyheads.hosts import find_host
from manyheads.loop.weights import fingerprint
from manyheads.training import Evaluated

__all__ = ["Cell"]

_CHECKPOINT_EVERY = 100
_TAUGHT: dict[str, Evaluated] = {}
_SUMS = ("images", "multiply_adds")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A case with a seed, its data, and the folder where weights and runs are kept.

    Attributes:
        case: What to do.
        seed: Of weights, order and augmentation.
        data: The pictures.
        runs: Folder of resumable runs and of saved models.
    """

    case: Case
    seed: int
    data: Data
    runs: Path

    @property
    def saved(self) -> Path:
        """Give the folder in which the finished model is saved."""
        return self._folder_of(self.case.name)

    def perform(self, teacher: nn.Module | None) -> dict[str, Any]:
        """Do the work and give its record.

        Args:
            teacher: The teacher of this seed; None for the teacher itself.
        """
        begun, cpu = time.monotonic(), time.process_time()
        before = conditions(torch.device("cpu"), torch.float32)
        # Before the work: a teacher may be resized by it.
        taught = fingerprint(teacher, values=True) if teacher else None
        model, work = getattr(self, f"_{self.case.treatment}")(teacher)
        measured = self._measure(model)
        if self.case.treatment != "resized":
            save(model, self.saved)
        setting = self.case.setting
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.case.kind,
            "case": self.case.to_json(),
            "seed": self.seed,
            "data": {
                "name": self.data.name,
                "digest": self.data.digest,
                "train_images": self._learned()[0].shape[0],
                "test_images": len(self.data.test[0]),
            },
            "parameters": cost(model).num_parameters,
            "flops": cost(model).flops,
            "top1": measured.top1,
            "loss": measured.loss,
            "teacher_top1": (self._measure_teacher(teacher).top1 if teacher else None),
            "weights": fingerprint(model, values=True),
            "teacher_weights": taught,
            "work": work,
            "teacher_work": training_work(teacher or model, _images(setting)),
            # Wall time says little of a run in the background; a run that was taken
            # up again has the processor time of its last part alone.
            "seconds": time.monotonic() - begun,
            "processor_seconds": time.process_time() - cpu,
            "conditions": before,
        }

    def _folder_of(self, name: str) -> Path:
        return self.runs / "models" / f"{name}-seed{self.seed}"

    def _measure(self, model: nn.Module) -> Evaluated:
        """Measure on unseen images."""
        unseen = Views(self.data.test, size=self.case.size)
        return evaluate(model, unseen, progress=False)

    def _measure_teacher(self, model: nn.Module) -> Evaluated:
        """Measure on unseen images, once for all cells of this teacher."""
        weights = fingerprint(model, values=True)
        key = f"{self.data.digest} {weights} {self.case.size}"
        if key not in _TAUGHT:
            _TAUGHT[key] = self._measure(model)
        return _TAUGHT[key]

    def _teacher(self, _: None) -> tuple[nn.Module, dict[str, Any]]:
        model = _plain(self.case.setting, self.seed)
        return self._trained(model)

    def _scratch(self, _: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        # The teacher's weights before training, swapped.
        plain = _plain(self.case.setting, self.seed)
        return self._trained(self._swapped(plain))

    def _converted(self, teacher: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        student = self._swapped(teacher)
        return student, {"images": 0, "multiply_adds": 0}

    def _calibrated(self, teacher: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        student, images = self._swapped(teacher), self._calibration()
        options: dict[str, Any] = {
            "refit_images": len(images),
            "block_epochs": 0,
            "logit_epochs": 0,
        }
        healed = heal(student, teacher, images, **options, **self._common())
        work = healing_work(student, teacher, 0, REFIT_PASSES * len(images))
        return student, _work(len(images), work, options, healed)

    def _healed(self, teacher: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        student = self._swapped(teacher)
        return student, self._heal(student, teacher, 1.0, "")

    def _progressive(self, teacher: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """Convert and heal some blocks, then some more, with equal shares of work."""
        student, done = teacher, []
        for number, blocks in enumerate(self.case.order):
            student = convert(
                student, _only(self.case.recipe, blocks), images=self._calibration()
            )
            share = 1 / len(self.case.order)
            done.append(self._heal(student, teacher, share, f"-part{number}"))
        total = {key: sum(one[key] for one in done) for key in done[0] if key in _SUMS}
        last = done[-1] | total
        return student, last | {"result": [one["result"] for one in done]}

    def _resized(self, teacher: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """Take the healed model of the table, and both models to larger pictures."""
        student = load(self._folder_of(self.case.healed_name))
        if self.case.recipe is not None and _spec(student) != _wanted(self.case):
            student = convert(student, self.case.recipe)
        for model in (student, teacher):
            find_host(model)[0].resize(model, (self.case.size, self.case.size))
        return student, {"images": 0, "multiply_adds": 0}

    def _heal(
        self, student: nn.Module, teacher: nn.Module, share: float, part: str
    ) -> dict[str, Any]:
        """Heal with this share of all the work that healing may do."""
        setting, told = self.case.setting, dict(self.case.heal)
        options = _defaults(heal) | told
        allowed = self.case.share or setting.healing_share
        most = allowed * training_work(teacher, _images(setting))
        passes = options["block_epochs"] + options["logit_epochs"]
        looked_at = REFIT_PASSES * options["refit_images"]
        count = images_within(student, teacher, share * most, passes, looked_at)
        if count < 1:
            raise ValueError(f"{self.case.name}: the refit alone is above the budget")
        views = self._views(count, labelled=False)
        told = self._common(part) | told
        healed = heal(student, teacher, views, **told)
        work = healing_work(student, teacher, passes * count, looked_at)
        return _work(passes * count, work, options, healed)

    def _trained(self, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        setting = self.case.setting
        options: dict[str, Any] = {
            "epochs": 1,
            "batch_size": setting.batch_size,
            "learning_rate": setting.learning_rate,
            "weight_decay": setting.weight_decay,
            "warmup_epochs": setting.warmup,
        }
        trained = train(
            model,
            self._views(_images(setting), labelled=True),
            seed=self.seed,
            run_dir=self._run_dir(),
            checkpoint_every=_CHECKPOINT_EVERY,
            progress=False,
            **options,
        )
        count = _images(setting)
        return model, _work(count, training_work(model, count), options, trained)

    def _swapped(self, model: nn.Module) -> nn.Module:
        if self.case.recipe is None:
            return model
        return convert(model, self.case.recipe, images=self._calibration())

    def _calibration(self) -> torch.Tensor:
        count = self.case.setting.calibration_images
        images, labels = self._learned()
        plain = Views((images[:count], labels[:count]), labelled=False)
        return plain.tensor()

    def _views(self, count: int, *, labelled: bool) -> Views:
        return Views(
            self._learned(),
            count=count,
            seed=self.seed,
            labelled=labelled,
            flips=self.case.setting.flips,
        )

    def _learned(self) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self.data.train
        count = self.case.setting.train_images
        return images[:count], labels[:count]

    def _common(self, part: str = "") -> dict[str, Any]:
        return {
            "batch_size": self.case.setting.batch_size,
            "seed": self.seed,
            "run_dir": self._run_dir(part),
            "checkpoint_every": _CHECKPOINT_EVERY,
            "progress": False,
        }

    def _run_dir(self, part: str = "") -> Path:
        return self.runs / "runs" / f"{self.case.name}-seed{self.seed}{part}"


def _plain(setting: Setting, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, **dict(setting.model)
    )
    return model.eval()


def _spec(model: nn.Module) -> object:
    return find_host(model)[1][0].attention


def _wanted(case: Case) -> object:
    return case.recipe.swaps[0].attention if case.recipe else None


def _only(recipe: Recipe | None, blocks: tuple[int, ...]) -> Recipe:
    """Keep a recipe that holds for all blocks to some of them."""
    swaps = recipe.swaps if recipe else ()
    return Recipe(
        *(Swap(blocks=blocks, attention=s.attention, ffn=s.ffn) for s in swaps)
    )


def _images(setting: Setting) -> int:
    return setting.epochs * setting.train_images


def _defaults(verb: Callable[..., Any]) -> dict[str, Any]:
    """Give the options of a verb that have defaults and matter to what it finds."""
    aside = {"run_dir", "progress", "num_workers", "checkpoint_every", "seed"}
    return {
        name: parameter.default
        for name, parameter in inspect.signature(verb).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name not in aside
    }


def _work(
    images: int, multiply_adds: int, options: dict[str, Any], result: Any
) -> dict[str, Any]:
    found = result.to_json()
    found.pop("run_dir")
    return {
        "images": images,
        "multiply_adds": multiply_adds,
        "options": options,
        "result": found,
    }
