"""What a run says while it goes: a progress bar, CSV files, and TensorBoard if asked.

    run/steps.csv    one line for every few steps: loss, learning rate, speed
    run/epochs.csv   one line for every epoch: mean loss, and what was measured

A checkpoint notes how many lines there were. A run that goes on first takes back the
lines after it, because it will write them again; so no line is ever there twice.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from manyheads.errors import CheckpointError, InvalidOption, MissingExtra

__all__ = ["Logbook", "Speed", "progress_bar"]

_DRAFT = ".writing-"


class Logbook:
    """The log files of one run; without a folder it keeps nothing.

    Args:
        folder: The folder of the run, or None.
        tensorboard: Whether to write TensorBoard events as well.
        kept: Lines of each file that belong to the step from which the run goes on.
        step: That step; TensorBoard discards what it was told of later ones.

    Raises:
        MissingExtra: TensorBoard was asked for and is not installed.
        InvalidOption: TensorBoard was asked for without a folder.
        CheckpointError: The folder cannot be written.
    """

    def __init__(
        self, folder: Path | None, *, tensorboard: bool, kept: dict[str, int], step: int
    ) -> None:
        self.folder = folder
        self.kept = dict(kept)
        self._columns: dict[str, list[str]] = {}
        self._events: Any = None
        if folder is not None:
            with _told(folder):
                for name in ("steps", "epochs"):
                    self._take_back(name)
        if tensorboard:
            self._events = _summary_writer(folder, step)

    def note(self, name: str, step: int, line: dict[str, Any]) -> None:
        """Add a line to the file of this name.

        Args:
            name: "steps" or "epochs".
            step: Steps of the whole run.
            line: Values by column; a column may be new.

        Raises:
            CheckpointError: The folder cannot be written; the last step kept is there.
        """
        if self.folder is not None:
            with _told(self.folder):
                self._append(name, line)
            self.kept[name] = self.kept.get(name, 0) + 1
        if self._events is not None:
            for column, value in line.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{name}/{column}", value, step)

    def flush(self) -> None:
        """Wait until everything noted is on the disk."""
        for name in self.kept:
            with self._path(name).open("rb") as file:
                os.fsync(file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Close the files."""
        if self._events is not None:
            self._events.close()

    def _path(self, name: str) -> Path:
        return Path(self.folder or ".") / f"{name}.csv"

    def _append(self, name: str, line: dict[str, Any]) -> None:
        path, columns = self._path(name), self._columns[name]
        new = [column for column in line if column not in columns]
        if new:
            columns += new
            _write(path, columns, _read(path)[1])
        with path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, columns).writerow(line)

    def _take_back(self, name: str) -> None:
        """Keep the lines that belong to the run, and none that was cut short."""
        path, kept = self._path(name), self.kept.get(name, 0)
        self._columns[name], lines = _read(path) if kept else ([], [])
        if kept:
            _write(path, self._columns[name], lines[:kept])
            self.kept[name] = min(kept, len(lines))
        else:
            path.unlink(missing_ok=True)


class Speed:
    """Images per second, smoothed over the last steps."""

    def __init__(self) -> None:
        self.last, self.seconds = time.monotonic(), 0.0

    def images_per_second(self, count: int) -> float:
        """Give the speed after so many images more."""
        now = time.monotonic()
        each, self.last = (now - self.last) / count, now
        self.seconds = 0.9 * self.seconds + 0.1 * each if self.seconds else each
        return self.rate

    @property
    def rate(self) -> float:
        """The speed as of the last step."""
        return 1.0 / max(self.seconds, 1e-9)


def progress_bar(enabled: bool) -> Progress:
    """Make a progress bar on the error stream, so that output can be piped."""
    return Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[told]}"),
        TimeRemainingColumn(),
        # Rich 13 ends even a bar that is disabled with an empty line.
        console=Console(stderr=True, quiet=not enabled),
        disable=not enabled,
    )


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read a file; a last line that was cut short is left out."""
    if not path.is_file():
        return [], []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    return list(reader.fieldnames or ()), list(reader)


def _write(path: Path, columns: list[str], lines: list[dict[str, str]]) -> None:
    draft = path.with_name(f"{_DRAFT}{path.name}")
    try:
        with draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(lines)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Name the run where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            asked=f"run_dir={folder}",
            found=f"its logs cannot be written: {error}",
            fix="Free space or choose another run_dir; the last step kept is there.",
        ) from error


def _summary_writer(folder: Path | None, step: int) -> Any:
    if folder is None:
        raise InvalidOption(
            asked="tensorboard=True",
            found="there is no run_dir to write its events to",
            fix='Give run_dir="runs/mine".',
        )
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra(
            asked="TensorBoard logs",
            found="tensorboard is not installed",
            fix='pip install "manyheads[tensorboard]"',
        ) from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
