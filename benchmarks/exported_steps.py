"""Where onnxruntime's time goes in exported files, step by step, beside softmax's.

    python -m benchmarks.exported_steps
    python -m benchmarks.exported_steps --size 1088x1920 --rounds 5

Causes of missed targets cite it. DeiT-S with one block and random weights, the files in
turns, as onnxruntime's own profiler times every node. A step's time is the least of the
rounds, which means something on a busy machine too. Other models of the case follow
with `--label`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from benchmarks.cases.exported import EXPORTED
from benchmarks.exported import named_models
from manyheads import export

__all__ = ["main"]

_STEPS = {
    "Softmax": "softmax",
    "Conv": "patches",
    "Resize": "position embedding",
    "BiasGelu": "activation",
    "Gelu": "activation",
    "LayerNormalization": "norms",
    "SkipLayerNormalization": "norms",
}
_COPIES = ("Transpose", "Concat", "Split", "Slice", "Pad", "Expand", "Gather")
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the steps of every file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", default="224x224", help="whole patches")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number")
    parser.add_argument("--label", action="append", help="softmax and Hallucinated()")
    asked = parser.parse_args(argv)
    labels = ["softmax", *(asked.label or ["Hallucinated() in all blocks"])]
    height, width = map(int, asked.size.split("x"))
    image = torch.randn(1, 3, height, width)
    threads = asked.threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        found = _profiled(labels, image, asked.rounds, threads, Path(folder))
    base = 0.0
    for label, (nodes, laps) in found.items():
        steps = {step: min(lap[step] for lap in laps) / 1e3 for step in laps[0]}
        total = sum(steps.values())
        base = base or total
        print(f"{label}: {total:.2f} ms in {nodes} nodes, {total / base:.2f}")
        for step, ms in sorted(steps.items(), key=lambda item: -item[1]):
            print(f"  {step:20} {ms:10.3f} ms")


def _profiled(
    labels: Sequence[str], image: torch.Tensor, rounds: int, threads: int, folder: Path
) -> dict[str, tuple[int, list[Counter[str]]]]:
    """Give the nodes of every file, and microseconds by step for every round."""
    models = named_models(EXPORTED, depth=1)
    sessions = {}
    for place, label in enumerate(labels):
        path = export(models[label], folder / f"{place}.onnx").path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / str(place))
        sessions[label] = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    for _ in range(rounds + 1):
        for session in sessions.values():
            session.run(None, {session.get_inputs()[0].name: image.numpy()})
    return {label: _laps(s.end_profiling(), rounds) for label, s in sessions.items()}


def _laps(file: str, rounds: int) -> tuple[int, list[Counter[str]]]:
    """Read nodes and rounds from a profile, without the first, which warms up."""
    nodes = [
        event
        for event in json.loads(Path(file).read_text())
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    ]
    each = len(nodes) // (rounds + 1)
    laps = []
    for number in range(1, rounds + 1):
        lap = Counter[str]()
        for event in nodes[number * each : (number + 1) * each]:
            lap[_name(event["args"])] += event["dur"]
        laps.append(lap)
    return each, laps


def _name(node: dict[str, Any]) -> str:
    kind = node["op_name"]
    if kind in _PRODUCTS:
        given, made = (
            _shapes(node[f"{side}_type_shape"]) for side in ("input", "output")
        )
        # A weight that was packed beforehand is no input any more.
        if len(given) < 2 or len(given[1]) < 4:
            return f"linear {given[0][-1]} to {made[0][-1]}"
        rows, columns = given[0][-2:]
        return "mixing" if rows == columns else "scores"
    return _STEPS.get(kind, "copies" if kind in _COPIES else "rest")


def _shapes(told: list[dict[str, list[int]]]) -> list[list[int]]:
    return [shape for tensor in told for shape in tensor.values()]


if __name__ == "__main__":
    main()
