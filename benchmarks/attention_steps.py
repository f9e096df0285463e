"""Where the time of an attention layer goes, step by step, beside softmax attention.

    OMP_NUM_THREADS=1 python -m benchmarks.attention_steps

Causes of missed targets cite it. One thread, random weights, the two layers in turns. A
step's time is the least of many rounds, which means something on a busy machine too.
"rest" is what calling operators costs, and is larger under the profiler than without.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases.hallucinated import HALLUCINATED_CASES
from benchmarks.kinds import Entry, LayerCase
from benchmarks.measure.layer import build
from manyheads.hosts import find_host

__all__ = ["main", "steps_of"]

_STEPS = {
    "aten::addmm": "projections",
    "aten::baddbmm": "scores",
    "aten::_softmax": "softmax",
    "aten::bmm": "mixing",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "fused attention",
    "aten::mul": "blends",
    "aten::addcmul_": "blends",
    "aten::copy_": "copies",
}


def steps_of(
    layers: dict[str, nn.Module], x: torch.Tensor, rounds: int
) -> dict[str, dict[str, float]]:
    """Give milliseconds by layer and step; what is no known step is "rest"."""
    laps: dict[str, list[Counter[str]]] = {label: [] for label in layers}
    with torch.inference_mode():
        for _ in range(rounds):
            for label, layer in layers.items():
                with profile(activities=[ProfilerActivity.CPU]) as seen:
                    layer(x)
                lap = Counter[str]()
                for event in seen.key_averages():
                    lap[_STEPS.get(event.key, "rest")] += event.self_cpu_time_total
                laps[label].append(lap)
    return {
        label: {
            step: min(lap[step] for lap in found) / 1e3
            for step in dict.fromkeys((*_STEPS.values(), "rest"))
            if any(lap[step] for lap in found)
        }
        for label, found in laps.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Print a line for each layer and step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dim", type=int, choices=(384, 768), default=768)
    parser.add_argument("--rounds", type=int, default=60)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    name = f"hallucinated_attention_d{asked.dim}"
    named = (case for case in HALLUCINATED_CASES if case.name == name)
    case = next(case for case in named if isinstance(case, LayerCase))
    layers = {entry.label: _attention(case, entry) for entry in case.entries[:2]}
    x = torch.randn(asked.batch_size, asked.tokens, asked.dim)
    for label, steps in steps_of(layers, x, asked.rounds).items():
        print(f"{label}: {sum(steps.values()):.2f} ms")
        for step, ms in steps.items():
            print(f"  {step:16} {ms:7.3f} ms")


def _attention(case: LayerCase, entry: Entry) -> nn.Module:
    model = build(case, entry, torch.device("cpu"))
    return model.get_submodule(find_host(model)[1][0].attention_path)


if __name__ == "__main__":
    main()
