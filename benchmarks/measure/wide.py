"""Times every way to mix values that are wider than queries, against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kinds import WideCase
from benchmarks.measure.racing import (
    MATMUL,
    Call,
    Matmul,
    Race,
    Row,
    Watch,
    in_ms,
    kept_promise,
    memory_of,
    plain,
)
from manyheads.gauges.stopwatch import ratios
from manyheads.kernels.hallucinated import Form, attend, choose_form
from manyheads.kernels.hallucinated_whole import hallucinated_attention, takes_whole

__all__ = ["SOFTMAX", "WHOLE", "mixed_wide", "wide_rows"]

SOFTMAX = "softmax, all heads"
WHOLE = "whole operator, blends included"

Prepare = Callable[[dict[str, Call]], dict[str, Call]]


class _Softmax(nn.Module):
    """All heads as torch mixes them, from one packed tensor [3, B, N, H, K]."""

    def forward(self, packed: Tensor) -> Tensor:
        """Mix the values."""
        q, k, v = packed.transpose(2, 3)
        return F.scaled_dot_product_attention(q, k, v)


class _Wide(nn.Module):
    """Half of the heads with values of twice the width, from the same tensor."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, packed: Tensor) -> Tensor:
        """Mix the values."""
        return mixed_wide(self.form, packed)


class _Whole(nn.Module):
    """The operator that convolves values and outputs as well."""

    kernel: Tensor

    def __init__(self, packed: Tensor) -> None:
        super().__init__()
        self.real = packed.shape[3] // 2
        centred = packed.new_tensor([0.0, 1.0, 0.0])
        self.register_buffer("kernel", centred.repeat(self.real, 1, 1))

    def forward(self, packed: Tensor) -> Tensor:
        """Mix the values."""
        q, k, _ = _halves(packed)
        served, scale = [1] * self.real, q.shape[-1] ** -0.5
        rest = (self.kernel, self.kernel, served, 0, None, scale)
        return cast("Tensor", hallucinated_attention(q, k, packed[2], *rest))


def mixed_wide(form: Form, packed: Tensor) -> Tensor:
    """Mix the values, two for each of half of the heads, in one of the forms."""
    q, k, v = _halves(packed)
    return attend(q, k, v.flatten(3), None, q.shape[-1] ** -0.5, form=form)


def _halves(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give queries and keys of half of the heads, and all values, two for each."""
    q, k, v = packed
    real = q.shape[2] // 2
    return q[:, :, :real], k[:, :, :real], torch.unflatten(v, 2, (real, 2))


@dataclass(frozen=True, kw_only=True)
class _Entrant:
    """A form with its multiply-adds for one image, and when it is picked."""

    module: nn.Module
    flops: int
    serves: str = ""


@torch.inference_mode()
def wide_rows(
    case: WideCase,
    device: torch.device,
    watch: Watch,
    *,
    prepare: Prepare = lambda calls: calls,
    repeats: int = 1,
) -> list[Row]:
    """Measure every form at every size.

    Args:
        case: What is timed.
        device: Where the work happens.
        watch: Told of every round.
        prepare: Turns calls into those that are timed; it may leave some out.
        repeats: How often one of those runs the form.
    """
    race = Race(case, device, len(case.sizes), watch)
    matmul = Matmul(device, getattr(torch, case.dtype))
    rows: list[Row] = []
    for N, B in case.sizes:
        shape = (3, B, N, case.num_heads, case.dim // case.num_heads)
        packed = torch.randn(shape, device=device, dtype=getattr(torch, case.dtype))
        entrants = _entrants(case, packed)
        calls: dict[str, Call] = {MATMUL: matmul}
        calls |= {name: _fed(each.module, packed) for name, each in entrants.items()}
        laps = race.run(f"N = {N:,}, batch {B}", prepare(calls))
        base = entrants[SOFTMAX].flops
        for name, each in entrants.items():
            if name not in laps:
                continue
            ratio = ratios(laps[name], laps[SOFTMAX])
            row: Row = {
                "form": name,
                "serves": each.serves,
                "num_tokens": N,
                "batch_size": B,
                "rounds": len(laps[name]),
                "ms": in_ms([seconds / repeats for seconds in laps[name]]),
                "to_softmax": plain(ratio),
                "flops": each.flops,
                "promise_kept": kept_promise(ratio.median, each.flops, base),
                "share_of_matmul_rate": matmul.rate(laps, name, B * each.flops)
                if MATMUL in laps
                else None,
            }
            if B == 1 and N in case.memory:
                watch(f"N = {N:,}, memory of {name}", 0, 1)
                row |= memory_of(each.module, packed)
            rows.append(row)
    return rows


def _entrants(case: WideCase, packed: Tensor) -> dict[str, _Entrant]:
    """Name the base, the forms and, where it can run, the whole operator."""
    N, K = packed.shape[2], packed.shape[4]
    real = case.num_heads // 2
    q, k, v = _halves(packed)
    picked, by_whole = choose_form(q, v.flatten(3)), takes_whole(q, k, v)
    otherwise = "gradients, masks, cross_map" if by_whole else "all"
    found = {SOFTMAX: _Entrant(module=_Softmax(), flops=N * N * case.num_heads * 2 * K)}
    for form in case.forms:
        # Filled up to 2 K, or a map of K for each of two runs of values.
        products = 4 if form in ("padded", "calls") else 3
        found[form] = _Entrant(
            module=_Wide(form),
            flops=N * N * real * products * K,
            serves=otherwise if form == picked else "",
        )
    if by_whole:
        flops = N * N * real * 3 * K
        found[WHOLE] = _Entrant(module=_Whole(packed), flops=flops, serves="inference")
    return found


def _fed(module: nn.Module, packed: Tensor) -> Call:
    return lambda: module(packed)
