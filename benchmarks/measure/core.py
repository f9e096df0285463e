"""Times mechanisms on projected tokens, beside a plain copy and a matrix product."""

from __future__ import annotations

import itertools
import math
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.kinds import COPY, GIVEN, CoreCase
from benchmarks.measure.racing import (
    MATMUL,
    Call,
    Laps,
    Matmul,
    Race,
    Row,
    Watch,
    compile_in_place,
    in_ms,
    kept_promise,
    memory_of,
    plain,
    scaled,
)
from benchmarks.peers import CORES
from manyheads import Hydra, Interactive, Softmax
from manyheads.attention import AttentionSpec
from manyheads.gauges.stopwatch import ratios
from manyheads.geometry import Geometry, Grid
from manyheads.kernels.hydra import hydra_into

__all__ = ["core_rows"]

_SOFTMAX = repr(Softmax())
_LINEAR = (Hydra, Interactive)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """One way of doing one mechanism's work.

    Attributes:
        module: Takes packed q, k and v [3, B, N, H, K].
        flops: Multiply-adds of one call.
        moved: Elements that must be read or written, as a share of q, k, v and output.
        linear: Whether it is raced with the copy: it must not take much longer.
    """

    module: nn.Module
    flops: int
    moved: float
    linear: bool


class _Mechanism(nn.Module):
    """A mechanism that takes q, k and v as one tensor, as other processes need it."""

    def __init__(self, spec: AttentionSpec, geometry: Geometry, slow: bool) -> None:
        super().__init__()
        self.core = spec.build(geometry)
        self.grid = geometry.grid
        self.heads = spec.num_query_heads(geometry)
        self.slow = slow

    def forward(self, packed: Tensor) -> Tensor:
        """Mix the values."""
        q, k, v = packed
        q, k = q[:, :, : self.heads], k[:, :, : self.heads]
        if self.slow:
            return self.core.reference(q, k, v, None, self.grid)
        mixed: Tensor = self.core(q, k, v, None, self.grid)
        return mixed


