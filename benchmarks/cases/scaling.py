"""Cases from 224 pixels to 8K: does the cost of a token stay what it was?"""

from __future__ import annotations

from benchmarks.cases.hallucinated import HALLUCINATED, HALLUCINATED_GATE
from benchmarks.cases.hydra import EVERYWHERE, GATE
from benchmarks.cases.interactive import INTERACTIVE_GATE
from benchmarks.kinds import Case, Entry, ScalingCase
from benchmarks.targets import Target
from manyheads import Interactive, Recipe, Swap

__all__ = ["SCALING_CASES"]

_SOFTMAX, _HYDRA = EVERYWHERE
_INTERACTIVE = Entry(
    label="Interactive in all blocks", recipe=Recipe(Swap(attention=Interactive()))
)
_LINEAR = (_HYDRA.label, _INTERACTIVE.label)
# 1080p is 8,161 tokens of 16 pixels; at 4K, 32,401, softmax takes minutes an image.
_QUADRATIC_TOKENS = 8200

SCALING_CASES: tuple[Case, ...] = (
    ScalingCase(
        name="scaling_deit_small",
        gate=tuple(dict.fromkeys((*GATE, *INTERACTIVE_GATE, *HALLUCINATED_GATE))),
        architecture="deit_small_patch16_224",
        entries=(_SOFTMAX, _HYDRA, _INTERACTIVE, HALLUCINATED),
        sizes=((224, 224), (512, 512), (1080, 1920), (2160, 3840), (4320, 7680)),
        most_tokens=(
            (_SOFTMAX.label, _QUADRATIC_TOKENS),
            (HALLUCINATED.label, _QUADRATIC_TOKENS),
        ),
        budget_s=300.0,
        extra=True,
        targets=(
            Target(
                name="growth",
                says="exponent of time in N",
                rows={"form": _LINEAR},
                column="growth",
                at_most=1.1,
            ),
            Target(
                name="memory_growth",
                says="exponent of peak extra memory in N",
                rows={"form": _LINEAR},
                column="memory_growth",
                at_most=1.1,
            ),
            Target(
                name="peak_4k",
                says="MiB at the peak of the whole process at 2160x3840",
                rows={"name": _LINEAR, "image_size": "2160x3840"},
                column="peak_mib",
                at_most=6144.0,
            ),
        ),
    ),
)
