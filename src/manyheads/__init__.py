"""Makes the Vision Transformers you already have cheaper.

The public names, and nothing else. They are imported when first used, so that
importing the package loads no more than torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyheads.attention import Hallucinated as Hallucinated
    from manyheads.attention import Hydra as Hydra
    from manyheads.attention import Interactive as Interactive
    from manyheads.attention import Softmax as Softmax
    from manyheads.checkpoint import load as load
    from manyheads.checkpoint import save as save
    from manyheads.conversion import convert as convert
    from manyheads.conversion import preview as preview
    from manyheads.costs import cost as cost
    from manyheads.exporting import export as export
    from manyheads.ffn import Compact as Compact
    from manyheads.healing import heal as heal
    from manyheads.maps import attention_maps as attention_maps
    from manyheads.recipe import Recipe as Recipe
    from manyheads.recipe import Swap as Swap
    from manyheads.timing import bench as bench
    from manyheads.training import evaluate as evaluate
    from manyheads.training import train as train

__version__ = "0.1.0"

_HOME = {
    "Compact": "ffn",
    "Hallucinated": "attention",
    "Hydra": "attention",
    "Interactive": "attention",
    "Recipe": "recipe",
    "Softmax": "attention",
    "Swap": "recipe",
    "attention_maps": "maps",
    "bench": "timing",
    "convert": "conversion",
    "cost": "costs",
    "evaluate": "training",
    "export": "exporting",
    "heal": "healing",
    "load": "checkpoint",
    "preview": "conversion",
    "save": "checkpoint",
    "train": "training",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'manyheads' has no attribute {name!r}")
    return getattr(importlib.import_module(f"manyheads.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
