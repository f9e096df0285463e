"""The backbones of this package, so that every verb takes them like any other model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from manyheads.attention import AttentionSpec
from manyheads.ffn import CompactLinear
from manyheads.geometry import fit_to_patches
from manyheads.hosts.base import Host, ImageInput, Site
from manyheads.hosts.timm_vit import TimmViT

__all__ = ["OwnBackbone"]


class OwnBackbone(Host):
    """Hosts the models of `manyheads.backbones`.

    They are registered with timm and built by it, so timm's host answers for how they
    are built and what images they want. Their blocks pass the token grid themselves.
    """

    name: ClassVar[str] = "manyheads"

    def __init__(self) -> None:
        self._timm = TimmViT()

    def recognises(self, model: nn.Module) -> bool:
        """Look at the class's module only, so that nothing need be imported."""
        return type(model).__module__.startswith("manyheads.backbones.")

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """List the token blocks; the convolutional ones hold no attention."""
        from manyheads.backbones.blocks import TokenBlock

        blocks = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, TokenBlock)
        ]
        return tuple(
            Site(
                index=index,
                path=path,
                attention_path=f"{path}.attn",
                ffn_path=f"{path}.mlp.fc2",
                geometry=block.attn.core.geometry,
                attention=block.attn.core.spec,
                ffn=fc2.spec
                if isinstance(fc2 := block.mlp.fc2, CompactLinear)
                else None,
                # It is built with interactive attention, so softmax is a change.
                renamed=True,
                fixed_query_heads="this backbone projects queries of all heads",
            )
            for index, (path, block) in enumerate(blocks)
        )

    def refusal(self, model: nn.Module) -> str:
        """Say that pruning left the convolutional stages only."""
        return "its attention stages have been cut off"

    def swap_attention(
        self, model: nn.Module, site: Site, spec: AttentionSpec
    ) -> nn.Module:
        """Wrap the projections that are there around the new mechanism."""
        from manyheads.backbones.blocks import SelfAttention

        source: Any = model.get_submodule(site.attention_path)
        return SelfAttention(site.geometry, spec, source=source)

    def track_grid(self, model: nn.Module) -> None:
        """Do nothing: the blocks know their grid."""

    def image_input(self, model: nn.Module) -> ImageInput:
        """Read timm's data configuration."""
        return self._timm.image_input(model)

    def resize(self, model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
        """Accept any size of at least one cell of the last stage, as it is."""
        fit_to_patches(image_size, (32, 32))
        return image_size

    def free_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Say that whole cells of the last stage run; nothing needs to change."""
        return (32, 32)

    def labels(self, model: nn.Module) -> tuple[str, ...]:
        """Give the recorded names, ImageNet's where the count tells, else numbers."""
        return self._timm.labels(model)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Give the registered name and the arguments that timm recorded."""
        return self._timm.describe(model)

    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Build by registered name, after registering."""
        import manyheads.backbones  # noqa: F401 - importing registers the names

        return self._timm.rebuild(description)
