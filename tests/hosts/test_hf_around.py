"""Models that are more than a tower: of depth, of restored pictures, of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

import manyheads as mh
from manyheads.errors import UnknownHost
from manyheads.hosts import find_host
from tests.hosts import laws
from tests.hosts.hf_models import PICTURE, SMALL, TEXT

transformers = pytest.importorskip("transformers")

VIT = SMALL | PICTURE


def depth() -> nn.Module:
    tower = transformers.Dinov2Config(
        **VIT, out_features=["stage1", "stage2"], reshape_hidden_states=False
    )
    model: Any = transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(
            backbone_config=tower,
            patch_size=8,
            reassemble_hidden_size=32,
            reassemble_factors=[1, 0.5],
            neck_hidden_sizes=[8, 8],
            fusion_hidden_size=8,
        )
    )
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.uniform_(0.0, 1.0)  # it ends with a ReLU, which is zero otherwise
    return model


def restored() -> nn.Module:
    config = transformers.ViTConfig(**VIT, encoder_stride=8)
    model: nn.Module = transformers.ViTForMaskedImageModeling(config)
    return model


def written() -> nn.Module:
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VIT),
        transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True),
    )
    model: nn.Module = transformers.VisionEncoderDecoderModel(config)
    return model


def paired() -> nn.Module:
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**VIT), transformers.BertConfig(**TEXT)
    )
    model: nn.Module = transformers.VisionTextDualEncoderModel(config)
    return model


AROUND: dict[str, Callable[[], nn.Module]] = {
    "depth": depth,
    "restored": restored,
    "written": written,
    "paired": paired,
}


@pytest.mark.parametrize("kind", AROUND)
def test_the_tower_inside_keeps_the_laws(kind: str) -> None:
    model = laws.randomise(AROUND[kind]())
    laws.identity_law(model)
    laws.cost_law(model, *laws.SPECS)
    images = laws.pictures(model)
    host, _ = find_host(model)
    assert not host.gives_scores(model, laws.answer(model, images))
    for spec in laws.SPECS:
        student = laws.mechanism_law(model, spec)
        half = student.bfloat16()
        assert laws.answer(half, images.bfloat16()).isfinite().all()


def test_a_decoder_writes_what_it_reads_off_a_converted_tower() -> None:
    model: Any = laws.randomise(written())
    images, words = laws.pictures(model), torch.tensor([[1, 2], [3, 4]])
    students = [
        mh.convert(model, laws.everywhere(spec)) for spec in (mh.Softmax(), mh.Hydra())
    ]
    with torch.no_grad():
        expected, same, other = (
            m(images, decoder_input_ids=words).logits for m in (model, *students)
        )
    torch.testing.assert_close(same, expected)
    assert not torch.allclose(other, expected)
    tower = find_host(model)[1][0].path
    assert tower.startswith("encoder.")


def test_a_wrapped_timm_model_is_refused_with_where_it_is() -> None:
    config = transformers.TimmBackboneConfig(
        backbone="vit_tiny_patch16_224", use_pretrained_backbone=False
    )
    model: Any = transformers.TimmBackbone(config)
    with pytest.raises(UnknownHost, match="convert its `_backbone`"):
        mh.convert(model, laws.everywhere(mh.Hydra()))
    inside = mh.convert(model._backbone, laws.everywhere(mh.Hydra()))
    assert type(inside).__module__ == timm.models._features.__name__
