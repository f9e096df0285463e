"""What many tests share: tolerances, tiny models, and the comparison of twins."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

# Relative to the largest entry of the expected tensor. One table, and no environment
# variable changes it. Half types: rounding of inputs and outputs, not of sums.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def assert_close(actual: Tensor, expected: Tensor, *, slack: float = 1.0) -> None:
    """Compare within the type's tolerance, relative to the largest expected entry.

    Below a hundredth the comparison is absolute: a gradient that is zero in exact
    arithmetic has only rounding noise to be relative to.
    """
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert actual.isfinite().all(), "not finite"
    wide = expected.double()
    scale = wide.abs().max().clamp_min(1e-2) if wide.numel() else torch.tensor(1.0)
    error = ((actual.double() - wide).abs().max() / scale).item()
    limit = slack * TOLERANCE[expected.dtype]
    assert error <= limit, f"relative error {error:.2e} over {limit:.2e}"


def tiny_vit(**changes: object) -> nn.Module:
    """A real timm VisionTransformer, three blocks of width 48, 32-pixel images."""
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 4,
        "num_classes": 10,
    }
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, **(arguments | changes)
    )
    return model.eval()
