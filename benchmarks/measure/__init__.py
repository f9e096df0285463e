"""Measures one case: contestants are built, raced, and told as rows of JSON values."""

from __future__ import annotations

import copy
import itertools
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.kinds import Case, CoreCase, Entry, LayerCase, ModelCase
from manyheads import Hydra, Softmax, convert, cost
from manyheads.attention import AttentionSpec, Mechanism
from manyheads.gauges.stopwatch import Spread, race, ratios, spread
from manyheads.geometry import Geometry, Grid
from manyheads.hosts import find_host
from manyheads.kernels.hydra import hydra_into
from manyheads.timing import bench

__all__ = ["COPY", "GIVEN", "growth", "measure"]

COPY, GIVEN = "copy", "Hydra(), output given"
_GROWS_FROM = 1024

Call = Callable[[], object]
Row = dict[str, Any]


def measure(case: Case, device: torch.device) -> list[Row]:
    """Give the rows of a case, medians and quartiles in milliseconds."""
    torch.manual_seed(0)
    if isinstance(case, CoreCase):
        return [row for N in case.num_tokens for row in _core_rows(case, N, device)]
    if isinstance(case, LayerCase):
        return _layer_rows(case, device)
    if isinstance(case, ModelCase):
        return _model_rows(case, device)
    raise TypeError(f"no way to measure a {type(case).__name__}")


def growth(rows: Sequence[Row]) -> dict[str, float]:
    """Fit time = c N^e per form over token counts from 1,024 up; give the exponents."""
    exponents = {}
    for form in dict.fromkeys(row["form"] for row in rows):
        points = [
            (math.log(row["num_tokens"]), math.log(row["ms"]["median"]))
            for row in rows
            if row["form"] == form and row["num_tokens"] >= _GROWS_FROM
        ]
        if len(points) >= 2:
            x = [p[0] - sum(q[0] for q in points) / len(points) for p in points]
            slope = sum(a * p[1] for a, p in zip(x, points, strict=True))
            exponents[form] = slope / sum(a * a for a in x)
    return exponents


@torch.inference_mode()
def _core_rows(case: CoreCase, N: int, device: torch.device) -> list[Row]:
    """Race the linear forms with the copy, then all mechanisms with softmax.

    Two races, because a slow softmax leaves time for few rounds only.
    """
    pool = _Pool(case, N, device)
    forms = {repr(spec): _core_call(case, spec, pool) for spec in case.specs}
    softmax = repr(Softmax())
    near: dict[str, Call] = {COPY: pool.copy} | forms
    if Hydra() in case.specs:
        near[GIVEN] = pool.fill
    far = {softmax: _core_call(case, Softmax(), pool)} | forms
    close = _timed(near, case, device)
    apart = _timed(far, case, device)
    faults = {name: _page_faults(call) for name, call in (near | far).items()}
    rows = []
    for name in [softmax, *near]:
        laps = close.get(name) or apart[name]
        to_copy = ratios(close[COPY], close[name]) if name in close else None
        to_softmax = ratios(apart[name], apart[softmax]) if name in apart else None
        rows.append(
            {
                "form": name,
                "num_tokens": N,
                "batch_size": case.batch_size,
                "rounds": len(laps),
                "ms": _in_ms(spread(laps)),
                "share_of_copy_rate": _plain(to_copy),
                "to_softmax": _plain(to_softmax),
                "softmax_rounds": len(apart[softmax]),
                "page_faults": faults[name],
            }
        )
    return rows


