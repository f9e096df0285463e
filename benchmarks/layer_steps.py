"""Where the time of an attention layer or a block goes, step by step, beside softmax's.

    python -m benchmarks.layer_steps
    python -m benchmarks.layer_steps --part block --batch-size 8

Causes of missed targets cite it. Random weights, the layers in turns. A step's time is
the least of many rounds, which means something on a busy machine too. "rest" is what
calling operators costs, and is larger under the profiler than without.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases.hallucinated import HALLUCINATED_CASES
from benchmarks.kinds import LayerCase
from benchmarks.measure.layer import build
from manyheads.hosts import find_host

__all__ = ["Step", "main", "steps_of"]

_STEPS = {
    "aten::addmm": "linear",
    "aten::mm": "linear",
    "aten::baddbmm": "scores",
    "aten::_softmax": "softmax",
    "aten::bmm": "mixing",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "fused attention",
    "aten::mul": "blends",
    "aten::addcmul_": "blends",
    "aten::copy_": "copies",
    "aten::gelu": "activation",
    "aten::native_layer_norm": "norms",
    "aten::add": "residuals",
}
_SHOWN = {"attention": 2, "block": 4}


@dataclass(frozen=True)
class Step:
    """What one kind of operator did in one pass.

    Attributes:
        ms: Least time over the rounds.
        multiply_adds: Of its matrix products; 0 for what is none.
    """

    ms: float
    multiply_adds: int


def steps_of(
    layers: dict[str, nn.Module], x: torch.Tensor, rounds: int
) -> dict[str, dict[str, Step]]:
    """Give the steps of every layer; what is no known step is "rest".

    Args:
        layers: By label; they take turns.
        x: Tokens [B, N, D].
        rounds: Passes of each, one of them profiled at a time.
    """
    laps: dict[str, list[Counter[str]]] = {label: [] for label in layers}
    work: dict[str, Counter[str]] = {}
    with torch.inference_mode():
        for _ in range(rounds):
            for label, layer in layers.items():
                with profile(
                    activities=[ProfilerActivity.CPU], record_shapes=True
                ) as seen:
                    layer(x)
                lap, work[label] = Counter[str](), Counter[str]()
                for event in seen.key_averages(group_by_input_shape=True):
                    step = _name(event)
                    lap[step] += event.self_cpu_time_total
                    work[label][step] += event.count * _multiply_adds(event)
                laps[label].append(lap)
    return {
        label: {
            step: Step(min(lap[step] for lap in found) / 1e3, work[label][step])
            for step in sorted(found[0], key=_place)
        }
        for label, found in laps.items()
    }


def _name(event: Any) -> str:
    step = _STEPS.get(event.key, "rest")
    if step == "linear":
        width, features = _matrices(event)[1]
        return f"linear {width} to {features}"
    return step


def _place(step: str) -> tuple[int, str]:
    names = [*dict.fromkeys(_STEPS.values()), "rest"]
    return names.index("linear" if step.startswith("linear") else step), step


def _multiply_adds(event: Any) -> int:
    if event.key == "aten::_scaled_dot_product_flash_attention_for_cpu":
        queries, keys = event.input_shapes[:2]  # [B, H, N, K], for scores and mixing
        return int(2 * math.prod(queries) * keys[-2])
    if event.key in ("aten::addmm", "aten::mm", "aten::baddbmm", "aten::bmm"):
        first, second = _matrices(event)
        return math.prod(first) * second[-1]
    return 0


def _matrices(event: Any) -> list[list[int]]:
    """Give the shapes of the two factors, without what is added to the product."""
    adds = event.key in ("aten::addmm", "aten::baddbmm")
    return list(event.input_shapes[1:3] if adds else event.input_shapes[:2])


def main(argv: list[str] | None = None) -> None:
    """Print a line for each layer and step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", choices=("attention", "block"), default="attention")
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dim", type=int, choices=(384, 768), default=768)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number")
    asked = parser.parse_args(argv)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    x = torch.randn(asked.batch_size, asked.tokens, asked.dim)
    found = steps_of(_layers(asked.part, asked.dim), x, asked.rounds)
    base = 0.0
    for label, steps in found.items():
        total = sum(step.ms for step in steps.values())
        base = base or total
        print(f"{label}: {total:.2f} ms, {total / base:.2f} of softmax's")
        for name, step in steps.items():
            rate = step.multiply_adds / step.ms / 1e6 if step.ms else 0.0
            known = f"  {rate:6.1f} G multiply-adds/s" if rate else ""
            print(f"  {name:20} {step.ms:8.3f} ms{known}")


def _layers(part: str, dim: int) -> dict[str, nn.Module]:
    """Build the first entries of the case that times this part."""
    named = (c for c in HALLUCINATED_CASES if c.name == f"hallucinated_{part}_d{dim}")
    case = next(case for case in named if isinstance(case, LayerCase))
    layers = {}
    for entry in case.entries[: _SHOWN[part]]:
        model = build(case, entry, torch.device("cpu"))
        site = find_host(model)[1][0]
        path = site.path if part == "block" else site.attention_path
        layers[entry.label] = model.get_submodule(path)
    return layers


if __name__ == "__main__":
    main()
