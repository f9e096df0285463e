"""Times exported files in onnxruntime: does the saving survive the export?

python -m benchmarks.exported             DeiT-S, every mechanism, 224 and 1080p
python -m benchmarks.exported --smoke     tiny; shows only that it runs

Models with random weights, softmax first, are each exported once (and verified), and
take turns in one process; the ratio to softmax is taken within each round. Each is
called once before its turn: the threads of the session before spin for a while, and
took half of the next one's time at 224. The tests of exporting go first: no time is
taken where they fail.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.cases.exported import EXPORTED, SMOKE_EXPORTED
from benchmarks.kinds import ExportedCase
from benchmarks.records import FORMAT, RESULTS, VERSION, write_record
from benchmarks.render import render
from benchmarks.run import Gate
from manyheads import convert, cost, export
from manyheads.artifacts import Artifact, open_artifact
from manyheads.gauges.machine import conditions
from manyheads.gauges.stopwatch import race, ratios, spread
from manyheads.geometry import fit_to_patches

__all__ = ["main", "named_models"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, race and record; 0 done, 1 red tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number")
    parser.add_argument("--out", type=Path, help="folder of the record")
    wanted = parser.parse_args(arguments)
    threads = wanted.threads or (1 if wanted.smoke else None)
    if threads is not None:
        torch.set_num_threads(threads)
    case = SMOKE_EXPORTED if wanted.smoke else EXPORTED
    if not wanted.smoke and not Gate().passes(case):
        print(f"{case.name}: its tests fail, so no time is taken", file=sys.stderr)
        return 1
    started = time.perf_counter()
    record = _record(case, _rows(case))
    record["wall_s"] = round(time.perf_counter() - started, 1)
    with tempfile.TemporaryDirectory() as scratch:
        default = Path(scratch) if wanted.smoke else RESULTS
        path = write_record(record, wanted.out or default)
    print(render([record]))
    print(f"\nrecorded as {path.name} after {record['wall_s']:.0f} s")
    return 0


def named_models(case: ExportedCase, **arguments: int) -> dict[str, nn.Module]:
    """Build what is exported, by label; further arguments are the architecture's."""
    torch.manual_seed(0)
    told = dict(case.arguments) | arguments
    base = timm.create_model(case.architecture, **told).eval()
    return {
        entry.label: convert(base, entry.recipe) if entry.recipe else base
        for entry in case.entries
    }


def _rows(case: ExportedCase) -> list[dict[str, Any]]:
    models = named_models(case)
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Artifact] = {}
        sizes_mib: dict[str, float] = {}
        for place, (label, model) in enumerate(models.items()):
            done = export(model, Path(folder) / f"{place}.onnx")
            print(done, file=sys.stderr)
            files[label] = open_artifact(done.path)
            sizes_mib[label] = done.size_mib
        rows = []
        for size in case.sizes:
            laps = _race(list(files.values()), size, case)
            for (label, model), lap in zip(models.items(), laps, strict=True):
                cell = files[label].card.cell or size
                rows.append(
                    {
                        "name": label,
                        "image_size": list(size),
                        "fed_size": list(fit_to_patches(size, cell)),
                        "rounds": len(lap),
                        "flops": cost(model, image_size=size).flops,
                        "file_mib": sizes_mib[label],
                        "ms": asdict(spread([1e3 * second for second in lap])),
                        "ratio": asdict(ratios(lap, laps[0])),
                    }
                )
    return rows


def _race(
    files: Sequence[Artifact], size: tuple[int, int], case: ExportedCase
) -> Sequence[Sequence[float]]:
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return race(
        [_call(file, image) for file in files],
        rounds=case.rounds,
        budget_s=case.budget_s / len(case.sizes),
        device=torch.device("cpu"),
        rehearse=True,
    )


def _call(file: Artifact, image: Tensor) -> Callable[[], object]:
    return lambda: file(image)


def _record(case: ExportedCase, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": "exported",
        "case": {
            "name": case.name,
            "gate": list(case.gate),
            "rounds": case.rounds,
            "budget_s": case.budget_s,
            "architecture": case.architecture,
            "arguments": dict(case.arguments),
            "entries": [repr(entry) for entry in case.entries],
            "sizes": [list(size) for size in case.sizes],
        },
        "rows": rows,
        "conditions": conditions(torch.device("cpu"), torch.float32)
        | {"weights": "random", "runtime": "onnxruntime, CPU", "batch": 1},
    }


if __name__ == "__main__":
    sys.exit(main())
