"""What a case says: one frozen dataclass for each kind of measurement.

======  ==================================================================
kind    what is timed
======  ==================================================================
core    mechanisms on projected tokens, beside a plain copy of as many bytes
layer   an attention layer or a whole block of a timm model, with projections
model   whole timm models, with parameters, FLOPs and peak memory
======  ==================================================================

Weights are random everywhere: they enter neither time nor memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manyheads import Recipe
from manyheads.attention import AttentionSpec

__all__ = ["Case", "CoreCase", "DType", "Entry", "LayerCase", "ModelCase"]

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every case says.

    Attributes:
        name: Names the record; lower case, digits and underscores.
        gate: Test files that must pass before any time is shown.
        rounds: Turns of each contestant.
        budget_s: Seconds after which no round begins, once there are three.
        dtype: Type of weights and activations.
    """

    name: str
    gate: tuple[str, ...]
    rounds: int = 30
    budget_s: float = 60.0
    dtype: DType = "float32"


@dataclass(frozen=True, kw_only=True)
class CoreCase(Case):
    """Mechanisms between the projections, forward, in inference.

    Inputs rotate through a working set larger than the caches: what is timed comes
    from memory at every size, so that growth is growth in tokens and not the end of
    a cache.

    Attributes:
        specs: Mechanisms; the fused `Softmax()` is always timed beside them.
        dim: Width ``D`` of the mixed tokens.
        num_heads: Heads ``H``.
        num_tokens: Token counts ``N``.
        prefix: Prefix tokens among them; the rest is laid out as a grid.
        batch_size: Images at a time.
        working_set_mib: Bytes through which the inputs rotate.
    """

    specs: tuple[AttentionSpec, ...]
    dim: int
    num_heads: int
    num_tokens: tuple[int, ...]
    prefix: int = 0
    batch_size: int = 1
    working_set_mib: int = 512


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant made from a timm model.

    Attributes:
        label: What tables call it.
        recipe: What its blocks become; None leaves the model as timm built it.
        architecture: Another timm model than the case's, for comparisons between
            backbones.
    """

    label: str
    recipe: Recipe | None = None
    architecture: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerCase(Case):
    """One layer of a timm model, on random tokens; the first entry is the base.

    Attributes:
        architecture: Registered name.
        entries: What is done to the model.
        part: The attention layer with its projections, or the whole block.
        grids: Rows and columns of patch tokens; prefix tokens of the model are added.
        batch_sizes: Images at a time.
        compiled: Whether torch.compile goes first; its time is recorded beside.
    """

    architecture: str
    entries: tuple[Entry, ...]
    part: Literal["attention", "block"]
    grids: tuple[tuple[int, int], ...]
    batch_sizes: tuple[int, ...] = (1, 8)
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """Whole models on random images; the first entry is the base.

    Eager models go through `manyheads.bench`, whose own limit of time holds.

    Attributes:
        architecture: Registered name.
        entries: What is done to it.
        inputs: Height, width and batch size of each measurement.
        memory: Whether to measure peak memory, in a process for each.
        compiled: Whether torch.compile goes first; memory is not measured then.
    """

    architecture: str
    entries: tuple[Entry, ...]
    inputs: tuple[tuple[int, int, int], ...]
    memory: bool = True
    compiled: bool = False
