"""The cases, as data: what is timed against what, at which sizes.

A new case is one more entry in `CASES`; `benchmarks.kinds` says what it may hold.
"""

from __future__ import annotations

import manyheads.backbones  # noqa: F401 - importing registers our own with timm
from benchmarks.kinds import Case, CoreCase, Entry, LayerCase, ModelCase
from manyheads import Compact, Hallucinated, Hydra, Interactive, Recipe, Softmax, Swap

__all__ = ["CASES", "SMOKE"]

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
