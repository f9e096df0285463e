"""Sizes of an attention layer, and the one axis legend of the package.

======  =====================================================================
letter  axis
======  =====================================================================
``B``   images in the batch
``N``   tokens, prefix tokens included
``S``   tokens that keys and values come from: ``N`` unless the layer reduces them
``P``   prefix tokens: class token, distillation token, registers
``L``   landmarks
``H``   heads
``D``   width of the tokens that are mixed, ``D = H * K``
``K``   width of one head
``F``   hidden width of the feed-forward layer
``R``   rank
``M``   maps: ``H`` for most mechanisms, ``D`` for Hydra
======  =====================================================================

Tensors between projection and mixing are token-major, ``[B, N, H, K]``: that is how
a fused projection leaves them in memory, so that no copy is needed to read them.
"""

from __future__ import annotations

from dataclasses import dataclass

from manyheads.errors import ImageSizeError

__all__ = ["Geometry", "Grid", "fit_to_patches"]

Grid = tuple[int, int]
"""Rows and columns of patch tokens; prefix tokens are not part of it."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a mechanism may know of the layer it serves.

    Attributes:
        dim: Width of the tokens that enter the layer.
        num_heads: Heads ``H`` of the layer as the host built it.
        head_dim: Width ``K`` of one head; ``num_heads * head_dim`` need not be `dim`.
        num_prefix_tokens: Tokens ``P`` before the patch grid.
        grid: Rows and columns of patch tokens at the model's native image size, or
            None where the host cannot say.
        scale: Factor on query-key products, ``1 / sqrt(K)`` unless the host differs.
        attention_dropout: Probability with which the host drops map entries in
            training.
        reduced_keys: Keys and values ``S`` at the native image size where the layer
            reduces them to fewer than its queries; None where every token has one.
    """

    dim: int
    num_heads: int
    head_dim: int
    num_prefix_tokens: int
    grid: Grid | None
    scale: float
    attention_dropout: float = 0.0
    reduced_keys: int | None = None

    @property
    def attention_dim(self) -> int:
        """Width ``D`` of the mixed tokens, all heads side by side."""
        return self.num_heads * self.head_dim


def fit_to_patches(image_size: tuple[int, int], patch: tuple[int, int]) -> Grid:
    """Give the smallest image size of whole patches that holds the image.

    Args:
        image_size: Height and width in pixels.
        patch: Height and width of one patch, or of the coarsest cell of a hierarchical
            model.

    Returns:
        Height and width in pixels, each a multiple of the patch; equal to the input
        where that already fits. The difference is to be padded with zeros at the
        bottom and on the right.

    Raises:
        ImageSizeError: The image is smaller than one patch.
    """
    if any(side < cell for side, cell in zip(image_size, patch, strict=True)):
        raise ImageSizeError(
            asked=f"image_size={image_size[0]}x{image_size[1]}",
            found=f"one patch of this model is {patch[0]}x{patch[1]} pixels",
            why="an image needs at least one whole patch",
            fix=f"Use {patch[0]}x{patch[1]} or more; multiples of it need no padding.",
        )
    height, width = (
        -(-side // cell) * cell for side, cell in zip(image_size, patch, strict=True)
    )
    return height, width
