"""How images enter transformers' vision towers: their sizes, grids and forms."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.geometry import Grid

__all__ = [
    "feed_images",
    "interpolate",
    "is_interpolating",
    "native_grid",
    "native_size",
    "pair_of",
    "patch_convolution",
    "takes_any_size",
]

# Embeddings that take any whole grid without being told.
_ANY_SIZE = frozenset(
    {
        "Dinov2Embeddings",
        "Dinov2WithRegistersEmbeddings",
        "DINOv3ViTEmbeddings",
        "Siglip2VisionEmbeddings",
    }
)


def feed_images(model: Any, root: Any, images: Tensor) -> Any:
    """Run the tower, or all of the model where there is no text beside it.

    SigLIP 2 is given patches, as its image processor does, and ViT-MAE fixed noise.

    Args:
        model: The model.
        root: Its vision tower.
        images: What it is shown, [B, C, H, W].
    """
    text = hasattr(model, "get_image_features") or _answers_in_text(model)
    runs = root if text else model
    embeddings = type(root.embeddings).__name__
    if embeddings == "Siglip2VisionEmbeddings":
        return _feed_patches(runs, images, root.config.patch_size)
    if embeddings == "ViTMAEEmbeddings":
        patch = pair_of(root.config.patch_size)
        count = (images.shape[-2] // patch[0]) * (images.shape[-1] // patch[1])
        # The same patches for every image and every model: student and teacher.
        chance = torch.rand(1, count, generator=torch.Generator().manual_seed(0))
        noise = chance.to(images.device).expand(images.shape[0], -1)
        return runs(images, noise=noise)
    with _rotation_without_values(root, images):
        return runs(images)


def _answers_in_text(model: Any) -> bool:
    """Say whether a text decoder reads the tower, as in TrOCR."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def takes_any_size(model: nn.Module, root: Any) -> bool:
    """Say whether any whole grid is taken, by nature or because that was set."""
    return type(root.embeddings).__name__ in _ANY_SIZE or is_interpolating(model, root)


def interpolate(model: nn.Module, root: Any) -> bool:
    """Have positions resampled to each image's grid from now on, if that can be."""
    module = _resampled(model, root)
    if "interpolate_pos_encoding" not in inspect.signature(module.forward).parameters:
        return False
    module.register_forward_pre_hook(_interpolate, with_kwargs=True)
    return True


def is_interpolating(model: nn.Module, root: Any) -> bool:
    """Say whether `interpolate` was called."""
    return _interpolate in _resampled(model, root)._forward_pre_hooks.values()


def _resampled(model: nn.Module, root: Any) -> nn.Module:
    """Find what is told to resample: the embeddings, or a model that has more."""
    # ViT-MAE's decoder has positions of its own, and hears of it from the model.
    embeddings: nn.Module = root.embeddings
    text = _answers_in_text(model)
    return model if hasattr(model, "decoder") and not text else embeddings


def native_size(root: Any) -> tuple[int, int]:
    """Give the height and width in pixels that the tower was built for."""
    if hasattr(root.config, "image_size"):
        return pair_of(root.config.image_size)
    # SigLIP 2 knows a number of patches; its positions are a square of that area.
    side = root.config.patch_size * int(root.config.num_patches**0.5)
    return side, side


def native_grid(root: Any) -> Grid | None:
    """Give the grid, or None where blocks do not see all patches in their order."""
    if patch_convolution(root) is None or hasattr(root.config, "mask_ratio"):
        return None
    patch = pair_of(root.config.patch_size)
    height, width = native_size(root)
    return height // patch[0], width // patch[1]


def patch_convolution(root: Any) -> nn.Conv2d | None:
    """Find what cuts images into patches; None where the caller did so before."""
    found = (m for m in root.embeddings.modules() if isinstance(m, nn.Conv2d))
    return next(found, None)


def pair_of(value: Any) -> tuple[int, int]:
    """Read one number as both sides of a square."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _feed_patches(model: Any, images: Tensor, side: int) -> Any:
    """Cut images into rows of patch values, as SigLIP 2's image processor does."""
    B, C, height, width = images.shape
    rows, columns = height // side, width // side
    patches = images.reshape(B, C, rows, side, columns, side)
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    # Version 4 calls it otherwise in the tower than in the model around it.
    known = inspect.signature(model.forward).parameters
    mask = "pixel_attention_mask"
    return model(
        patches,
        spatial_shapes=torch.tensor([[rows, columns]] * B),
        **{mask if mask in known else "attention_mask": None},
    )


@contextmanager
def _rotation_without_values(root: Any, images: Tensor) -> Iterator[None]:
    """Count DINOv3 on the meta device, where version 4 cannot make its rotation."""
    rotation = getattr(root, "rope_embeddings", None)
    if rotation is None or images.device.type != "meta":
        yield
        return
    patch = pair_of(root.config.patch_size)
    count = (images.shape[-2] // patch[0]) * (images.shape[-1] // patch[1])
    waves = images.new_empty(count, rotation.head_dim)
    rotation.forward = lambda _: (waves, waves)
    try:
        yield
    finally:
        del rotation.forward


def _interpolate(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: have positions resampled to the image's grid."""
    return args, kwargs | {"interpolate_pos_encoding": True}
