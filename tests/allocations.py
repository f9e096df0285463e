"""What a call asks of torch's CPU allocator, and what autograd keeps of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Allocations", "allocations", "saved_bytes"]


class Allocations(NamedTuple):
    """Bytes of one call, operators' own temporaries included.

    Attributes:
        peak: Most that was held at once, beyond what was there.
        largest: The largest single request.
    """

    peak: int
    largest: int


def allocations(call: Callable[[], object]) -> Allocations:
    """Record every request: torch's profiler sees those inside operators, too.

    A dispatch mode would not: an operator of ours is one call to it, and so is torch's
    fused attention. Buffers that a maths library makes for itself are not seen.
    """
    torch.empty(1)  # the profiler's own first call is not the caller's
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]"]
    assert changes, "the profiler saw no allocation"
    held = peak = 0
    for change in sorted(changes, key=lambda e: float(e["ts"])):
        held += change["args"]["Bytes"]
        peak = max(peak, held)
    return Allocations(peak, max(change["args"]["Bytes"] for change in changes))


def saved_bytes(call: Callable[[], Tensor], given: Iterable[Tensor] = ()) -> int:
    """Give the bytes that autograd keeps for backward, besides tensors given."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call()
    for tensor in given:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del out
    return sum(kept.values())