class _Pool:
    """Inputs in turn, from a working set that no cache holds."""

    def __init__(self, case: CoreCase, N: int, device: torch.device) -> None:
        dtype = getattr(torch, case.dtype)
        B, H = case.batch_size, case.num_heads
        shape = (3, B, N, H, case.dim // H)
        size = math.prod(shape) * dtype.itemsize
        count = max(2, math.ceil(case.working_set_mib * 2**20 / size))
        sets = [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]
        self.turn: Iterator[Tensor] = itertools.cycle(sets)
        # Read q, k and v and write one output: as many bytes as copying two of them.
        self.room = torch.empty_like(sets[0][:2])
        self.output = torch.empty_like(sets[0][0].flatten(2))

    def copy(self) -> object:
        """Move as many bytes as a linear core must, and do nothing else."""
        return self.room.copy_(next(self.turn)[:2])

    def fill(self) -> object:
        """Run Hydra into memory that is there, as the copy does."""
        q, k, v = next(self.turn).flatten(3)
        return hydra_into(self.output, q, k, v)


def _core_call(case: CoreCase, spec: AttentionSpec, pool: _Pool) -> Call:
    N = pool.output.shape[1]
    grid = _grid(N - case.prefix)
    head_dim = case.dim // case.num_heads
    geometry = Geometry(
        dim=case.dim,
        num_heads=case.num_heads,
        head_dim=head_dim,
        num_prefix_tokens=case.prefix,
        grid=grid,
        scale=head_dim**-0.5,
    )
    core: Mechanism = spec.build(geometry).to(pool.output).eval()
    heads = spec.num_query_heads(geometry)

    def call() -> object:
        q, k, v = next(pool.turn)
        return core(q[:, :, :heads], k[:, :, :heads], v, None, grid)

    return call


def _grid(num_patches: int) -> Grid:
    """Lay patches out as squarely as they go."""
    rows = next(
        r for r in range(math.isqrt(num_patches), 0, -1) if num_patches % r == 0
    )
    return rows, num_patches // rows


@torch.inference_mode()
def _layer_rows(case: LayerCase, device: torch.device) -> list[Row]:
    rows = []
    models = {e.label: _model(case, e, device) for e in case.entries}
    for grid, B in itertools.product(case.grids, case.batch_sizes):
        calls, compile_s = {}, {}
        for label, model in models.items():
            layer, tokens = _layer_inputs(case, model, grid, B)
            calls[label] = _bound(layer, tokens)
            compile_s[label] = _compile(layer, calls[label]) if case.compiled else None
        laps = _timed(calls, case, device)
        base = laps[case.entries[0].label]
        rows += [
            {
                "form": label,
                "part": case.part,
                "grid": list(grid),
                "batch_size": B,
                "compiled": case.compiled,
                "compile_s": compile_s[label],
                "rounds": len(seconds),
                "ms": _in_ms(spread(seconds)),
                "ratio": _plain(ratios(seconds, base)),
            }
            for label, seconds in laps.items()
        ]
    return rows


def _layer_inputs(
    case: LayerCase, model: nn.Module, grid: Grid, batch_size: int
) -> tuple[nn.Module, Tensor]:
    sites = find_host(model)[1]
    site = sites[len(sites) // 2]
    geometry = site.geometry
    num_tokens = geometry.num_prefix_tokens + grid[0] * grid[1]
    weight = next(model.parameters())
    tokens = torch.randn(batch_size, num_tokens, geometry.dim).to(weight)
    attention: Any = model.get_submodule(site.attention_path)
    known = getattr(attention, "token_grid", None)
    if known is not None:
        # What the hook on the patch embedding would have noted.
        known.grid = grid
    path = site.attention_path if case.part == "attention" else site.path
    return model.get_submodule(path), tokens


def _model_rows(case: ModelCase, device: torch.device) -> list[Row]:
    models = [_model(case, entry, device) for entry in case.entries]
    names = [entry.label for entry in case.entries]
    rows: list[Row] = []
    for height, width, B in case.inputs:
        at = {
            "architecture": case.architecture,
            "batch_size": B,
            "compiled": case.compiled,
        }
        if case.compiled:
            rows += [
                at | row for row in _compiled_rows(case, models, (height, width), B)
            ]
            continue
        found = bench(
            *models,
            image_size=(height, width),
            batch_size=B,
            rounds=case.rounds,
            memory=case.memory,
            names=names,
            progress=False,
        ).to_json()
        told = {key: found[key] for key in ("image_size", "rounds", "warnings")}
        rows += [at | told | row for row in found["rows"]]
    return rows


@torch.inference_mode()
def _compiled_rows(
    case: ModelCase, models: Sequence[nn.Module], size: tuple[int, int], B: int
) -> list[Row]:
    """Time compiled copies, in the same columns as the eager rows."""
    calls, compile_s = {}, {}
    for entry, model in zip(case.entries, models, strict=True):
        ready = copy.deepcopy(model)
        host, _ = find_host(ready)
        fed = host.resize(ready, size)
        images = torch.randn(B, host.image_input(ready).channels, *fed)
        calls[entry.label] = _bound(ready, images.to(next(ready.parameters())))
        compile_s[entry.label] = _compile(ready, calls[entry.label])
    laps = _timed(calls, case, next(models[0].parameters()).device)
    base = laps[case.entries[0].label]
    rows = []
    for (label, seconds), model in zip(laps.items(), models, strict=True):
        time_ms, ratio = spread([1e3 * s for s in seconds]), ratios(seconds, base)
        counted = cost(model, image_size=size)
        rows.append(
            {
                "name": label,
                "image_size": list(size),
                "fed_size": list(counted.ledger.fed_size),
                "rounds": len(seconds),
                "latency_ms": time_ms.median,
                "latency_quartiles_ms": [time_ms.lower, time_ms.upper],
                "ratio": ratio.median,
                "ratio_quartiles": [ratio.lower, ratio.upper],
                "flops": counted.flops,
                "parameters": counted.num_parameters,
                "peak_mib": None,
                "extra_mib": None,
                "compile_s": compile_s[label],
            }
        )
    return rows


def _model(
    case: LayerCase | ModelCase, entry: Entry, device: torch.device
) -> nn.Module:
    name = entry.architecture or case.architecture
    model: nn.Module = timm.create_model(name, pretrained=False).eval()
    if entry.recipe is not None:
        model = convert(model, entry.recipe)
    return model.to(device=device, dtype=getattr(torch, case.dtype))


def _bound(module: nn.Module, x: Tensor) -> Call:
    return lambda: module(x)


def _compile(module: nn.Module, call: Call) -> float:
    """Compile in place and give the seconds that the first call takes."""
    torch.compiler.reset()
    module.compile()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _timed(
    calls: dict[str, Call], case: Case, device: torch.device
) -> dict[str, tuple[float, ...]]:
    laps = race(
        list(calls.values()),
        rounds=case.rounds,
        budget_s=case.budget_s,
        device=device,
    )
    return dict(zip(calls, laps, strict=True))


def _page_faults(call: Call) -> int:
    """Count the pages that one warm call makes the system hand out."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _in_ms(seconds: Spread) -> dict[str, float]:
    return {key: 1e3 * value for key, value in asdict(seconds).items()}


def _plain(found: Spread | None) -> dict[str, float] | None:
    return asdict(found) if found is not None else None
