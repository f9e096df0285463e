"""Cases against other people's attention, and against torch.compile, in one run."""

from __future__ import annotations

from typing import Literal

from benchmarks.cases.hallucinated import HALLUCINATED, HALLUCINATED_GATE
from benchmarks.cases.hydra import EVERYWHERE, GATE
from benchmarks.cases.interactive import INTERACTIVE_GATE
from benchmarks.kinds import Case, CoreCase, Entry, LayerCase
from benchmarks.peers import CORES, LAYERS
from manyheads import Hydra, Interactive, Recipe, Swap

__all__ = ["PEER_CASES"]

_GATE = tuple(dict.fromkeys((*GATE, *INTERACTIVE_GATE, *HALLUCINATED_GATE)))
_MODELS = {384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}
_ENTRIES = (
    Entry(label="timm, fused softmax"),
    Entry(label="Hydra", recipe=EVERYWHERE[1].recipe),
    Entry(label="interactive", recipe=Recipe(Swap(attention=Interactive()))),
    HALLUCINATED,
    *(Entry(label=name, peer=name) for name in LAYERS),
)


def _layers(dim: Literal[384, 768], *, compiled: bool, extra: bool) -> LayerCase:
    return LayerCase(
        name=f"peers_attention_d{dim}{'_compiled' if compiled else ''}",
        gate=_GATE,
        architecture=_MODELS[dim],
        entries=_ENTRIES,
        part="attention",
        grids=((14, 14), (32, 32), (64, 64)),
        batch_sizes=(1,),
        memory=extra and not compiled,
        compiled=compiled,
        budget_s=50.0 if extra else 40.0,
        extra=extra,
    )


PEER_CASES: tuple[Case, ...] = (
    _layers(384, compiled=False, extra=False),
    _layers(768, compiled=False, extra=True),
    _layers(384, compiled=True, extra=True),
    _layers(768, compiled=True, extra=True),
    CoreCase(
        name="peers_core_d768",
        gate=GATE,
        specs=(Hydra(),),
        peers=tuple(CORES),
        compiled=True,
        dim=768,
        num_heads=12,
        num_tokens=(1024, 4096, 8160),
        budget_s=60.0,
        extra=True,
    ),
)
