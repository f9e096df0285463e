"""torchvision's VisionTransformer: `vit_b_16` and relatives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manyheads.attention import AttentionSpec, Softmax
from manyheads.errors import CheckpointError, ImageSizeError
from manyheads.ffn import CompactLinear
from manyheads.geometry import fit_to_patches
from manyheads.hosts.base import Host, ImageInput, Site, TokenGrid, mechanism_of
from manyheads.hosts.torch_attention import (
    TorchAttention,
    multihead_geometry,
    permute_multihead,
)

__all__ = ["TorchvisionViT"]

_MODULE = "torchvision.models.vision_transformer"
# What its constructor takes and the model remembers under the same name.
_REMEMBERED = (
    "image_size",
    "patch_size",
    "hidden_dim",
    "mlp_dim",
    "dropout",
    "attention_dropout",
    "num_classes",
    "representation_size",
)
_ARGUMENTS = frozenset({*_REMEMBERED, "num_layers", "num_heads"})


class TorchvisionViT(Host):
    """Hosts `torchvision.models.VisionTransformer`, whoever called its constructor."""

    name: ClassVar[str] = "torchvision"

    def recognises(self, model: nn.Module) -> bool:
        """Look at the class's module only, so that torchvision need not be imported."""
        return any(
            kind.__module__.startswith("torchvision.") for kind in type(model).__mro__
        )

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """List the encoder's blocks; other models of the library have none."""
        if not _is_vision_transformer(model):
            return ()
        found = [
            (name, module)
            for name, module in model.named_modules()
            if type(module).__module__ == _MODULE
            and type(module).__name__ == "EncoderBlock"
        ]
        return tuple(
            _site(model, index, path, block)
            for index, (path, block) in enumerate(found)
        )

    def refusal(self, model: nn.Module) -> str:
        """Name what the library's other transformers do."""
        name = type(model).__name__
        if name in {"SwinTransformer", "MaxVit"}:
            return f"the attention of {name} is windowed, with a relative bias"
        return f"{name} is not the library's VisionTransformer"

    def swap_attention(
        self, model: nn.Module, site: Site, spec: AttentionSpec
    ) -> nn.Module:
        """Build the drop-in from the packed projections that are there."""
        source: Any = model.get_submodule(site.attention_path)
        return TorchAttention(source, site.geometry, spec)

    def permute_heads(self, model: nn.Module, site: Site, order: Sequence[int]) -> None:
        """Reorder rows of the packed projection and columns of the output."""
        layer = model.get_submodule(site.attention_path)
        permute_multihead(layer, site.geometry, order)

    def track_grid(self, model: Any) -> None:
        """Hook the patch convolution where a mechanism asks for the grid."""
        layers = [m for m in model.modules() if isinstance(m, TorchAttention)]
        waiting = [m for m in layers if m.core.needs_grid]
        known = next((m.token_grid for m in layers if m.token_grid is not None), None)
        if waiting and known is None:
            known = TokenGrid()
            model.conv_proj.register_forward_hook(known.watch_map)
        for layer in waiting:
            layer.token_grid = known

    def image_input(self, model: Any) -> ImageInput:
        """Give the library's own preset: the model does not remember its weights'."""
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        return ImageInput(
            channels=first.in_channels,
            size=(model.image_size, model.image_size),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            interpolation="bilinear",
            crop=0.875,
        )

    def resize(self, model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        """Resample the position embedding; this library knows square images only."""
        patch = model.patch_size
        actual = fit_to_patches(image_size, (patch, patch))
        if actual[0] != actual[1]:
            raise ImageSizeError(
                asked=f"image_size={image_size[0]}x{image_size[1]}",
                found="torchvision's VisionTransformer takes square images only",
                why="its forward pass checks both sides against one number",
                fix=f"Use a square whose side is a multiple of {patch}, e.g. "
                f"{max(actual)}x{max(actual)}.",
            )
        if actual[0] != model.image_size:
            _resample(model, actual[0])
        return actual

    def labels(self, model: Any) -> tuple[str, ...]:
        """Number the classes: the model does not remember its weights' names."""
        head = getattr(model.heads, "head", None)
        return tuple(map(str, range(head.out_features if head is not None else 0)))

    def gives_scores(self, model: Any, output: Tensor) -> bool:
        """Look for the classifier: without it the model gives features."""
        return isinstance(getattr(model.heads, "head", None), nn.Linear)

    def describe(self, model: Any) -> dict[str, Any]:
        """Give the constructor's arguments, read off the model."""
        reason = None
        if not _is_vision_transformer(model):
            reason = "it is not exactly the library's VisionTransformer"
        elif not isinstance(model.conv_proj, nn.Conv2d):
            reason = "it has a convolutional stem (conv_stem_configs)"
        elif not _is_default_norm(model.norm_layer):
            reason = "it was built with another norm_layer"
        if reason:
            raise CheckpointError(
                asked=f"saving a {type(model).__name__}",
                found=reason,
                why="a checkpoint holds data only, so the model must be built again",
                fix="Build it with torchvision.models.vit_b_16(...) or a relative.",
            )
        layers = model.encoder.layers
        arguments = {name: getattr(model, name) for name in _REMEMBERED}
        return arguments | {
            "num_layers": len(layers),
            "num_heads": layers[0].self_attention.num_heads,
        }

    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Call the constructor with exactly the arguments that `describe` gives."""
        from torchvision.models import VisionTransformer

        plain = all(
            value is None or isinstance(value, int | float)
            for value in description.values()
        )
        if set(description) != _ARGUMENTS or not plain:
            odd = sorted(set(description) ^ _ARGUMENTS) or ["a value"]
            raise _not_buildable(description, f"wrong or missing: {', '.join(odd)}")
        try:
            model: nn.Module = VisionTransformer(**description)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise _not_buildable(description, f"torchvision refuses: {error}") from None
        return model


def _is_vision_transformer(model: nn.Module) -> bool:
    kind = type(model)
    return kind.__module__ == _MODULE and kind.__name__ == "VisionTransformer"


def _is_default_norm(norm_layer: Any) -> bool:
    return (
        isinstance(norm_layer, partial)
        and norm_layer.func is nn.LayerNorm
        and norm_layer.keywords == {"eps": 1e-6}
    )


def _site(model: Any, index: int, path: str, block: Any) -> Site:
    attention = block.self_attention
    core = mechanism_of(attention)
    output = block.mlp[3]
    side = model.image_size // model.patch_size
    return Site(
        index=index,
        path=path,
        attention_path=f"{path}.self_attention",
        ffn_path=f"{path}.mlp.3",
        geometry=multihead_geometry(attention, num_prefix_tokens=1, grid=(side, side)),
        attention=core.spec if core else Softmax(),
        ffn=output.spec if isinstance(output, CompactLinear) else None,
        renamed=core is not None,
    )


def _resample(model: Any, side: int) -> None:
    """Let the library resample its table, and tell the model its new size."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    table = model.encoder.pos_embedding
    key = "encoder.pos_embedding"
    with torch.no_grad():
        state = interpolate_embeddings(side, model.patch_size, {key: table.detach()})
    resampled = nn.Parameter(state[key], requires_grad=table.requires_grad)
    model.encoder.pos_embedding = resampled
    model.image_size = side
    model.seq_length = resampled.shape[1]


def _not_buildable(description: dict[str, Any], found: str) -> CheckpointError:
    return CheckpointError(
        asked=f"building a torchvision VisionTransformer with {description!r:.200}",
        found=found,
        why="a checkpoint may hold numbers, nothing else",
        fix="Load only checkpoints written by manyheads.save().",
    )
