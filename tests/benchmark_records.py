"""Records as the benchmark runner writes them, made up for tests."""

from __future__ import annotations

from typing import Any

from benchmarks.kinds import COPY, GIVEN

__all__ = ["core_record"]


def core_record(
    name: str = "hydra_core_d8", date: str = "2026-11-03", **changes: Any
) -> Any:
    record = {
        "format": "manyheads.benchmark",
        "version": 1,
        "kind": "core",
        "case": {"name": name, "dim": 8, "num_heads": 2, "batch_size": 1},
        "rows": [
            _core_row("Softmax()", None, 1.0),
            _core_row(COPY, 1.0, None),
            _core_row("Hydra()", 0.5, 1.25),
            _core_row(GIVEN, 0.75, None),
        ],
        "growth": {"Hydra()": 1.3, COPY: 1.0},
        "conditions": {
            "date": date,
            "device": "cpu",
            "device_name": "A (R) Chip",
            "threads": 2,
            "dtype": "float32",
            "torch": "2.15",
        },
    }
    return record | changes


def _core_row(form: str, share: float | None, to_softmax: float | None) -> Any:
    def around(value: float | None) -> Any:
        return value and {"median": value, "lower": value, "upper": value}

    return {
        "form": form,
        "num_tokens": 1024,
        "rounds": 30,
        "ms": around(2.0),
        "share_of_copy_rate": around(share),
        "to_softmax": around(to_softmax),
        "page_faults": 5000 if form == "Hydra()" else 0,
    }
