"""The attention mechanisms, one file each; `MECHANISMS` lists their specs."""

from manyheads.attention.base import AttentionSpec, CoreCost, Mechanism
from manyheads.attention.hallucinated import Hallucinated
from manyheads.attention.hydra import Hydra
from manyheads.attention.interactive import Interactive
from manyheads.attention.softmax import Softmax

__all__ = [
    "MECHANISMS",
    "AttentionSpec",
    "CoreCost",
    "Hallucinated",
    "Hydra",
    "Interactive",
    "Mechanism",
    "Softmax",
]

MECHANISMS: tuple[type[AttentionSpec], ...] = (
    Softmax,
    Hydra,
    Interactive,
    Hallucinated,
)
