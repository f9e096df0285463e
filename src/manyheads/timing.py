"""Latency, throughput and memory of models against each other, here and now."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InvalidOption
from manyheads.gauges.machine import conditions
from manyheads.gauges.memory import Memory, measure_memory
from manyheads.gauges.rates import Matmul, kept_promise
from manyheads.gauges.stopwatch import Spread, race, ratios, spread
from manyheads.hosts import Host, Site, find_host
from manyheads.ledger import Ledger, keep_books

__all__ = ["Bench", "BenchRow", "bench"]

_FORMAT, _VERSION = "manyheads.bench", 1
# No round is begun after so many seconds; three rounds are always run.
_BUDGET_S = 120.0


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """What one model took.

    Attributes:
        name: The model.
        latency_ms: Median time of one batch.
        latency_quartiles_ms: Lower and upper quartile of that time.
        throughput: Images per second at the median.
        ratio: Median over rounds of its time to the first model's in the same round.
        ratio_quartiles: Lower and upper quartile of that ratio.
        flops: Multiply-adds for one image, counted 1.
        parameters: Parameters.
        fed_size: Height and width that entered the network, padding included.
        peak_mib: Peak memory of a fresh process that runs it, or None.
        extra_mib: That peak less what model and images take, or None.
        promise_kept: Saved time over saved FLOPs, at 1 time falls as FLOPs do; None
            where fewer than 1 % of the FLOPs are saved.
        share_of_matmul_rate: Multiply-adds over time, as a share of a large matrix
            product's in the same rounds.
    """

    name: str
    latency_ms: float
    latency_quartiles_ms: tuple[float, float]
    throughput: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    flops: int
    parameters: int
    fed_size: tuple[int, int]
    peak_mib: float | None
    extra_mib: float | None
    promise_kept: float | None
    share_of_matmul_rate: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Models measured against each other, the first being the base.

    Attributes:
        rows: One per model, in the order given.
        image_size: Height and width that were asked for.
        batch_size: Images at a time.
        rounds: Rounds that were run.
        rounds_asked: Rounds that were asked for; fewer are run where time is short.
        warnings: What could not be measured, and why.
        conditions: Machine, versions, date, code and command.
    """

    rows: tuple[BenchRow, ...]
    image_size: tuple[int, int]
    batch_size: int
    rounds: int
    rounds_asked: int
    warnings: tuple[str, ...]
    conditions: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        whole = asdict(self)
        rows = [_listed(row) for row in whole.pop("rows")]
        head = {"format": _FORMAT, "version": _VERSION}
        return head | _listed(whole) | {"rows": rows}

    def __str__(self) -> str:
        height, width = self.image_size
        base = self.rows[0]
        cells = [_HEADER, *(_cells(row, base) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                text.ljust(w) for text, w in zip(row, widths, strict=True)
            ).rstrip()
            for row in cells
        ]
        fewer = f" of {self.rounds_asked}" if self.rounds < self.rounds_asked else ""
        fed = sorted({row.fed_size for row in self.rows} - {self.image_size})
        padded = "".join(f", padded to {h}x{w}" for h, w in fed)
        machine = self.conditions
        lines += [
            "",
            f"{height}x{width}{padded}, batch {self.batch_size}, {machine['dtype']}, "
            f"{self.rounds}{fewer} rounds, interleaved; medians [quartiles]; ratios to "
            f"{base.name} within rounds, below 1 is cheaper, ! marks worse; of the "
            "promise: saved time over saved FLOPs; matmul rate: multiply-adds over "
            "time, as a share of a large matrix product's",
            f"{machine['device_name']}, {machine['threads']} threads, "
            f"torch {machine['torch']}, {machine['date']}",
            *(f"Warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


def bench(
    *models: nn.Module,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 1,
    rounds: int = 30,
    memory: bool = True,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> Bench:
    """Time models against each other on random images, and measure their memory.

    The models and a large matrix product take turns in one process, so that a busy
    machine troubles all alike; trust ratios before milliseconds. Peak memory is that of
    a fresh process for each. The models stay as they are: copies are put in evaluation
    mode and, where another size is asked for, resized. An image that does not fill
    whole patches (1080 rows) is padded with zeros, and the result says so.

    Cost: three warm-up calls and `rounds` calls of each model, or as many rounds as
    two minutes hold, but at least three; memory takes a few seconds more for each.

    Args:
        models: Hosted models on one device; the first is the base of all ratios.
        image_size: Height and width in pixels; None for the first model's native size.
        batch_size: Images at a time.
        rounds: How often each is timed.
        memory: Whether to measure peak memory.
        names: What to call the models; by default their class and what is in them.
        progress: Whether to show a progress bar, on the error stream.

    Returns:
        Times, throughput, FLOPs and memory with ratios, rates and conditions.

    Raises:
        UnknownHost: No host knows a model.
        ImageSizeError: The size gives no valid token grid.
        InvalidOption: No model is given, models sit on different devices, names do not
            fit, or a number is not positive.
    """
    _require_options(models, image_size, batch_size, rounds, names)
    device = _common_device(models)
    hosted = [find_host(model) for model in models]
    host, _ = hosted[0]
    size = image_size or host.image_input(models[0]).size
    ledgers = [
        keep_books(model, host, sites, size)
        for model, (host, sites) in zip(models, hosted, strict=True)
    ]
    entrants = [
        _entrant(model, each, size, batch_size)
        for model, (each, _) in zip(models, hosted, strict=True)
    ]
    where = conditions(device, _dtype(models[0])) | {
        "weights": "not known to be trained or random; they do not enter time or memory"
    }
    called = list(names) if names is not None else _default_names(models, hosted)
    feeds = [each.feed for each, _ in hosted]
    matmul = Matmul(device, _dtype(models[0]))
    own, *laps = _race(matmul, entrants, feeds, rounds, device, progress)
    found = [
        measure_memory(model, images, feed) if memory else None
        for (model, images), feed in zip(entrants, feeds, strict=True)
    ]
    return Bench(
        rows=tuple(
            _row(
                *each,
                base=(laps[0], ledgers[0].total),
                rate=matmul.share(own, each[1], batch_size * each[2].total),
                batch_size=batch_size,
            )
            for each in zip(called, laps, ledgers, found, strict=True)
        ),
        image_size=size,
        batch_size=batch_size,
        rounds=len(laps[0]),
        rounds_asked=rounds,
        warnings=tuple(
            f"no peak memory for {name}: {reason}"
            for name, reason in zip(called, found, strict=True)
            if isinstance(reason, str)
        ),
        conditions=where,
    )


def _entrant(
    model: nn.Module, host: Host, size: tuple[int, int], batch_size: int
) -> tuple[nn.Module, Tensor]:
    """Copy the model, make it fit the size, and make images for it."""
    ready = copy.deepcopy(model).eval()
    height, width = host.resize(ready, size)
    channels = host.image_input(model).channels
    seeded = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, channels, *size, generator=seeded)
    padded = F.pad(images, (0, width - size[1], 0, height - size[0]))
    return ready, padded.to(next(ready.parameters()))


def _race(
    matmul: Matmul,
    entrants: Sequence[tuple[nn.Module, Tensor]],
    feeds: Sequence[Callable[[nn.Module, Tensor], Any]],
    rounds: int,
    device: torch.device,
    progress: bool,
) -> tuple[tuple[float, ...], ...]:
    console = Console(stderr=True, quiet=not progress)
    bar = Progress(console=console, transient=True, disable=not progress)
    with bar, torch.inference_mode():
        task = bar.add_task("Timing, round by round", total=rounds)
        return race(
            [
                matmul,
                *(
                    partial(feed, model, images)
                    for (model, images), feed in zip(entrants, feeds, strict=True)
                ),
            ],
            rounds=rounds,
            budget_s=_BUDGET_S,
            device=device,
            on_round=lambda done: bar.update(task, completed=done),
        )


def _row(
    name: str,
    laps: Sequence[float],
    ledger: Ledger,
    memory: Memory | str | None,
    *,
    base: tuple[Sequence[float], int],
    rate: Spread,
    batch_size: int,
) -> BenchRow:
    base_laps, base_flops = base
    time, ratio = spread(laps), ratios(laps, base_laps)
    known = memory if isinstance(memory, Memory) else None
    return BenchRow(
        name=name,
        latency_ms=1e3 * time.median,
        latency_quartiles_ms=(1e3 * time.lower, 1e3 * time.upper),
        throughput=batch_size / time.median,
        ratio=ratio.median,
        ratio_quartiles=(ratio.lower, ratio.upper),
        flops=ledger.total,
        parameters=ledger.num_parameters,
        fed_size=ledger.fed_size,
        peak_mib=known.peak_mib if known else None,
        extra_mib=known.extra_mib if known else None,
        promise_kept=kept_promise(ratio.median, ledger.total, base_flops),
        share_of_matmul_rate=rate.median,
    )


_HEADER = (
    "model",
    "ms",
    "ratio",
    "of the promise",
    "matmul rate",
    "images/s",
    "GFLOPs",
    "M parameters",
    "peak MiB",
    "of it running",
)


def _cells(row: BenchRow, base: BenchRow) -> tuple[str, ...]:
    low, high = row.latency_quartiles_ms
    least, most = row.ratio_quartiles
    return (
        row.name,
        f"{row.latency_ms:.3g} [{low:.3g}-{high:.3g}]",
        f"{row.ratio:.2f} [{least:.2f}-{most:.2f}]{_mark(row.ratio)}",
        "-" if row.promise_kept is None else f"{row.promise_kept:.2f}",
        f"{row.share_of_matmul_rate:.2f}",
        f"{row.throughput:.3g}",
        _beside(row.flops, base.flops, 1e9),
        _beside(row.parameters, base.parameters, 1e6),
        _beside(row.peak_mib, base.peak_mib, 1.0),
        _beside(row.extra_mib, base.extra_mib, 1.0),
    )


def _beside(value: int | float | None, base: int | float | None, unit: float) -> str:
    """Show a value with its ratio to the base, marked where it is worse."""
    if value is None:
        return "not measured"
    scaled = value / unit
    shown = f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.4g}"
    if not base:
        return shown
    return f"{shown} ({value / base:.2f}{_mark(value / base)})"


def _mark(ratio: float) -> str:
    return " !" if round(ratio, 2) > 1 else ""


def _default_names(
    models: Sequence[nn.Module], hosted: Sequence[tuple[Host, tuple[Site, ...]]]
) -> list[str]:
    """Name models by class and contents; equal ones are numbered."""
    names: list[str] = []
    for model, (_, sites) in zip(models, hosted, strict=True):
        kinds = Counter(repr(site.attention) for site in sites)
        kinds += Counter(repr(site.ffn) for site in sites if site.ffn is not None)
        parts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        names.append(f"{type(model).__name__} with {parts}")
    again: Counter[str] = Counter()
    for place, name in enumerate(names):
        again[name] += 1
        if again[name] > 1:
            names[place] = f"{name} #{again[name]}"
    return names


def _require_options(
    models: Sequence[nn.Module],
    image_size: tuple[int, int] | None,
    batch_size: int,
    rounds: int,
    names: Sequence[str] | None,
) -> None:
    if not models:
        raise InvalidOption(
            asked="bench()",
            found="no model is given",
            fix="Use bench(teacher, student); the first is the base of the ratios.",
        )
    for name, value in (("batch_size", batch_size), ("rounds", rounds)):
        if value < 1:
            raise InvalidOption(
                asked=f"bench({name}={value!r})",
                found="it is not a positive whole number",
                fix=f"Use {name}=1 or more.",
            )
    if image_size is not None and min(image_size) < 1:
        raise InvalidOption(
            asked=f"bench(image_size={image_size!r})",
            found="height and width are not both positive",
            fix="Use image_size=(1080, 1920), height first.",
        )
    if names is not None and len(set(names)) != len(models):
        raise InvalidOption(
            asked=f"bench(names={list(names)!r})",
            found=f"{len(set(names))} different names for {len(models)} models",
            fix="Give each model a name of its own, or leave names out.",
        )


def _common_device(models: Sequence[nn.Module]) -> torch.device:
    devices = {parameter.device for model in models for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise InvalidOption(
            asked=f"timing {len(models)} models",
            found=f"their weights are on {', '.join(sorted(map(str, devices)))}",
            why="a ratio between two devices says nothing about the models",
            fix="Move them all first: model.to('cpu') or model.to('cuda').",
        )
    return next(iter(devices))


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _listed(values: dict[str, Any]) -> dict[str, Any]:
    """Turn tuples into lists, as JSON has them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
