"""Cases of hallucinated attention and the compact layer: core, layer, block, model."""

from __future__ import annotations

from typing import Literal

from benchmarks.kinds import Case, CoreCase, Entry, LayerCase, ModelCase, WideCase
from benchmarks.targets import Target
from manyheads import Compact, Hallucinated, Recipe, Swap

__all__ = ["HALLUCINATED", "HALLUCINATED_CASES", "HALLUCINATED_GATE"]

HALLUCINATED_GATE = (
    "tests/kernels/test_hallucinated.py",
    "tests/kernels/test_hallucinated_whole.py",
    "tests/attention/test_hallucinated.py",
    "tests/test_ffn.py",
    "tests/hosts/test_timm_vit.py",
)
_SPECS = (Hallucinated(), Hallucinated(rank=2), Hallucinated(stage="logits"))
HALLUCINATED = Entry(
    label="hallucinated, probabilities", recipe=Recipe(Swap(attention=Hallucinated()))
)
_ATTENTION = (
    Entry(label="softmax"),
    HALLUCINATED,
    Entry(
        label="hallucinated, probabilities, rank 2",
        recipe=Recipe(Swap(attention=Hallucinated(rank=2))),
    ),
    Entry(
        label="hallucinated, logits",
        recipe=Recipe(Swap(attention=Hallucinated(stage="logits"))),
    ),
)
_WITH_MAPS = Entry(
    label="hallucinated, probabilities, with maps",
    recipe=HALLUCINATED.recipe,
    with_maps=True,
)
_BOTH = Entry(
    label="hallucinated + compact at D/2",
    recipe=Recipe(Swap(attention=Hallucinated(), ffn=Compact())),
)
_BOTH_NARROW = Entry(
    label="hallucinated + compact at D/4",
    recipe=Recipe(Swap(attention=Hallucinated(), ffn=Compact(rank=0.25))),
)
_WHOLE = (
    Entry(label="softmax"),
    HALLUCINATED,
    Entry(label="compact at D/2", recipe=Recipe(Swap(ffn=Compact()))),
    _BOTH,
    _BOTH_NARROW,
)
_INPUTS = ((224, 224, 1), (224, 224, 8), (384, 384, 1), (384, 384, 8))
_MODELS = {384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}
_NAMES = {384: "small", 768: "base"}
_Width = Literal[384, 768]

_MODULE_TARGET = Target(
    name="module_speedup",
    says="softmax over hallucinated in time, attention module, N = 197 and 577",
    rows={"form": HALLUCINATED.label},
    column="speedup.median",
    at_least=1.25,
)
_MEMORY_TARGET = Target(
    name="memory_growth",
    says="exponent of peak extra memory in N, fused forms",
    rows={"form": tuple(map(repr, _SPECS))},
    column="memory_growth",
    at_most=1.1,
)


def _promise(
    key: str, at_least: float, *, forms: tuple[Entry, ...], size: str | None = None
) -> Target:
    rows = {key: tuple(entry.label for entry in forms), "batch_size": 8}
    where = f" at {size}" if size else ""
    return Target(
        name="promise_kept",
        says=f"saved time over saved FLOPs{where}, batch 8, hallucinated + compact",
        rows=rows | ({"image_size": size} if size else {}),
        column="promise_kept",
        at_least=at_least,
    )


def _core(dim: _Width) -> CoreCase:
    return CoreCase(
        name=f"hallucinated_core_d{dim}",
        gate=HALLUCINATED_GATE,
        specs=_SPECS,
        with_maps=(Hallucinated(), Hallucinated(stage="logits")),
        dim=dim,
        num_heads=dim // 64,
        num_tokens=(197, 577, 1024, 4096),
        prefix=0,
        memory=(197, 577, 1024, 4096),
        budget_s=60.0,
        extra=True,
        targets=(_MEMORY_TARGET,),
    )


def _layer(
    dim: _Width, part: Literal["attention", "block"], *, compiled: bool, extra: bool
) -> LayerCase:
    module = part == "attention"
    if module:
        targets = (_MODULE_TARGET,) if dim == 768 else ()
        entries = _ATTENTION if compiled else (*_ATTENTION, _WITH_MAPS)
    else:
        targets = (_promise("form", 0.85, forms=(_BOTH,)),) if dim == 768 else ()
        entries = _WHOLE
    return LayerCase(
        name=f"hallucinated_{part}_d{dim}{'_compiled' if compiled else ''}",
        gate=HALLUCINATED_GATE,
        architecture=_MODELS[dim],
        entries=entries,
        part=part,
        grids=((14, 14), (24, 24)),
        memory=not compiled,
        compiled=compiled,
        budget_s=30.0 if not extra else 50.0,
        extra=extra,
        targets=targets,
    )


def _model(dim: _Width, *, compiled: bool) -> ModelCase:
    targets: tuple[Target, ...] = ()
    if dim == 768:
        targets = (_promise("name", 0.85, forms=(_BOTH,)),)
    elif compiled:
        # At least as much faster as there are fewer FLOPs.
        pair = (_BOTH, _BOTH_NARROW)
        targets = (_promise("name", 1.0, forms=pair, size="224x224"),)
    return ModelCase(
        name=f"hallucinated_deit_{_NAMES[dim]}{'_compiled' if compiled else ''}",
        gate=HALLUCINATED_GATE,
        architecture=_MODELS[dim],
        entries=_WHOLE,
        inputs=_INPUTS,
        compiled=compiled,
        memory=not compiled,
        budget_s=200.0,
        extra=True,
        targets=targets,
    )


def _wide_values(dim: _Width) -> WideCase:
    # One form at 8,160 tokens takes a second for one image.
    return WideCase(
        name=f"wide_values_d{dim}",
        gate=HALLUCINATED_GATE,
        forms=("chunked", "padded", "calls"),
        dim=dim,
        num_heads=dim // 64,
        sizes=(
            *((N, 1) for N in (197, 577, 2048, 8160)),
            *((N, 8) for N in (197, 577, 2048)),
        ),
        memory=(2048, 8160),
        budget_s=150.0,
        extra=True,
    )


HALLUCINATED_CASES: tuple[Case, ...] = (
    _wide_values(768),
    _core(768),
    _core(384),
    _layer(768, "attention", compiled=False, extra=False),
    _layer(384, "attention", compiled=False, extra=True),
    _layer(768, "block", compiled=False, extra=True),
    _layer(384, "block", compiled=False, extra=True),
    _layer(768, "attention", compiled=True, extra=True),
    _layer(384, "attention", compiled=True, extra=True),
    _layer(768, "block", compiled=True, extra=True),
    _layer(384, "block", compiled=True, extra=True),
    _model(768, compiled=False),
    _model(384, compiled=False),
    _model(768, compiled=True),
    _model(384, compiled=True),
)