class _Peer(nn.Module):
    """Another package's core on the same tensor."""

    def __init__(self, core: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.core = core

    def forward(self, packed: Tensor) -> Tensor:
        """Mix the values."""
        return self.core(*packed.flatten(3))


@torch.inference_mode()
def core_rows(case: CoreCase, device: torch.device, watch: Watch) -> list[Row]:
    """Measure every form at every token count."""
    linear = any(isinstance(spec, _LINEAR) for spec in case.specs)
    race = Race(case, device, (1 + linear) * len(case.num_tokens), watch)
    matmul = Matmul(device, getattr(torch, case.dtype))
    return [
        row for N in case.num_tokens for row in _rows_at(case, N, race, matmul, device)
    ]


def _rows_at(
    case: CoreCase, N: int, race: Race, matmul: Matmul, device: torch.device
) -> list[Row]:
    """Race the linear forms with the copy, then all forms with softmax.

    Two races, because a slow softmax leaves time for few rounds only.
    """
    pool = _Pool(case, N, device)
    forms = _forms(case, N, pool)
    compile_s = _compile(case, forms, pool)
    calls: dict[str, Call] = {n: pool.feed(form.module) for n, form in forms.items()}
    near: dict[str, Call] = {COPY: pool.copy}
    near |= {name: calls[name] for name, form in forms.items() if form.linear}
    if Hydra() in case.specs:
        near[GIVEN] = pool.fill
    far: dict[str, Call] = {MATMUL: matmul, COPY: pool.copy, **calls}
    close = race.run(f"N = {N:,}, with a copy", near) if len(near) > 1 else {}
    apart = race.run(f"N = {N:,}, with softmax", far)
    base = forms[_SOFTMAX].flops
    rows: list[Row] = []
    for name in [_SOFTMAX, *near, *(n for n in forms if n not in near)]:
        if any(row["form"] == name for row in rows):
            continue
        form = forms.get(name)
        laps = close.get(name) or apart[name]
        to_softmax = ratios(apart[name], apart[_SOFTMAX]) if form else None
        row: Row = {
            "form": name,
            "num_tokens": N,
            "batch_size": case.batch_size,
            "rounds": len(laps),
            "ms": in_ms(laps),
            "share_of_copy_rate": _copy_rate(close, apart, name, form),
            "to_softmax": plain(to_softmax),
            "softmax_rounds": len(apart[_SOFTMAX]),
            "page_faults": _page_faults((near | far)[name]),
        }
        if form is not None and to_softmax is not None:
            row["flops"] = form.flops
            row["promise_kept"] = kept_promise(to_softmax.median, form.flops, base)
            row["share_of_matmul_rate"] = matmul.rate(
                apart, name, case.batch_size * form.flops
            )
            if name in compile_s:
                row["compile_s"] = compile_s[name]
            elif N in case.memory:
                packed = pool.take()
                race.watch(f"N = {N:,}, memory of {name}", 0, 1)
                row |= memory_of(form.module, packed)
        rows.append(row)
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

    def take(self) -> Tensor:
        """Give the next q, k and v in memory of their own."""
        return next(self.turn).clone()

    def feed(self, module: nn.Module) -> Call:
        """Make a call that takes the next inputs each time."""
        return lambda: module(next(self.turn))

    def copy(self) -> object:
        """Move as many bytes as a linear core must, and do nothing else."""
        return self.room.copy_(next(self.turn)[:2])

    def fill(self) -> object:
        """Run Hydra into memory that is there, as the copy does."""
        q, k, v = next(self.turn).flatten(3)
        return hydra_into(self.output, q, k, v)


def _forms(case: CoreCase, N: int, pool: _Pool) -> dict[str, _Form]:
    head_dim = case.dim // case.num_heads
    geometry = Geometry(
        dim=case.dim,
        num_heads=case.num_heads,
        head_dim=head_dim,
        num_prefix_tokens=case.prefix,
        grid=_grid(N - case.prefix),
        scale=head_dim**-0.5,
    )

    def form(spec: AttentionSpec, *, slow: bool = False) -> _Form:
        cost = spec.core_cost(geometry, N)
        module = _Mechanism(spec, geometry, slow).to(pool.output).eval()
        # q and k may be projected for fewer heads than v and the output have.
        moved = (1 + spec.num_query_heads(geometry) / case.num_heads) / 2
        linear = isinstance(spec, _LINEAR) and not slow
        flops = cost.attention + cost.elementwise
        return _Form(module=module, flops=flops, moved=moved, linear=linear)

    forms = {repr(spec): form(spec) for spec in (Softmax(), *case.specs)}
    forms |= {f"{spec} with maps": form(spec, slow=True) for spec in case.with_maps}
    hydra = Hydra().core_cost(geometry, N)
    for name in case.peers:
        flops = hydra.attention + hydra.elementwise
        module = _Peer(CORES[name])
        forms[name] = _Form(module=module, flops=flops, moved=1.0, linear=True)
    return forms


def _compile(case: CoreCase, forms: dict[str, _Form], pool: _Pool) -> dict[str, float]:
    """Put a compiled form beside each fast one; give the seconds it took."""
    if not case.compiled:
        return {}
    torch.compiler.reset()
    seconds = {}
    again = _forms(case, pool.output.shape[1], pool)
    for name, form in again.items():
        if name.endswith("with maps"):
            continue
        label = f"{name}, compiled"
        seconds[label] = compile_in_place(form.module, pool.feed(form.module))
        forms[label] = form
    return seconds


def _copy_rate(
    close: Laps, apart: Laps, name: str, form: _Form | None
) -> dict[str, float] | None:
    """Give the bytes a form must move over its time, as a share of the copy's."""
    laps = close if name in close else apart
    moved = form.moved if form is not None else 1.0
    return plain(scaled(ratios(laps[COPY], laps[name]), moved))


def _grid(num_patches: int) -> Grid:
    """Lay patches out as squarely as they go."""
    rows = next(
        r for r in range(math.isqrt(num_patches), 0, -1) if num_patches % r == 0
    )
    return rows, num_patches // rows


def _page_faults(call: Call) -> int:
    """Count the pages that one warm call makes the system hand out.

    What was measured before may hold other memory by now, so that a first call has to
    ask for more where those that were timed did not.
    """
    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
