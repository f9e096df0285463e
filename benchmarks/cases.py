"""The cases, as data: what is timed against what, at which sizes.

A new case is one more entry in `CASES`. Three kinds exist:

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

import manyheads.backbones  # noqa: F401 - importing registers our own with timm
from manyheads import Compact, Hallucinated, Hydra, Interactive, Recipe, Softmax, Swap
from manyheads.attention import AttentionSpec

__all__ = ["CASES", "SMOKE", "Case", "CoreCase", "Entry", "LayerCase", "ModelCase"]

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


_HYDRA_GATE = ("tests/kernels/test_hydra.py", "tests/attention/test_hydra.py")
_TOKENS = (197, 577, 1024, 2048, 4096, 8160, 16384)
_HYDRA_EVERYWHERE = (
    Entry(label="softmax"),
    Entry(label="Hydra in all blocks", recipe=Recipe(Swap(attention=Hydra()))),
)
_INTERACTIVE_GATE = ("tests/attention/test_interactive.py",)
_INTERACTIVE_TOKENS = (196, 784, 3136, 8160)
_INTERACTIVE_GRIDS = ((14, 14), (28, 28), (56, 56), (68, 120))
_INTERACTIVE_EVERYWHERE = (
    *_HYDRA_EVERYWHERE,
    *(
        Entry(label=f"{spec} in all blocks", recipe=Recipe(Swap(attention=spec)))
        for spec in (Interactive(), Interactive(mix="both"), Interactive(mix="none"))
    ),
)
_IVIT_GATE = (*_INTERACTIVE_GATE, "tests/backbones/test_ivit.py")
_HALLUCINATED_GATE = (
    "tests/attention/test_hallucinated.py",
    "tests/test_ffn.py",
    "tests/hosts/test_timm_vit.py",
)
_HALLUCINATED = (
    Entry(label="softmax"),
    Entry(
        label="hallucinated, probabilities",
        recipe=Recipe(Swap(attention=Hallucinated())),
    ),
    Entry(
        label="hallucinated, logits",
        recipe=Recipe(Swap(attention=Hallucinated(stage="logits"))),
    ),
)
_HALLUCINATED_AND_COMPACT = (
    *_HALLUCINATED[:2],
    Entry(label="compact", recipe=Recipe(Swap(ffn=Compact()))),
    Entry(
        label="hallucinated, probabilities + compact",
        recipe=Recipe(Swap(attention=Hallucinated(), ffn=Compact())),
    ),
)
_IVIT_SIZES = ((224, 224, 1), (224, 224, 8), (512, 512, 1), (1024, 1024, 1))
_SIZES = ((224, 224, 1), (224, 224, 8), (1080, 1920, 1))

CASES: tuple[Case, ...] = (
    CoreCase(
        name="hydra_core_d768",
        gate=_HYDRA_GATE,
        specs=(Hydra(),),
        dim=768,
        num_heads=12,
        num_tokens=_TOKENS,
    ),
    CoreCase(
        name="hydra_core_d384",
        gate=_HYDRA_GATE,
        specs=(Hydra(),),
        dim=384,
        num_heads=6,
        num_tokens=_TOKENS,
    ),
    ModelCase(
        name="hydra_deit_small",
        gate=(*_HYDRA_GATE, "tests/hosts/test_timm_vit.py"),
        architecture="deit_small_patch16_224",
        entries=_HYDRA_EVERYWHERE,
        inputs=_SIZES,
    ),
    ModelCase(
        name="hydra_deit_base",
        gate=(*_HYDRA_GATE, "tests/hosts/test_timm_vit.py"),
        architecture="deit_base_patch16_224",
        entries=_HYDRA_EVERYWHERE,
        inputs=_SIZES,
    ),
    CoreCase(
        name="interactive_core_d768",
        gate=_INTERACTIVE_GATE,
        specs=(
            Interactive(),
            Interactive(mix="both"),
            Interactive(mix="none"),
            Hydra(),
        ),
        dim=768,
        num_heads=12,
        num_tokens=_INTERACTIVE_TOKENS,
    ),
    CoreCase(
        name="interactive_core_d384",
        gate=_INTERACTIVE_GATE,
        specs=(
            Interactive(),
            Interactive(mix="both"),
            Interactive(mix="none"),
            Hydra(),
        ),
        dim=384,
        num_heads=6,
        num_tokens=_INTERACTIVE_TOKENS,
    ),
    LayerCase(
        name="interactive_block_d768",
        gate=_INTERACTIVE_GATE,
        architecture="deit_base_patch16_224",
        entries=_INTERACTIVE_EVERYWHERE,
        part="block",
        grids=_INTERACTIVE_GRIDS,
        batch_sizes=(1,),
    ),
    LayerCase(
        name="interactive_block_d384",
        gate=_INTERACTIVE_GATE,
        architecture="deit_small_patch16_224",
        entries=_INTERACTIVE_EVERYWHERE,
        part="block",
        grids=_INTERACTIVE_GRIDS,
        batch_sizes=(1,),
    ),
    ModelCase(
        name="ivit_tiny",
        gate=_IVIT_GATE,
        architecture="deit_tiny_patch16_224",
        entries=(
            Entry(label="deit_tiny"),
            Entry(label="ivit_tiny", architecture="ivit_tiny"),
        ),
        inputs=_IVIT_SIZES,
    ),
    ModelCase(
        name="ivit_base",
        gate=_IVIT_GATE,
        architecture="deit_small_patch16_224",
        entries=(
            Entry(label="deit_small"),
            Entry(label="ivit_small", architecture="ivit_small"),
            Entry(label="ivit_base", architecture="ivit_base"),
        ),
        inputs=_IVIT_SIZES,
    ),
    LayerCase(
        name="hallucinated_attention_d768",
        gate=_HALLUCINATED_GATE,
        architecture="deit_base_patch16_224",
        entries=_HALLUCINATED,
        part="attention",
        grids=((14, 14), (24, 24)),
    ),
    LayerCase(
        name="hallucinated_attention_d384",
        gate=_HALLUCINATED_GATE,
        architecture="deit_small_patch16_224",
        entries=_HALLUCINATED,
        part="attention",
        grids=((14, 14), (24, 24)),
    ),
    ModelCase(
        name="hallucinated_deit_base",
        gate=_HALLUCINATED_GATE,
        architecture="deit_base_patch16_224",
        entries=_HALLUCINATED_AND_COMPACT,
        inputs=((224, 224, 1), (224, 224, 8), (384, 384, 1)),
    ),
    ModelCase(
        name="hallucinated_deit_small",
        gate=_HALLUCINATED_GATE,
        architecture="deit_small_patch16_224",
        entries=_HALLUCINATED_AND_COMPACT,
        inputs=((224, 224, 1), (224, 224, 8), (384, 384, 1)),
    ),
)

# One tiny case of each kind, for `--smoke`.
SMOKE: tuple[Case, ...] = (
    CoreCase(
        name="smoke_core",
        gate=_HYDRA_GATE,
        specs=(Hydra(),),
        dim=48,
        num_heads=4,
        num_tokens=(17, 64),
        rounds=2,
        budget_s=1.0,
        working_set_mib=1,
    ),
    LayerCase(
        name="smoke_layer",
        gate=_HYDRA_GATE,
        architecture="deit_tiny_patch16_224",
        entries=(
            *_HYDRA_EVERYWHERE,
            Entry(label="softmax again", recipe=Recipe(Swap(attention=Softmax()))),
        ),
        part="block",
        grids=((2, 3),),
        batch_sizes=(2,),
        rounds=2,
        budget_s=1.0,
    ),
    ModelCase(
        name="smoke_model",
        gate=_HYDRA_GATE,
        architecture="deit_tiny_patch16_224",
        entries=_HYDRA_EVERYWHERE,
        inputs=((40, 64, 1),),
        memory=False,
        rounds=2,
        budget_s=1.0,
    ),
)
