"""What a borrowed GPU is asked, the most important first; sizes that fill the chip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.kinds import Case, CoreCase, Entry, LayerCase, ModelCase, WideCase
from benchmarks.targets import Target
from manyheads import Compact, Hallucinated, Hydra, Interactive, Recipe, Swap
from manyheads.kernels.hallucinated import Form

__all__ = [
    "BOTH",
    "FORWARD",
    "GPU_CASES",
    "GPU_PIECES",
    "GPU_SMOKE",
    "WIDE_FORMS",
    "Piece",
]

FORWARD, BOTH = "Hydra(), forward", "Hydra(), forward and backward"
# The ways of `manyheads.kernels.hallucinated.attend` that run on CUDA.
WIDE_FORMS: tuple[Form, ...] = ("fused", "padded", "calls", "triton", "flex")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One process of a run, with the seconds it may take.

    Attributes:
        case: What is measured.
        how: "hydra" and "wide" are measured here, on replayed graphs; "cases" as every
            other benchmark is.
        limit_s: Seconds after which the process is ended.
        gate: Test files that must be green.
    """

    case: Case
    how: Literal["hydra", "wide", "cases"]
    limit_s: float
    gate: tuple[str, ...]


def _target(name: str, form: str, at_least: float) -> Target:
    return Target(
        name=name,
        says=f"copy rate of {form} from N = 4,096 up",
        rows={"form": form, "num_tokens": (4096, 8160, 65536)},
        column="share_of_copy_rate.median",
        at_least=at_least,
    )


_HYDRA_GATE = ("test_triton_hydra",)
_MODEL_GATE = ("test_triton_hydra", "test_triton_interactive", "test_gpu")
_SPECS = (Hydra(), Interactive(), Interactive(mix="both"), Hallucinated())
_BASE = Entry(label="softmax")
_SWAPPED = tuple(
    Entry(label=repr(spec), recipe=Recipe(Swap(attention=spec))) for spec in _SPECS
)

_HALLUCINATED = tuple(
    Entry(label=label, recipe=Recipe(Swap(attention=spec)))
    for label, spec in (
        ("hallucinated, probabilities", Hallucinated()),
        ("hallucinated, logits", Hallucinated(stage="logits")),
    )
)
_COMPACT = (
    Entry(label="compact at D/2", recipe=Recipe(Swap(ffn=Compact()))),
    Entry(
        label="hallucinated + compact at D/2",
        recipe=Recipe(Swap(attention=Hallucinated(), ffn=Compact())),
    ),
)

# Blocks of these have fewer FLOPs than fused softmax from 197 tokens up.
_FEWER_FLOPS_LESS_TIME = Target(
    name="block_speedup",
    says="softmax over interactive and hallucinated in time, block, all sizes",
    rows={"form": tuple(map(repr, _SPECS[1:]))},
    column="speedup.median",
    at_least=1.0,
)


def _core(name: str, tokens: tuple[int, ...], batch: int, **more: object) -> CoreCase:
    fields = {
        "name": name,
        "gate": (),
        "specs": (Hydra(),),
        "dim": 768,
        "num_heads": 12,
        "num_tokens": tokens,
        "batch_size": batch,
        "dtype": "bfloat16",
        "budget_s": 40.0,
    }
    return CoreCase(**(fields | more))  # type: ignore[arg-type]


def _blocks(
    name: str, grids: tuple[tuple[int, int], ...], *, compiled: bool
) -> LayerCase:
    return LayerCase(
        name=name,
        gate=(),
        architecture="deit_base_patch16_224",
        entries=(_BASE, *_SWAPPED),
        part="block",
        grids=grids,
        batch_sizes=(8,),
        dtype="bfloat16",
        compiled=compiled,
        budget_s=20.0,
        targets=(_FEWER_FLOPS_LESS_TIME,),
    )


def _wide(
    name: str, forms: tuple[Form, ...], sizes: tuple[tuple[int, int], ...], **more: Any
) -> WideCase:
    fields: dict[str, Any] = {
        "name": name,
        "gate": (),
        "forms": forms,
        "dim": 768,
        "num_heads": 12,
        "sizes": sizes,
        "dtype": "bfloat16",
        "budget_s": 40.0,
    }
    return WideCase(**(fields | more))


def _attention(name: str, grids: tuple[tuple[int, int], ...]) -> LayerCase:
    """Hallucinated attention layers beside timm's, whose softmax is fused."""
    return LayerCase(
        name=name,
        gate=(),
        architecture="deit_base_patch16_224",
        entries=(_BASE, *_HALLUCINATED),
        part="attention",
        grids=grids,
        batch_sizes=(1, 64),
        dtype="bfloat16",
        budget_s=20.0,
    )


