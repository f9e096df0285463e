"""The conditions of a measurement: machine, versions, date, code and command.

No number without its conditions. Nothing here names a path or a user of the machine.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["conditions", "processor"]

# What the environment tells the allocator and the threads. A tensor of a large image is
# above the 32 MiB to which glibc keeps freed memory by itself: every one is then new
# memory, whose pages the system clears first, unless MALLOC_* say otherwise. Two that
# scikit-learn sets when it is imported are left out: they move neither.
_SETTINGS = re.compile(
    r"MALLOC_\w+|GLIBC_TUNABLES|LD_PRELOAD|OMP_(?!NUM_THREADS)\w+"
    r"|KMP_(?!DUPLICATE_LIB_OK|INIT_AT_FORK)\w+|GOMP_\w+"
)


def conditions(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Say as JSON values where, when and with what something is measured.

    Args:
        device: Where the work happens.
        dtype: Type of the weights.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": device_name(device),
        "cpu": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": _load(),
        "settings": _settings(),
        "dtype": str(dtype).removeprefix("torch."),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "timm": _version("timm"),
        "manyheads": _version("manyheads"),
        "git": _git(),
        "command": _command(),
    }


def device_name(device: torch.device) -> str:
    """Name the accelerator, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()


def processor() -> str:
    """Name the CPU model as well as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    if "model" in found and found.get("cpu family"):
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def _settings() -> dict[str, str]:
    """Give the environment's words on memory and threads; names of files alone."""
    return {
        name: Path(value).name if name == "LD_PRELOAD" else value
        for name, value in sorted(os.environ.items())
        if _SETTINGS.fullmatch(name)
    }


def _load() -> float | None:
    """Give how many processes wanted to run in the last minute, where known."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> str | None:
    """Give the commit if this package runs from its own checkout, else None."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists() or not (root / "pyproject.toml").is_file():
        return None
    try:
        commit = _ask_git(root, "rev-parse", "HEAD")
        # Records are written by the run itself; code is what matters.
        changed = _ask_git(
            root, "status", "--porcelain", "--", "src", "benchmarks/*.py"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} with local changes" if changed else commit


def _ask_git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return done.stdout.strip()


def _command() -> str:
    """Give the command line without the paths of this machine."""
    words = sys.orig_argv or sys.argv
    return " ".join(Path(word).name if os.path.isabs(word) else word for word in words)
