"""Cases of Hydra attention: its core, and DeiT with it in every block."""

from __future__ import annotations

from benchmarks.kinds import GIVEN, Case, CoreCase, Entry, ModelCase
from benchmarks.targets import Target
from manyheads import Hydra, Recipe, Swap

__all__ = ["EVERYWHERE", "GATE", "HYDRA_CASES"]

GATE = ("tests/kernels/test_hydra.py", "tests/attention/test_hydra.py")
EVERYWHERE = (
    Entry(label="softmax"),
    Entry(label="Hydra in all blocks", recipe=Recipe(Swap(attention=Hydra()))),
)
_MODEL_GATE = (*GATE, "tests/hosts/test_timm_vit.py")
_TOKENS = (197, 577, 1024, 2048, 4096, 8160, 16384)
_LARGE = (4096, 8160, 16384)
_SIZES = ((224, 224, 1), (224, 224, 8), (1080, 1920, 1))


def _near_the_copy(name: str, form: str) -> Target:
    return Target(
        name=name,
        says=f"copy rate of {form} from N = 4,096 up",
        rows={"form": form, "num_tokens": _LARGE},
        column="share_of_copy_rate.median",
        at_least=0.5,
    )


_CORE_TARGETS = (
    _near_the_copy("copy_rate", "Hydra()"),
    _near_the_copy("copy_rate_output_given", GIVEN),
)


def _at_1080p(at_least: float) -> Target:
    return Target(
        name="speedup_1080p",
        says="softmax over Hydra in time at 1080x1920",
        rows={"name": "Hydra in all blocks", "image_size": "1080x1920"},
        column="speedup.median",
        at_least=at_least,
    )


HYDRA_CASES: tuple[Case, ...] = (
    CoreCase(
        name="hydra_core_d768",
        gate=GATE,
        specs=(Hydra(),),
        dim=768,
        num_heads=12,
        num_tokens=_TOKENS,
        memory=(1024, 8160),
        budget_s=60.0,
        targets=_CORE_TARGETS,
    ),
    CoreCase(
        name="hydra_core_d384",
        gate=GATE,
        specs=(Hydra(),),
        dim=384,
        num_heads=6,
        num_tokens=_TOKENS,
        memory=(1024, 8160),
        extra=True,
        targets=_CORE_TARGETS,
    ),
    ModelCase(
        name="hydra_deit_small",
        gate=_MODEL_GATE,
        architecture="deit_small_patch16_224",
        entries=EVERYWHERE,
        inputs=_SIZES,
        budget_s=75.0,
        targets=(_at_1080p(4.5),),
    ),
    ModelCase(
        name="hydra_deit_base",
        gate=_MODEL_GATE,
        architecture="deit_base_patch16_224",
        entries=EVERYWHERE,
        inputs=_SIZES,
        budget_s=200.0,
        extra=True,
        targets=(_at_1080p(3.1),),
    ),
)
