"""Pictures become what transformers' own image processors make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra: manyheads[hf]")

import transformers

from manyheads.data.photographs import open_photograph, prepare, sample_photographs
from manyheads.hosts import host_of

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessor", {}),
    "deit": ("DeiTImageProcessor", {}),
    "siglip": ("SiglipImageProcessor", {}),
    "clip": ("CLIPImageProcessor", {}),
    "dinov2": (
        "BitImageProcessor",
        {
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
        },
    ),
}


@pytest.mark.parametrize("family", PROCESSORS)
def test_a_photograph_becomes_what_the_processor_makes_of_it(family: str) -> None:
    name, options = PROCESSORS[family]
    processor = getattr(transformers, name)(**options)
    model = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    model.manyheads_processor = processor.to_dict()
    wanted = host_of(model).image_input(model)
    for path in sample_photographs():
        image = open_photograph(path)
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        std = torch.tensor(wanted.std)[:, None, None]
        found = 255 * std * prepare(image, wanted)
        levels = _closest(found, 255 * std * expected)
        assert levels.mean() < 0.5, f"{levels.mean():.2f} grey levels"
        assert levels.max() < 4


def _closest(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Compare as they lie, and a pixel apart: transformers rounds halves down."""
    plain = (found - expected).abs()
    across = (found[:, :, :-1] - expected[:, :, 1:]).abs()
    down = (found[:, :-1] - expected[:, 1:]).abs()
    return min((plain, across, down), key=lambda levels: float(levels.mean()))
