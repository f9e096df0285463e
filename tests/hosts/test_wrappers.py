"""A model inside something else is refused, and told how to get at the model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import timm
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.feature_extraction import create_feature_extractor

import manyheads as mh
from manyheads.attention import AttentionSpec
from manyheads.errors import CostError, SwapRefused, UnknownHost
from tests.hosts import laws
from tests.hosts.families import FAMILIES, at

INSIDE = "Convert the model inside, model.module"
MEAN = "Convert model.module instead."
BEFORE = "Convert the model that it was made of"
WRAPPED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "compiled": (torch.compile, "Convert the model inside, model._orig_mod"),
    "spread": (nn.DataParallel, INSIDE),
    "averaged": (AveragedModel, MEAN),
    "timm-averaged-2": (ModelEmaV2, MEAN),
    "timm-averaged-3": (ModelEmaV3, MEAN),
    "fx": (lambda m: create_feature_extractor(m, ["norm"]), BEFORE),
    "timm-fx": (
        lambda _: timm.create_model(
            "vit_tiny_patch16_224",
            img_size=64,
            depth=3,
            features_only=True,
            feature_cls="fx",
        ),
        BEFORE,
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("verb", [mh.convert, mh.preview])
@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapper_is_named_with_the_way_to_the_model(
    kind: str, verb: Callable[..., object]
) -> None:
    wrap, fix = WRAPPED[kind]
    wrapped = wrap(copy.deepcopy(at("timm/vit", FAMILIES["timm/vit"].native)))
    with pytest.raises(UnknownHost, match=re.escape(fix)):
        verb(wrapped, laws.everywhere(mh.Hydra()))


def test_a_model_that_compiles_itself_is_no_wrapper() -> None:
    model = copy.deepcopy(at("timm/vit", FAMILIES["timm/vit"].native))
    model.compile(backend="eager")
    student = mh.convert(model, laws.everywhere(mh.Hydra()))
    assert student._compiled_call_impl is None
    assert model._compiled_call_impl is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", laws.SPECS, ids=repr)
@pytest.mark.parametrize("family", ["timm/vit", "timm/pvt", "transformers/vit"])
def test_quantised_projections_are_refused(family: str, spec: AttentionSpec) -> None:
    model = copy.deepcopy(at(family, FAMILIES[family].native))
    if laws.refused(model, spec):
        return
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(SwapRefused, match=r"torch\.ao\..*quantise what comes out"):
        mh.convert(quantised, laws.everywhere(spec))


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_elsewhere_are_carried_but_not_counted() -> None:
    family = "torchvision/vit"
    model = copy.deepcopy(at(family, FAMILIES[family].native))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(CostError, match=r"convert\(\) counts nothing"):
        mh.preview(quantised, laws.everywhere(mh.Hydra()))
    laws.identity_law(quantised)
