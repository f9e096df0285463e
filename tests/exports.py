"""A small converted model, and where its exported forms go."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import manyheads as mh
from manyheads.attention import AttentionSpec
from tests.helpers import tiny_vit

TARGETS = [
    pytest.param("pt2", id="pt2"),
    pytest.param("onnx", id="onnx"),
    pytest.param("aoti", id="aoti", marks=pytest.mark.slow),
]
each_target = pytest.mark.parametrize("target", TARGETS)


def small_model(spec: AttentionSpec | None = None, **changes: object) -> nn.Module:
    swap = mh.Swap(blocks=[1], attention=spec or mh.Hydra(), ffn=mh.Compact())
    return mh.convert(
        tiny_vit(**{"depth": 2, "embed_dim": 32} | changes), mh.Recipe(swap)
    )


def file_for(folder: Path, target: str) -> Path:
    return folder / f"{target}.{'onnx' if target == 'onnx' else 'pt2'}"