def _hallucinated_deit(name: str, architecture: str, *, compiled: bool) -> ModelCase:
    """Both halves of one paper in every block, each alone and together."""
    return ModelCase(
        name=name,
        gate=(),
        architecture=architecture,
        entries=(_BASE, _HALLUCINATED[0], *_COMPACT),
        # Compiling takes longer than all else, once for each entry and size.
        inputs=((224, 224, 128),) if compiled else ((224, 224, 128), (384, 384, 64)),
        dtype="bfloat16",
        compiled=compiled,
        memory=False,
        budget_s=20.0,
    )


def _deit(name: str, *, compiled: bool) -> ModelCase:
    return ModelCase(
        name=name,
        gate=(),
        architecture="deit_base_patch16_224",
        entries=(_BASE, *_SWAPPED[:2]),
        inputs=((1080, 1920, 1),),
        dtype="bfloat16",
        compiled=compiled,
        budget_s=20.0,
        targets=(
            Target(
                name="speedup_1080p",
                says="softmax over Hydra in time at 1080x1920",
                rows={"name": "Hydra()", "image_size": "1080x1920"},
                column="speedup.median",
                at_least=1.5,
            ),
        )
        if compiled
        else (),
    )


_HYDRA_TARGETS = (_target("forward", FORWARD, 0.85), _target("both", BOTH, 0.75))

GPU_PIECES: tuple[Piece, ...] = (
    Piece(
        case=_core(
            "gpu_hydra_core_d768",
            (1024, 4096, 8160, 65536),
            16,
            targets=_HYDRA_TARGETS,
        ),
        how="hydra",
        limit_s=75,
        gate=_HYDRA_GATE,
    ),
    Piece(
        case=_deit("gpu_deit_base_compiled", compiled=True),
        how="cases",
        limit_s=150,
        gate=_MODEL_GATE,
    ),
    Piece(
        case=_blocks(
            "gpu_blocks_d768",
            ((14, 14), (28, 28), (56, 56), (68, 120)),
            compiled=False,
        ),
        how="cases",
        limit_s=75,
        gate=_MODEL_GATE,
    ),
    Piece(
        case=_wide(
            "gpu_wide_values_d768",
            WIDE_FORMS,
            tuple((N, 8) for N in (197, 1024, 4096, 8160)),
        ),
        how="wide",
        limit_s=100,
        gate=("test_triton_attention", "test_gpu"),
    ),
    Piece(
        case=_attention("gpu_hallucinated_attention_d768", ((14, 14), (24, 24))),
        how="cases",
        limit_s=60,
        gate=("test_gpu",),
    ),
    *(
        Piece(
            case=_hallucinated_deit(
                f"gpu_hallucinated_deit_{size}{'_compiled' if compiled else ''}",
                f"deit_{size}_patch16_224",
                compiled=compiled,
            ),
            how="cases",
            limit_s=120 if compiled else 60,
            gate=("test_gpu",),
        )
        for compiled in (False, True)
        for size in ("base", "small")
    ),
    Piece(
        case=_deit("gpu_deit_base_memory", compiled=False),
        how="cases",
        limit_s=90,
        gate=_MODEL_GATE,
    ),
    Piece(
        case=_blocks("gpu_blocks_d768_compiled", ((68, 120),), compiled=True),
        how="cases",
        limit_s=120,
        gate=_MODEL_GATE,
    ),
)

GPU_CASES: tuple[Case, ...] = tuple(piece.case for piece in GPU_PIECES)

_QUICK: dict[str, Any] = {
    "dim": 48,
    "num_heads": 4,
    "rounds": 2,
    "budget_s": 1.0,
    "dtype": "float32",
}

# The same way through the program where nothing is fast: no number means anything.
GPU_SMOKE: tuple[Piece, ...] = (
    Piece(
        case=_core("gpu_smoke_hydra", (17,), 1, targets=_HYDRA_TARGETS, **_QUICK),
        how="hydra",
        limit_s=60,
        gate=_HYDRA_GATE,
    ),
    Piece(
        case=_wide(
            "gpu_smoke_wide", ("chunked", "padded", "calls"), ((17, 1),), **_QUICK
        ),
        how="wide",
        limit_s=60,
        gate=("test_gpu",),
    ),
    Piece(
        case=LayerCase(
            name="gpu_smoke_block",
            gate=(),
            architecture="deit_tiny_patch16_224",
            entries=(_BASE, _SWAPPED[0]),
            part="block",
            grids=((2, 3),),
            batch_sizes=(1,),
            rounds=2,
            budget_s=1.0,
        ),
        how="cases",
        limit_s=60,
        gate=("test_gpu",),
    ),
)
