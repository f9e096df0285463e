"""Times one attention layer or one block of a timm model, projections included."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.kinds import Entry, LayerCase, ModelCase
from benchmarks.measure.racing import (
    MATMUL,
    Call,
    Matmul,
    Race,
    Row,
    Watch,
    compile_in_place,
    in_ms,
    kept_promise,
    memory_of,
    plain,
)
from benchmarks.peers import make_layer, multiply_adds
from manyheads import convert, cost
from manyheads.gauges.stopwatch import Spread, ratios
from manyheads.geometry import Grid
from manyheads.hosts import find_host, mechanism_of

__all__ = ["build", "inverted", "layer_rows"]


@dataclass(frozen=True, kw_only=True)
class _Entrant:
    """A layer with the tokens it is fed and its multiply-adds for one image."""

    layer: nn.Module
    tokens: Tensor
    flops: int

    def call(self) -> object:
        """Run once."""
        return self.layer(self.tokens)


@torch.inference_mode()
def layer_rows(case: LayerCase, device: torch.device, watch: Watch) -> list[Row]:
    """Measure every entry at every grid and batch size."""
    race = Race(case, device, len(case.grids) * len(case.batch_sizes), watch)
    matmul = Matmul(device, getattr(torch, case.dtype))
    models = {entry.label: build(case, entry, device) for entry in case.entries}
    rows = []
    for grid, B in itertools.product(case.grids, case.batch_sizes):
        entrants = {
            entry.label: _entrant(case, entry, models[entry.label], grid, B)
            for entry in case.entries
        }
        compile_s = dict[str, float]()
        if case.compiled:
            torch.compiler.reset()
            compile_s = {
                label: compile_in_place(each.layer, each.call)
                for label, each in entrants.items()
            }
        calls: dict[str, Call] = {label: e.call for label, e in entrants.items()}
        where = f"{grid[0]} x {grid[1]} tokens, batch {B}"
        laps = race.run(where, {MATMUL: matmul} | calls)
        first = case.entries[0].label
        for label, each in entrants.items():
            ratio = ratios(laps[label], laps[first])
            row: Row = {
                "form": label,
                "part": case.part,
                "grid": list(grid),
                "num_tokens": each.tokens.shape[1],
                "batch_size": B,
                "compiled": case.compiled,
                "compile_s": compile_s.get(label),
                "rounds": len(laps[label]),
                "ms": in_ms(laps[label]),
                "ratio": plain(ratio),
                "speedup": plain(inverted(ratio)),
                "flops": each.flops,
                "promise_kept": kept_promise(
                    ratio.median, each.flops, entrants[first].flops
                ),
                "share_of_matmul_rate": matmul.rate(laps, label, B * each.flops),
            }
            if case.memory and not case.compiled and case.batch_sizes[0] == B:
                watch(f"{where}, memory of {label}", 0, 1)
                row |= memory_of(each.layer, each.tokens)
            rows.append(row)
    return rows


def build(case: LayerCase | ModelCase, entry: Entry, device: torch.device) -> nn.Module:
    """Build one contestant with random weights."""
    name = entry.architecture or case.architecture
    model: nn.Module = timm.create_model(name, pretrained=False).eval()
    if entry.recipe is not None:
        model = convert(model, entry.recipe)
    if entry.with_maps:
        for core in filter(None, map(mechanism_of, model.modules())):
            # The slow twin has the same arguments; torch calls what `forward` is.
            core.forward = core.reference  # type: ignore[method-assign]
    model.requires_grad_(False)
    return model.to(device=device, dtype=getattr(torch, case.dtype))


def inverted(ratio: Spread) -> Spread:
    """Turn a share of the base's time into times as fast as the base."""
    return Spread(median=1 / ratio.median, lower=1 / ratio.upper, upper=1 / ratio.lower)


def _entrant(
    case: LayerCase, entry: Entry, model: nn.Module, grid: Grid, batch_size: int
) -> _Entrant:
    host, sites = find_host(model)
    middle = len(sites) // 2
    site = sites[middle]
    geometry = site.geometry
    num_tokens = geometry.num_prefix_tokens + grid[0] * grid[1]
    weight = next(model.parameters())
    tokens = torch.randn(batch_size, num_tokens, geometry.dim).to(weight)
    if entry.peer is not None:
        layer = make_layer(entry.peer, tokens, geometry.num_heads)
        return _Entrant(
            layer=layer, tokens=tokens, flops=multiply_adds(layer, tokens[:1])
        )
    attention: Any = model.get_submodule(site.attention_path)
    known = getattr(attention, "token_grid", None)
    if known is not None:
        # What the hook on the patch embedding would have noted.
        known.grid = grid
    patch = host.image_input(model).size[0] // _side(geometry.grid)
    block = cost(model, image_size=(grid[0] * patch, grid[1] * patch)).blocks[middle]
    flops = block.projections + block.attention_matrices + block.elementwise
    if case.part == "block":
        flops += block.feed_forward
    path = site.attention_path if case.part == "attention" else site.path
    return _Entrant(layer=model.get_submodule(path), tokens=tokens, flops=flops)


def _side(grid: Grid | None) -> int:
    if grid is None:
        raise ValueError("this model does not tell the grid of its tokens")
    return grid[0]
