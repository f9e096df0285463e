"""The folder of a run: what it is, how far it got, and how to go on from there.

    run/run.json                         the configuration; another one is refused
    run/step-120.0/model.safetensors     the weights
    run/step-120.0/average.safetensors   their running average, if there is one
    run/step-120.0/state.pt              optimiser and position: tensors, plain values
    run/step-120.0/sums.json             digests of the others, written last

A step is written under another name and moved to its place when it is whole and on
the disk, so that a process that dies while writing leaves the step before it. The last
two are kept: should the newer one be damaged later, the run goes on from the older.
Reading runs nobody's code.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from manyheads.errors import CheckpointError

__all__ = ["Journal"]

FORMAT, VERSION = "manyheads.run", 2
CARD, STATE, SUMS = "run.json", "state.pt", "sums.json"
KEPT = 2
_DRAFT = ".writing-"
_DAMAGE = (
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    pickle.UnpicklingError,
)


class Journal:
    """Reads and writes the folder of one run; one process at a time.

    Args:
        folder: The folder; made if it is not there.
        config: What the run is, as JSON values. A folder of another run is refused.

    Raises:
        CheckpointError: The folder belongs to another run or to something else, is in
            use by another process, or cannot be written.
    """

    def __init__(self, folder: str | Path, config: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.config = json.loads(json.dumps(config))
        if self.folder.exists() and not self.folder.is_dir():
            raise self._error("it is a file", "Choose another run_dir.")
        # The terminal keeps the command that asked beside the run.
        foreign = self.folder.is_dir() and any(
            not entry.name.startswith(".") and entry.name != "config.json"
            for entry in self.folder.iterdir()
        )
        if foreign and not (self.folder / CARD).is_file():
            raise self._error(
                "it holds something that is no run",
                "Choose a new or an empty folder as run_dir.",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._remove_drafts()
            if foreign:
                self._require_same_config()
            else:
                self._write_card()
        except OSError as error:
            self.close()
            raise self._unwritable(error) from error
        except CheckpointError:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes use the folder."""
        self._lock.release()

    def write(
        self, models: Mapping[str, nn.Module], position: int, state: dict[str, Any]
    ) -> None:
        """Keep weights and state of a step, and the step kept before it.

        Args:
            models: Each one's whole state dict is kept, in a file of its name.
            position: Steps done so far in the whole run.
            state: Tensors and plain values.

        Raises:
            CheckpointError: The folder cannot be written; the steps before are there.
        """
        earlier = self._steps()
        # One more than the last of this position, not their number: some are gone.
        same = [
            _position(step)[1] for step in earlier if _position(step)[0] == position
        ]
        again = max(same, default=-1) + 1
        target = self.folder / f"step-{position}.{again}"
        draft = self.folder / f"{_DRAFT}{position}"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            for name, model in models.items():
                save_model(model, str(draft / f"{name}.safetensors"))
            # Through Python's own file: torch's says of a full disk "unexpected pos".
            with (draft / STATE).open("wb") as stream:
                torch.save(state, stream)
            sums = {file.name: _digest(file) for file in draft.iterdir()}
            (draft / SUMS).write_text(json.dumps(sums), encoding="utf-8")
            for file in draft.iterdir():
                _flush(file)
            draft.rename(target)
            _flush(self.folder)
            self._retire(earlier[: 1 - KEPT])
        except (OSError, SafetensorError, RuntimeError) as error:
            raise self._unwritable(error) from error
        finally:
            self._remove_drafts()

    def read(self, models: Mapping[str, nn.Module]) -> dict[str, Any] | None:
        """Bring models back to the last step kept; None if there is none yet.

        A step that was cut short or altered after it was written is passed over with a
        warning, for the one before it.

        Raises:
            CheckpointError: No step that was kept is whole; the models are as before.
        """
        steps, problems = self._steps(), []
        for step in reversed(steps):
            try:
                state = _read_step(step, models)
            except _DAMAGE as error:
                problems.append(f"{step.name} is cut short or altered: {error}")
                continue
            if problems:
                warnings.warn(
                    f"In run_dir={self.folder} {'; '.join(problems)}. The run goes on "
                    f"from {step.name}.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                for damaged in steps[steps.index(step) + 1 :]:
                    shutil.rmtree(damaged)
            # A run that was killed between writing a step and this left one too many.
            self._retire(self._steps()[:-KEPT])
            self._remove_drafts()
            return state
        if problems:
            raise self._error(
                "; ".join(problems),
                f"Remove {' and '.join(map(str, steps))} to start the run again.",
            )
        return None

    def _retire(self, steps: Sequence[Path]) -> None:
        for step in steps:
            # Under another name first, so that no half of it can be picked up.
            step.rename(self.folder / f"{_DRAFT}{step.name}")

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.*"), key=_position)

    def _write_card(self) -> None:
        card = {"format": FORMAT, "version": VERSION, "config": self.config}
        draft = self.folder / f"{_DRAFT}{CARD}"
        draft.write_text(json.dumps(card, indent=2), encoding="utf-8")
        _flush(draft)
        draft.rename(self.folder / CARD)

    def _require_same_config(self) -> None:
        try:
            card = json.loads((self.folder / CARD).read_text(encoding="utf-8"))
            known = card["format"] == FORMAT and card["version"] == VERSION
            there = card["config"] if known else None
        except (ValueError, KeyError, TypeError):
            there = None
        if not isinstance(there, dict):
            raise self._error(
                f"{CARD} is not of the format {FORMAT!r} version {VERSION}",
                "Choose a new folder as run_dir.",
            )
        differing = sorted(
            name
            for name in there.keys() | self.config.keys()
            if there.get(name) != self.config.get(name)
        )
        if differing:
            told = "; ".join(
                f"{name} was {there.get(name)!r} and is {self.config.get(name)!r}"
                for name in differing
            )
            raise self._error(
                f"it belongs to another run: {told}",
                "Choose a new folder, or call it as it was called before.",
            )

    def _take_lock(self) -> FileLock:
        # Other threads and forked loading processes must neither hold nor free it.
        lock = FileLock(self.folder / ".lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise self._error(
                "another process is running in it",
                "Wait for it to end, or choose another run_dir.",
            ) from error
        return lock

    def _remove_drafts(self) -> None:
        for draft in self.folder.glob(f"{_DRAFT}*"):
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink(missing_ok=True)

    def _unwritable(self, error: Exception) -> CheckpointError:
        # torch closes its archive after the disk refused, and fails once more.
        first = error.__context__
        return self._error(
            f"it cannot be written: {first if isinstance(first, OSError) else error}",
            "Free space or choose another run_dir; the last step kept is as it was.",
        )

    def _error(self, found: str, fix: str) -> CheckpointError:
        return CheckpointError(asked=f"run_dir={self.folder}", found=found, fix=fix)


def _read_step(step: Path, models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Check every file before the first model is touched."""
    files = {name: step / f"{name}.safetensors" for name in models}
    sums = json.loads((step / SUMS).read_text(encoding="utf-8"))
    for file in (*files.values(), step / STATE):
        if _digest(file) != sums[file.name]:
            raise ValueError(f"{file.name} does not have the digest noted for it")
    state: dict[str, Any] = torch.load(
        step / STATE, map_location="cpu", weights_only=True
    )
    for name, model in models.items():
        load_model(model, files[name], strict=True)
    return state


def _position(step: Path) -> tuple[int, int]:
    """Read steps done and the number of the writing from a folder's name."""
    done, _, again = step.name.removeprefix("step-").partition(".")
    return (int(done), int(again)) if (done + again).isdigit() else (-1, 0)


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
