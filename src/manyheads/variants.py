"""Names for timm's own models with hallucinated attention and compact layers.

    import manyheads.variants
    model = timm.create_model("deit_small_patch16_224_hallucinated")

Each is the timm model of that name with both modules of arXiv 2306.10875 in every
block that can take them, at R = D/2 and default options: random weights, to train from
scratch; ``pretrained=True`` starts from timm's weights instead, and the result needs
healing. A saved one is stored as what it is: timm's model and a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from manyheads.attention import Hallucinated
from manyheads.conversion import convert
from manyheads.ffn import Compact
from manyheads.recipe import Recipe, Swap

__all__ = ["BASES", "RECIPE", "SUFFIX"]

RECIPE = Recipe(Swap(attention=Hallucinated(), ffn=Compact()))
SUFFIX = "_hallucinated"
BASES = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "pvt_v2_b0",
    "pvt_v2_b1",
    "pvt_v2_b2",
    "pvt_v2_b2_li",
    "pvt_v2_b3",
    "pvt_v2_b4",
    "pvt_v2_b5",
    "nextvit_small",
    "nextvit_base",
    "nextvit_large",
)


def _variant(base: str) -> Callable[..., nn.Module]:
    """Make the function that timm calls for one name; its arguments are timm's."""

    def build(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return convert(
            timm.create_model(base, pretrained=pretrained, **arguments), RECIPE
        )

    build.__name__ = build.__qualname__ = f"{base}{SUFFIX}"
    build.__doc__ = f"Build timm's {base} with half its maps hallucinated."
    return build


for _base in BASES:
    register_model(_variant(_base))
