"""What timm's hierarchical models share: made by name, any image size, stages."""

from __future__ import annotations

from typing import Any

from torch import nn

from manyheads.geometry import fit_to_patches
from manyheads.hosts.base import Host, ImageInput
from manyheads.hosts.timm_vit import TimmViT

__all__ = ["TimmPyramid"]

_PLAIN = TimmViT()
# The last stage has one cell for every 32 pixels.
_COARSEST = 32


class TimmPyramid(Host):
    """Hosts timm models whose stages halve the token grid; they take any size."""

    def refusal(self, model: nn.Module) -> str:
        """Say that the blocks are not those the library builds."""
        return "its blocks are not those that timm builds"

    def image_input(self, model: nn.Module) -> ImageInput:
        """Read timm's data configuration."""
        return _PLAIN.image_input(model)

    def resize(self, model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        """Accept any size of at least one cell of the last stage, unpadded."""
        fit_to_patches(image_size, (_COARSEST, _COARSEST))
        return image_size

    def free_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Say that whole cells of the last stage run; nothing needs to change."""
        return (_COARSEST, _COARSEST)

    def labels(self, model: nn.Module) -> tuple[str, ...]:
        """Give the recorded names, ImageNet's where the count tells, else numbers."""
        return _PLAIN.labels(model)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Give the registered name and the arguments that timm recorded."""
        return _PLAIN.describe(model)

    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Build by registered name; arguments that load files are refused."""
        return _PLAIN.rebuild(description)
