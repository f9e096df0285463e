"""Times exported files in onnxruntime: does the saving survive the export?

    python -m benchmarks.exported                      DeiT-S, 224 and 1080p
    python -m benchmarks.exported --model deit_tiny_patch16_224 --sizes 224x224

One softmax model and one with Hydra in every block, random weights, each exported once
(and verified), take turns in one process; the ratio is taken within each round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import manyheads as mh
from benchmarks.records import FORMAT, RESULTS, VERSION, write_record
from manyheads.artifacts import Artifact, open_artifact
from manyheads.gauges.machine import conditions
from manyheads.gauges.stopwatch import race, ratios, spread

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, race, record and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--sizes", nargs="+", default=["224x224", "1080x1920"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds a size")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number")
    parser.add_argument("--out", type=Path, default=RESULTS)
    wanted = parser.parse_args(arguments)
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    torch.manual_seed(0)
    teacher = timm.create_model(wanted.model, pretrained=False).eval()
    student = mh.convert(teacher, mh.Recipe(mh.Swap(attention=mh.Hydra())))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Artifact] = {}
        for name, model in {"Softmax()": teacher, "Hydra()": student}.items():
            done = mh.export(model, Path(folder) / f"{len(files)}.onnx")
            print(done, file=sys.stderr)
            files[name] = open_artifact(done.path)
        for size in wanted.sizes:
            rows += _race(files, _size(size), wanted.rounds, wanted.budget)
    case = {"name": "exported_onnx", "model": wanted.model, "sizes": wanted.sizes}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "exported",
        "case": case,
        "rows": rows,
        "conditions": conditions(torch.device("cpu"), torch.float32)
        | {"weights": "random", "runtime": "onnxruntime, CPU", "batch": 1},
    }
    print(write_record(record, wanted.out))
    for row in rows:
        print(
            f"{row['model']} at {row['image_size']}: "
            f"{row['latency_ms']['median']:.1f} ms, {row['ratio']['median']:.2f} x "
            f"[{row['ratio']['lower']:.2f}-{row['ratio']['upper']:.2f}] of softmax"
        )
    return 0


def _race(
    files: dict[str, Artifact], size: tuple[int, int], rounds: int, budget_s: float
) -> list[dict[str, Any]]:
    image = torch.randn(1, 3, *size)
    laps = race(
        [_call(artifact, image) for artifact in files.values()],
        rounds=rounds,
        budget_s=budget_s,
        device=torch.device("cpu"),
    )
    return [
        {
            "model": name,
            "image_size": list(size),
            "rounds": len(lap),
            "latency_ms": asdict(spread([1e3 * second for second in lap])),
            "ratio": asdict(ratios(lap, laps[0])),
        }
        for name, lap in zip(files, laps, strict=True)
    ]


def _call(artifact: Artifact, image: Tensor) -> Callable[[], object]:
    return lambda: artifact(image)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
