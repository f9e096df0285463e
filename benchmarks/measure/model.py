"""Times whole timm models, with their parameters, FLOPs and peak memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.kinds import Entry, ModelCase
from benchmarks.measure.layer import build, inverted
from benchmarks.measure.racing import (
    MATMUL,
    Call,
    Matmul,
    Race,
    Row,
    Watch,
    compile_in_place,
    kept_promise,
    memory_of,
    plain,
)
from manyheads import cost
from manyheads.errors import CostError, ImageSizeError
from manyheads.gauges.stopwatch import ratios, spread
from manyheads.hosts import find_host

__all__ = ["model_rows"]


@dataclass(frozen=True, kw_only=True)
class _Entrant:
    """A model made to fit a size, with its images."""

    model: nn.Module
    images: Tensor
    flops: int
    parameters: int
    fed_size: tuple[int, int]

    def call(self) -> object:
        """Run once."""
        return self.model(self.images)


@torch.inference_mode()
def model_rows(case: ModelCase, device: torch.device, watch: Watch) -> list[Row]:
    """Measure every entry at every input."""
    race = Race(case, device, len(case.inputs), watch)
    matmul = Matmul(device, getattr(torch, case.dtype))
    models = {entry.label: build(case, entry, device) for entry in case.entries}
    rows = []
    for height, width, B in case.inputs:
        rows += _rows_at(case, models, (height, width), B, race, matmul)
    return rows


def _rows_at(
    case: ModelCase,
    models: dict[str, nn.Module],
    size: tuple[int, int],
    B: int,
    race: Race,
    matmul: Matmul,
) -> list[Row]:
    where = f"{size[0]}x{size[1]}, batch {B}"
    entrants, problems = dict[str, _Entrant](), dict[str, str]()
    for label, model in models.items():
        try:
            entrants[label] = _entrant(model, size, B)
        except (ImageSizeError, CostError) as error:
            problems[label] = error.found
    compile_s = dict[str, float]()
    if case.compiled:
        torch.compiler.reset()
        for label, each in entrants.items():
            race.watch(f"{where}, compiling {label}", 0, 1)
            compile_s[label] = compile_in_place(each.model, each.call)
    calls: dict[str, Call] = {label: each.call for label, each in entrants.items()}
    laps = race.run(where, {MATMUL: matmul} | calls)
    first = next(iter(entrants))
    rows = []
    for entry in case.entries:
        row = _head(case, entry, size, B)
        if entry.label in problems:
            rows.append(row | {"rounds": 0, "problem": problems[entry.label]})
            continue
        label, each = entry.label, entrants[entry.label]
        time_ms = spread([1e3 * seconds for seconds in laps[label]])
        ratio = ratios(laps[label], laps[first])
        row |= {
            "fed_size": list(each.fed_size),
            "rounds": len(laps[label]),
            "latency_ms": time_ms.median,
            "latency_quartiles_ms": [time_ms.lower, time_ms.upper],
            "throughput": 1e3 * B / time_ms.median,
            "ratio": ratio.median,
            "ratio_quartiles": [ratio.lower, ratio.upper],
            "speedup": plain(inverted(ratio)),
            "flops": each.flops,
            "parameters": each.parameters,
            "promise_kept": kept_promise(
                ratio.median, each.flops, entrants[first].flops
            ),
            "share_of_matmul_rate": matmul.rate(laps, label, B * each.flops),
            "compile_s": compile_s.get(label),
            "peak_mib": None,
            "extra_mib": None,
        }
        if case.memory and not case.compiled:
            race.watch(f"{where}, memory of {label}", 0, 1)
            row |= memory_of(each.model, each.images)
        rows.append(row)
    return rows


def _head(case: ModelCase, entry: Entry, size: tuple[int, int], B: int) -> Row:
    return {
        "name": entry.label,
        "architecture": entry.architecture or case.architecture,
        "image_size": list(size),
        "batch_size": B,
        "compiled": case.compiled,
    }


def _entrant(model: nn.Module, size: tuple[int, int], B: int) -> _Entrant:
    """Copy a model and make it fit; random images fill the size that is fed."""
    counted = cost(model, image_size=size)
    ready = copy.deepcopy(model)
    host, _ = find_host(ready)
    fed = host.resize(ready, size)
    images = torch.randn(B, host.image_input(ready).channels, *fed)
    return _Entrant(
        model=ready,
        images=images.to(next(ready.parameters())),
        flops=counted.flops,
        parameters=counted.num_parameters,
        fed_size=counted.ledger.fed_size,
    )
