"""What a case says: one frozen dataclass for each kind of measurement.

========  ================================================================
kind      what is timed
========  ================================================================
core      mechanisms on projected tokens, beside a plain copy and a matmul
wide      every way to mix values wider than queries, beside fused softmax
layer     an attention layer or a whole block of a timm model
model     whole timm models, with parameters, FLOPs and peak memory
scaling   one model from small to very large images, each in its own process
exported  whole models as ONNX files in onnxruntime
========  ================================================================

Weights are random everywhere: they enter neither time nor memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from benchmarks.targets import Target
from manyheads import Recipe
from manyheads.attention import AttentionSpec
from manyheads.kernels.hallucinated import Form

__all__ = [
    "COPY",
    "GIVEN",
    "Case",
    "CoreCase",
    "DType",
    "Entry",
    "ExportedCase",
    "LayerCase",
    "ModelCase",
    "ScalingCase",
    "WideCase",
    "as_json",
    "kind_of",
]

# Two rows that every core case with Hydra has: the bound, and Hydra without the cost
# of fresh memory.
COPY, GIVEN = "copy", "Hydra(), output given"

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every case says.

    Attributes:
        name: Names the record; lower case, digits and underscores.
        gate: Test files that must pass before any time is shown.
        rounds: Turns of each contestant.
        budget_s: Seconds for all rounds of the case. What one race leaves, the later
            ones have; three rounds are always run, memory comes on top.
        dtype: Type of weights and activations.
        extra: Whether only `--all` runs it, because it takes long.
        targets: What the numbers should reach.
    """

    name: str
    gate: tuple[str, ...]
    rounds: int = 30
    budget_s: float = 60.0
    dtype: DType = "float32"
    extra: bool = False
    targets: tuple[Target, ...] = ()


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
        with_maps: Mechanisms to time in their slow form too, which builds the maps.
        peers: Other people's forms of Hydra, by their names in `benchmarks.peers`.
        compiled: Whether every mechanism and peer is timed compiled as well.
        memory: Token counts at which peak memory is measured, a process for each.
        prefix: Prefix tokens among them; the rest is laid out as a grid.
        batch_size: Images at a time.
        working_set_mib: Bytes through which the inputs rotate.
    """

    specs: tuple[AttentionSpec, ...]
    dim: int
    num_heads: int
    num_tokens: tuple[int, ...]
    with_maps: tuple[AttentionSpec, ...] = ()
    peers: tuple[str, ...] = ()
    compiled: bool = False
    memory: tuple[int, ...] = ()
    prefix: int = 0
    batch_size: int = 1
    working_set_mib: int = 512


@dataclass(frozen=True, kw_only=True)
class WideCase(Case):
    """Hallucinated attention's forms between the projections, forward, in inference.

    Half of the heads are real and mix values twice as wide as their queries; fused
    softmax with all heads, whose place they take, is the base.

    Attributes:
        forms: Ways of `manyheads.kernels.hallucinated.attend`.
        dim: Width ``D`` of the mixed tokens.
        num_heads: Heads ``H``, an even number.
        sizes: Token counts and batch sizes.
        memory: Token counts at which peak memory is measured, at batch 1.
    """

    forms: tuple[Form, ...]
    dim: int
    num_heads: int
    sizes: tuple[tuple[int, int], ...]
    memory: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant made from a timm model.

    Attributes:
        label: What tables call it.
        recipe: What its blocks become; None leaves the model as timm built it.
        architecture: Another timm model than the case's, for comparisons between
            backbones.
        with_maps: Whether its mechanisms run in their slow form, which builds maps.
        peer: Another package's layer in place of the attention, by its name in
            `benchmarks.peers`; attention layers only.
    """

    label: str
    recipe: Recipe | None = None
    architecture: str | None = None
    with_maps: bool = False
    peer: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerCase(Case):
    """One layer of a timm model, on random tokens; the first entry is the base.

    Attributes:
        architecture: Registered name.
        entries: What is done to the model.
        part: The attention layer with its projections, or the whole block.
        grids: Rows and columns of patch tokens; prefix tokens of the model are added.
        batch_sizes: Images at a time.
        memory: Whether to measure peak memory at the first batch size, in a process
            for each entry; not where the layers are compiled.
        compiled: Whether torch.compile goes first; its time is recorded beside.
    """

    architecture: str
    entries: tuple[Entry, ...]
    part: Literal["attention", "block"]
    grids: tuple[tuple[int, int], ...]
    batch_sizes: tuple[int, ...] = (1, 8)
    memory: bool = False
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """Whole models on random images; the first entry is the base.

    Attributes:
        architecture: Registered name.
        entries: What is done to it.
        inputs: Height, width and batch size of each measurement.
        memory: Whether to measure peak memory, in a process for each; not where the
            models are compiled.
        compiled: Whether torch.compile goes first; its time is recorded beside.
    """

    architecture: str
    entries: tuple[Entry, ...]
    inputs: tuple[tuple[int, int, int], ...]
    memory: bool = True
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class ScalingCase(Case):
    """One image at a time, from small to very large; no form meets another.

    Attributes:
        architecture: Registered name.
        entries: What is done to it.
        sizes: Heights and widths.
        most_tokens: Labels of entries that stop at so many tokens; those above are
            told as rows without numbers.
        limit_mib: Memory a process may take; one that wants more is told so.
        limit_s: Seconds a process may take.
    """

    architecture: str
    entries: tuple[Entry, ...]
    sizes: tuple[tuple[int, int], ...]
    most_tokens: tuple[tuple[str, int], ...] = ()
    limit_mib: int = 8192
    limit_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class ExportedCase(Case):
    """Whole models as ONNX files, one image at a time; the first entry is the base.

    Attributes:
        architecture: Registered name.
        arguments: Arguments of the architecture.
        entries: What is done to it.
        sizes: Height and width of each measurement; every file runs at all of them.
    """

    architecture: str
    arguments: tuple[tuple[str, int], ...] = ()
    entries: tuple[Entry, ...]
    sizes: tuple[tuple[int, int], ...]


def as_json(case: Case) -> dict[str, object]:
    """Write a case down as its record holds it.

    Without its targets: they may move later, and a record holds what was measured, not
    what was hoped for.
    """
    named = {f.name: getattr(case, f.name) for f in fields(case) if f.name != "targets"}
    return {name: _plain(value) for name, value in named.items()}


def kind_of(case: Case) -> str:
    """Name the kind of a case as records do."""
    return type(case).__name__.removesuffix("Case").lower()


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    plain = value is None or isinstance(value, str | int | float)
    return value if plain else repr(value)
