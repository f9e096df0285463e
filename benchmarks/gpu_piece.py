"""One piece of `benchmarks.gpu`, in a process of its own.

What runs for microseconds is captured in a CUDA graph and replayed: between calls from
Python the GPU would wait, and the time would be Python's.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import run
from benchmarks.cases.gpu import BOTH, FORWARD, GPU_PIECES, GPU_SMOKE
from benchmarks.kinds import COPY, Case, CoreCase, WideCase, as_json, kind_of
from benchmarks.measure.racing import Call, Laps, Race, Row, in_ms, plain
from benchmarks.measure.wide import wide_rows
from benchmarks.records import FORMAT, RESULTS, VERSION, write_record
from benchmarks.render import render
from benchmarks.targets import judge
from manyheads.gauges.machine import conditions
from manyheads.gauges.stopwatch import ratios
from manyheads.kernels.hydra import hydra

_REPLAYS = 4
_COPY_BOTH = "copy of as many bytes as forward and backward"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and record the piece; 0 done, 1 not."""
    pieces = {piece.case.name: piece for piece in (*GPU_PIECES, *GPU_SMOKE)}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_piece", description=__doc__
    )
    parser.add_argument("name", choices=list(pieces))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", help="folder of the record; benchmarks/results")
    options = parser.parse_args(arguments)
    piece, device = pieces[options.name], torch.device(options.device)
    if piece.how == "cases":
        words = ["--case", options.name, "--device", options.device]
        words += ["--out", options.out] if options.out else []
        return run.main(words, cases=[piece.case])
    case = piece.case
    if isinstance(case, WideCase):
        rows = _wide_rows(case, device)
    elif isinstance(case, CoreCase):
        rows = hydra_rows(case, device)
    else:
        raise TypeError(f"{options.name} is no case of a mechanism's core")
    record = _record(case, rows, device)
    path = write_record(record, Path(options.out or RESULTS))
    print(render([record]))
    for verdict in judge(record, case.targets, {}):
        found = "nothing" if verdict.value is None else f"{verdict.value:.3g}"
        print(f"{verdict.outcome}: {verdict.target.says}: {found}, {verdict.where}")
    print(f"recorded as {path.name}")
    return 0


def hydra_rows(case: CoreCase, device: torch.device) -> list[Row]:
    """Time Hydra's core on a packed projection beside copies of as many bytes.

    Forward reads q, k, v and writes the output: 4 tensors. Backward reads those three
    and the gradient, and writes three gradients: 7 more.
    """
    race = Race(case, device, len(case.num_tokens), _watch)
    rows = []
    for N in case.num_tokens:
        shape = (case.batch_size, N, 3 * case.dim)
        dtype = getattr(torch, case.dtype)
        packed = torch.randn(shape, device=device, dtype=dtype)
        projected = torch.split(packed, case.dim, -1)
        grad = torch.randn_like(projected[0])
        calls = {
            COPY: _copy_of(2 * grad.numel(), grad),
            FORWARD: _forward_of(projected),
            _COPY_BOTH: _copy_of(11 * grad.numel() // 2, grad),
            BOTH: _both_of(projected, grad),
        }
        laps = race.run(f"N = {N:,}", _captured(calls, device))
        beside = {FORWARD: COPY, BOTH: _COPY_BOTH}
        rows += [
            _row(case, N, name, laps, device)
            | {
                "share_of_copy_rate": plain(
                    ratios(laps[beside.get(name, name)], laps[name])
                )
            }
            for name in laps
        ]
        del packed, projected, grad, calls
    return rows


def _wide_rows(case: WideCase, device: torch.device) -> list[Row]:
    """Time every way to mix values of width 2K with half of the heads, forward."""
    return wide_rows(
        case,
        device,
        _watch,
        prepare=lambda calls: _captured(calls, device),
        repeats=_repeats(device),
    )


def _copy_of(count: int, like: Tensor) -> Call:
    source, room = torch.randn_like(like.new_empty(count)), like.new_empty(count)
    return lambda: room.copy_(source)


def _forward_of(leaves: Sequence[Tensor]) -> Call:
    q, k, v = (x.detach() for x in leaves)
    return lambda: hydra(q, k, v, None)


def _both_of(projected: Sequence[Tensor], grad: Tensor) -> Call:
    q, k, v = (x.detach().requires_grad_() for x in projected)
    return lambda: torch.autograd.grad(hydra(q, k, v, None), (q, k, v), grad)


def _captured(calls: dict[str, Call], device: torch.device) -> dict[str, Call]:
    """Turn each call into a graph of several; on CPU leave it as it is.

    One that cannot be captured is told and left out, and the others are still timed.
    """
    if device.type != "cuda":
        return calls
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = _graph_of(call)
        except Exception:
            print(f"{name} could not be captured:", file=sys.stderr)
            traceback.print_exc()
    return graphs


def _graph_of(call: Call) -> Call:
    """Warm up on a stream of its own, as capturing asks for, then record."""
    # torch leaves these classes without types.
    streams: Any = torch.cuda
    aside = streams.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with streams.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = streams.CUDAGraph()
    with streams.graph(graph):
        for _ in range(_REPLAYS):
            call()
    replay: Call = graph.replay
    return replay


def _row(case: CoreCase, N: int, name: str, laps: Laps, device: torch.device) -> Row:
    repeats = _repeats(device)
    return {
        "form": name,
        "num_tokens": N,
        "batch_size": case.batch_size,
        "rounds": len(laps[name]),
        "ms": in_ms([seconds / repeats for seconds in laps[name]]),
        "share_of_copy_rate": None,
        "to_softmax": None,
        "softmax_rounds": 0,
        "page_faults": 0,
    }


def _repeats(device: torch.device) -> int:
    return _REPLAYS if device.type == "cuda" else 1


def _record(case: Case, rows: list[Row], device: torch.device) -> dict[str, Any]:
    where = conditions(device, getattr(torch, case.dtype)) | {"weights": "random"}
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind_of(case),
        "case": as_json(case),
        "rows": rows,
        "conditions": where,
        "growth": {},
        "memory_growth": {},
    }


def _watch(what: str, done: int, rounds: int) -> None:
    """Tell nobody: the parent counts the seconds."""


if __name__ == "__main__":
    sys.exit(main())
