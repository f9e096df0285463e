"""One tiny case of each kind, for `--smoke`; no number of them means anything."""

from __future__ import annotations

from benchmarks.cases.hydra import EVERYWHERE, GATE
from benchmarks.kinds import (
    Case,
    CoreCase,
    Entry,
    LayerCase,
    ModelCase,
    ScalingCase,
    WideCase,
)
from benchmarks.peers import CORES
from benchmarks.targets import Target
from manyheads import Hallucinated, Hydra, Recipe, Softmax, Swap

__all__ = ["SMOKE"]

_TINY = "deit_tiny_patch16_224"
_HALLUCINATED = Recipe(Swap(attention=Hallucinated()))

SMOKE: tuple[Case, ...] = (
    CoreCase(
        name="smoke_core",
        gate=GATE,
        specs=(Hydra(),),
        with_maps=(Hydra(),),
        peers=tuple(CORES),
        dim=48,
        num_heads=4,
        num_tokens=(17, 64),
        rounds=2,
        budget_s=1.0,
        working_set_mib=1,
        targets=(
            Target(
                name="impossible",
                says="copy rate of Hydra()",
                rows={"form": "Hydra()"},
                column="share_of_copy_rate.median",
                at_least=1e9,
            ),
        ),
    ),
    WideCase(
        name="smoke_wide",
        gate=GATE,
        forms=("chunked", "padded", "calls"),
        dim=48,
        num_heads=4,
        sizes=((17, 1), (17, 2)),
        rounds=2,
        budget_s=1.0,
    ),
    LayerCase(
        name="smoke_layer",
        gate=GATE,
        architecture=_TINY,
        entries=(
            Entry(label="softmax"),
            Entry(label="softmax again", recipe=Recipe(Swap(attention=Softmax()))),
            Entry(label="hallucinated", recipe=_HALLUCINATED),
            Entry(label="with maps", recipe=_HALLUCINATED, with_maps=True),
            Entry(label="text-book Hydra", peer="text-book Hydra"),
        ),
        part="attention",
        grids=((2, 3),),
        batch_sizes=(2,),
        rounds=2,
        budget_s=1.0,
    ),
    ModelCase(
        name="smoke_model",
        gate=GATE,
        architecture=_TINY,
        entries=EVERYWHERE,
        inputs=((40, 64, 1),),
        rounds=2,
        budget_s=1.0,
    ),
    ScalingCase(
        name="smoke_scaling",
        gate=GATE,
        architecture=_TINY,
        entries=EVERYWHERE,
        sizes=((40, 64),),
        most_tokens=(("softmax", 5),),
        rounds=1,
        budget_s=1.0,
        limit_s=120.0,
    ),
)
