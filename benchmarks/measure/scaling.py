"""Runs one model on small to very large images, each in a process with limits.

The process builds its own model from the recipe's JSON, so that nothing of the
measuring process is in its memory, and it reports time and peak memory itself:

    python -m benchmarks.measure.scaling < job.json

Its memory is limited by the system (`RLIMIT_DATA`): a form that wants more fails, it
does not push the machine into swapping.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import timm
import torch

import manyheads.backbones  # noqa: F401 - importing registers our own with timm
from benchmarks.kinds import Entry, ScalingCase
from benchmarks.measure.racing import Row, Watch, in_ms
from manyheads import Recipe, convert, cost
from manyheads.gauges.memory import forget_peak, give_back_freed, resident_bytes
from manyheads.hosts import find_host

__all__ = ["scaling_rows"]

_MIB = 2**20
_LEAST_ROUNDS = 3


def scaling_rows(case: ScalingCase, device: torch.device, watch: Watch) -> list[Row]:
    """Measure every entry at every size, each in its own process.

    Raises:
        ValueError: The device is not the CPU, whose memory the limits bound.
    """
    if device.type != "cpu":
        raise ValueError(f"{case.name} is measured on the CPU, not on {device.type}")
    rows = []
    for place, entry in enumerate(case.entries):
        for size in case.sizes:
            what = f"{entry.label} at {size[0]}x{size[1]}"
            watch(what, place, len(case.entries))
            rows.append(_row(case, entry, size))
    return rows


def _row(case: ScalingCase, entry: Entry, size: tuple[int, int]) -> Row:
    name = entry.architecture or case.architecture
    model = _model(name, entry.recipe, "meta")
    counted = cost(model, image_size=size)
    num_tokens = counted.blocks[0].num_tokens
    row: Row = {
        "name": entry.label,
        "image_size": list(size),
        "fed_size": list(counted.ledger.fed_size),
        "num_tokens": num_tokens,
        "batch_size": 1,
        "flops": counted.flops,
        "rounds": 0,
    }
    limit = dict(case.most_tokens).get(entry.label)
    if limit is not None and num_tokens > limit:
        return row | {"problem": f"not tried above {limit:,} tokens"}
    job = {
        "architecture": name,
        "recipe": entry.recipe.to_json() if entry.recipe else None,
        "size": list(size),
        "dtype": case.dtype,
        "threads": torch.get_num_threads(),
        "rounds": case.rounds,
        "budget_s": case.budget_s / (len(case.entries) * len(case.sizes)),
        "limit_mib": case.limit_mib,
    }
    found = _ask(job, case.limit_s)
    if isinstance(found, str):
        return row | {"problem": found}
    laps = found.pop("seconds")
    ms = in_ms(laps)
    return row | {
        "rounds": len(laps),
        "ms": ms,
        "us_per_token": 1e3 * ms["median"] / num_tokens,
        "kib_per_token": 1024 * found["extra_mib"] / num_tokens,
        **found,
    }


def _ask(job: dict[str, Any], limit_s: float) -> dict[str, Any] | str:
    """Run the job in a fresh process; give what it found or why it found nothing."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.measure.scaling"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
            env=os.environ | {"PYTHONPATH": paths},
        )
    except subprocess.TimeoutExpired:
        return f"not done after {limit_s:g} s"
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if "memory" in last.lower():
        return f"wants more than {job['limit_mib']:,} MiB"
    return f"its process ended with {done.returncode}: {last[:200]}"


@torch.inference_mode()
def _probe(job: dict[str, Any]) -> dict[str, Any]:
    """Be the other process: build, run, and tell seconds and peak memory."""
    limit = job["limit_mib"] * _MIB
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    recipe = Recipe.from_json(job["recipe"]) if job["recipe"] else None
    model = _model(job["architecture"], recipe, "cpu")
    host, _ = find_host(model)
    fed = host.resize(model, tuple(job["size"]))
    model = model.to(getattr(torch, job["dtype"]))
    images = torch.randn(1, host.image_input(model).channels, *fed)
    images = images.to(next(model.parameters()))
    give_back_freed()
    loaded = resident_bytes() or 0
    forget_peak(on_gpu=False)
    # The first call warms up and is not counted.
    first_s = _seconds(model, images)
    spent, laps = 0.0, list[float]()
    while len(laps) < job["rounds"]:
        if spent > job["budget_s"] and len(laps) >= _LEAST_ROUNDS:
            break
        laps.append(_seconds(model, images))
        spent += laps[-1]
    peak = max(loaded, resident_bytes("VmHWM") or 0)
    return {
        "seconds": laps,
        "first_s": first_s,
        "peak_mib": peak / _MIB,
        "extra_mib": (peak - loaded) / _MIB,
    }


def _model(name: str, recipe: Recipe | None, device: str) -> torch.nn.Module:
    with torch.device(device):
        model: torch.nn.Module = timm.create_model(name, pretrained=False).eval()
    model.requires_grad_(False)
    return model if recipe is None else convert(model, recipe)


def _seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    started = time.perf_counter()
    model(images)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_probe(json.load(sys.stdin))) + "\n")
