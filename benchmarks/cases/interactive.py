"""Cases of interactive attention and of iViT, the backbone built on it."""

from __future__ import annotations

import manyheads.backbones  # noqa: F401 - importing registers our own with timm
from benchmarks.cases.hydra import EVERYWHERE
from benchmarks.kinds import Case, CoreCase, Entry, LayerCase, ModelCase
from benchmarks.targets import Target
from manyheads import Hydra, Interactive, Recipe, Swap

__all__ = ["INTERACTIVE_CASES", "INTERACTIVE_GATE"]

INTERACTIVE_GATE = ("tests/attention/test_interactive.py",)
_IVIT_GATE = (*INTERACTIVE_GATE, "tests/backbones/test_ivit.py")
_MIXES = (Interactive(), Interactive(mix="both"), Interactive(mix="none"))
_TOKENS = (196, 784, 3136, 8160)
_GRIDS = ((14, 14), (28, 28), (56, 56), (68, 120))
_IN_BLOCKS = {spec: f"{spec} in all blocks" for spec in _MIXES}
_IN_ALL_BLOCKS = (
    *EVERYWHERE,
    *(
        Entry(label=label, recipe=Recipe(Swap(attention=spec)))
        for spec, label in _IN_BLOCKS.items()
    ),
)
_IVIT_SIZES = ((224, 224, 1), (224, 224, 8), (512, 512, 1), (1024, 1024, 1))


def _targets(forms: tuple[str, ...], num_tokens: tuple[int, ...]) -> tuple[Target, ...]:
    return (
        Target(
            name="faster_from_784",
            says="time beside fused softmax's from N = 784 up, every mix",
            rows={"form": forms, "num_tokens": num_tokens},
            column="ratio.median" if "blocks" in forms[0] else "to_softmax.median",
            at_most=1.0,
        ),
        Target(
            name="growth",
            says="exponent of time in N, every mix",
            rows={"form": forms},
            column="growth",
            at_most=1.1,
        ),
    )


_CORE_TARGETS = _targets(tuple(map(repr, _MIXES)), _TOKENS[1:])
# The class token is one more.
_BLOCK_TARGETS = _targets(
    tuple(_IN_BLOCKS.values()),
    tuple(1 + rows * columns for rows, columns in _GRIDS[1:]),
)


def _core(dim: int, num_heads: int, *, budget_s: float, extra: bool) -> CoreCase:
    return CoreCase(
        name=f"interactive_core_d{dim}",
        gate=INTERACTIVE_GATE,
        specs=(*_MIXES, Hydra()),
        dim=dim,
        num_heads=num_heads,
        num_tokens=_TOKENS,
        memory=_TOKENS if extra else (784, 8160),
        budget_s=budget_s,
        extra=extra,
        targets=_CORE_TARGETS,
    )


def _block(dim: int, architecture: str) -> LayerCase:
    return LayerCase(
        name=f"interactive_block_d{dim}",
        gate=INTERACTIVE_GATE,
        architecture=architecture,
        entries=_IN_ALL_BLOCKS,
        part="block",
        grids=_GRIDS,
        batch_sizes=(1,),
        memory=True,
        extra=True,
        targets=_BLOCK_TARGETS,
    )


def _rivals(name: str, *architectures: str) -> ModelCase:
    return ModelCase(
        name=name,
        gate=_IVIT_GATE,
        architecture=architectures[0],
        entries=tuple(
            Entry(label=each.removesuffix("_patch16_224"), architecture=each)
            for each in architectures
        ),
        inputs=_IVIT_SIZES,
        budget_s=120.0,
        extra=True,
    )


INTERACTIVE_CASES: tuple[Case, ...] = (
    _core(768, 12, budget_s=90.0, extra=True),
    _core(384, 6, budget_s=30.0, extra=False),
    _block(768, "deit_base_patch16_224"),
    _block(384, "deit_small_patch16_224"),
    # Near 5 M parameters, 13 to 25 M, and 22 to 32 M.
    _rivals("ivit_tiny", "deit_tiny_patch16_224", "pvt_v2_b0", "ivit_tiny"),
    _rivals("ivit_small", "deit_small_patch16_224", "pvt_v2_b2", "ivit_small"),
    _rivals("ivit_base", "deit_small_patch16_224", "nextvit_small", "ivit_base"),
)
