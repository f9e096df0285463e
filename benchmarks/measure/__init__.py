"""Measures one case: contestants are built, raced, and told as rows of JSON values."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kinds import (
    COPY,
    GIVEN,
    Case,
    CoreCase,
    LayerCase,
    ModelCase,
    ScalingCase,
    WideCase,
)
from benchmarks.measure.core import core_rows
from benchmarks.measure.layer import layer_rows
from benchmarks.measure.model import model_rows
from benchmarks.measure.racing import Row, Watch, growth
from benchmarks.measure.scaling import scaling_rows
from benchmarks.measure.wide import wide_rows

__all__ = ["COPY", "GIVEN", "fit", "growth", "measure"]


def measure(case: Case, device: torch.device, watch: Watch | None = None) -> list[Row]:
    """Give the rows of a case, medians and quartiles in milliseconds.

    Args:
        case: Of one of the kinds in `benchmarks.kinds`.
        device: Where the work happens.
        watch: Told what is being measured and how far it is.
    """
    torch.manual_seed(0)
    watch = watch or _ignore
    if isinstance(case, CoreCase):
        return core_rows(case, device, watch)
    if isinstance(case, LayerCase):
        return layer_rows(case, device, watch)
    if isinstance(case, ModelCase):
        return model_rows(case, device, watch)
    if isinstance(case, ScalingCase):
        return scaling_rows(case, device, watch)
    if isinstance(case, WideCase):
        return wide_rows(case, device, watch)
    raise TypeError(f"no way to measure a {type(case).__name__}")


def fit(rows: list[Row]) -> dict[str, Any]:
    """Fit how time and memory grow with tokens, where rows name their tokens."""
    if not all("num_tokens" in row for row in rows):
        return {}
    return {"growth": growth(rows), "memory_growth": growth(rows, "extra_mib")}


def _ignore(what: str, done: int, rounds: int) -> None:
    """Tell nobody."""
