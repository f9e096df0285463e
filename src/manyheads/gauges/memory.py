"""Measures a model's peak memory in a process of its own.

A process that has measured one thing keeps its freed pages, so every figure needs a
fresh one. The model goes there in a file that this process writes and that one reads
a moment later, in a folder nobody else may open:

    parent   torch.save -> private folder -> python -m manyheads.gauges.memory FOLDER
    child    load, note the memory, run twice, report the peak as one line of JSON
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Memory",
    "forget_peak",
    "give_back_freed",
    "measure_memory",
    "resident_bytes",
]

_JOB = "job.pt"
_MIB = 2**20
_LIMIT_S = 1800


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory of a fresh process, in MiB.

    Attributes:
        peak_mib: Resident memory of the whole process at its peak, libraries and
            weights included; on a GPU what torch had allocated there.
        extra_mib: The peak less what was there with model and images loaded: what
            running takes.
    """

    peak_mib: float
    extra_mib: float


def measure_memory(
    model: nn.Module,
    images: Tensor,
    feed: Callable[[nn.Module, Tensor], Any] = nn.Module.__call__,
) -> Memory | str:
    """Run the model on the images in a fresh process and give its peak memory.

    Cost: starting Python and torch, a few seconds, and two passes.

    Args:
        model: In evaluation mode, on its device; it is not touched.
        images: What it is fed, on the same device.
        feed: How it is fed; a function that the other process can import.

    Returns:
        The memory, or in one clause why it could not be measured.
    """
    with tempfile.TemporaryDirectory(prefix="manyheads-memory-") as folder:
        job = {"model": model, "images": images, "feed": feed}
        job["threads"] = torch.get_num_threads()
        try:
            # Through Python's own file, whose errors say what is wrong with the disk.
            with (Path(folder) / _JOB).open("wb") as file:
                torch.save(job, file)
        except Exception as error:
            # Pickling runs the model's own code, which may raise anything.
            return f"the model cannot be handed to another process: {_line(error)}"
        return _ask(folder)


def _ask(folder: str) -> Memory | str:
    # The other process must find the same modules, those of a script included.
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "manyheads.gauges.memory", folder],
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT_S,
            env=os.environ | {"PYTHONPATH": paths},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its process did not finish: {_line(error)}"
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return f"its process ended with {done.returncode}: {last}"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if isinstance(found, str):
        return found
    return Memory(peak_mib=found["peak_mib"], extra_mib=found["extra_mib"])


def _probe(folder: str) -> dict[str, float] | str:
    """Be the child: load, run, and say how much memory that took."""
    # The file was written by the parent a moment ago, in a folder that only this user
    # can open; a model is code and cannot travel as bare tensors.
    job: dict[str, Any] = torch.load(Path(folder) / _JOB, weights_only=False)
    torch.set_num_threads(job["threads"])
    model, images, feed = job["model"], job["images"], job["feed"]
    del job
    _load_compiler()
    give_back_freed()
    on_gpu = images.device.type == "cuda"
    read = _gpu_bytes if on_gpu else resident_bytes
    loaded = read()
    if loaded is None:
        return "this system does not say how much memory a process holds"
    forget_peak(on_gpu=on_gpu)
    with torch.inference_mode():
        for _ in range(2):
            feed(model, images)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")
    peak = max(loaded, peak or 0)
    return {"peak_mib": peak / _MIB, "extra_mib": (peak - loaded) / _MIB}


def _load_compiler() -> None:
    """Load torch's compiler, as the first call of an operator written in Python would.

    It is 42 MiB of code, loaded once a process, and timm brings it as well: not what
    running takes. A model without operators of ours is not given it here.
    """
    if "manyheads.kernels.registration" in sys.modules:
        importlib.import_module("torch._dynamo")


def resident_bytes(field: str = "VmRSS") -> int | None:
    """Read the process's memory, or its peak since it was last forgotten.

    The kernel's own line is used because `getrusage` reports the peak of whatever
    process started this one, if that was larger.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def _gpu_bytes() -> int:
    return torch.cuda.memory_allocated()


def give_back_freed() -> None:
    """Let go of what loading used and freed, which running would take in silence.

    Where the C library is not glibc it may stay, and the figure is then too low for
    small images.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def forget_peak(*, on_gpu: bool) -> None:
    """Drop the peak that loading left behind."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        # Then the peak of loading stays in: the figure is too high, never too low.
        return


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_probe(sys.argv[1])) + "\n")
