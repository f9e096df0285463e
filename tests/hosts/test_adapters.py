"""Layers that hold more than a matrix, low-rank adapters for one: kept or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import manyheads as mh
from manyheads.errors import ManyheadsError, SwapRefused
from manyheads.hosts import find_host
from tests.helpers import assert_close
from tests.hosts import laws
from tests.hosts.families import FAMILIES

PLACES = {
    "timm/vit": "attn.qkv",
    "timm/eva02-split": "attn.q_proj",
    "timm/pvt": "attn.q",
    "timm/nextvit": "e_mhsa.q",
    "transformers/vit": "q_proj",
    "transformers/dinov3": "q_proj",
    "transformers/clip-vision": "q_proj",
}


class Adapter(nn.Module):
    """Around a layer, as peft does it: the layer's weight is still to be read."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = nn.Parameter(torch.randn(base.in_features, 2) * 0.2)
        self.up = nn.Parameter(torch.randn(2, base.out_features) * 0.2)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down @ self.up


class OfOneClass(nn.Linear):
    """An adapter that is itself a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.load_state_dict(base.state_dict())
        self.up = nn.Parameter(torch.randn(base.out_features, base.in_features) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.up.T


def adapted(name: str, kind: type[Any]) -> nn.Module:
    model = laws.randomise(FAMILIES[name].build(None))
    ends = (PLACES[name], "query") if name.startswith("transformers") else PLACES[name]
    found = [p for p, m in model.named_modules() if isinstance(m, nn.Linear)]
    for path in [path for path in found if path.endswith(ends)]:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, kind(model.get_submodule(path)))
    assert any(isinstance(m, kind) for m in model.modules())
    return model.eval()


@pytest.mark.parametrize("kind", [Adapter, OfOneClass])
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.usefixtures("untyped")
def test_adapted_queries_stay_or_are_refused_by_name(
    name: str, kind: type[Any]
) -> None:
    """Hallucinated attention would keep rows of the matrix and drop the adapter."""
    model = adapted(name, kind)
    laws.identity_law(model, FAMILIES[name].native)
    with pytest.raises(SwapRefused, match=rf"a {kind.__name__}, no plain nn.Linear"):
        mh.convert(model, laws.everywhere(mh.Hallucinated()))


def test_a_parametrised_projection_is_treated_alike() -> None:
    model = laws.randomise(FAMILIES["timm/vit"].build(None))
    weight_norm(model.blocks[0].attn.qkv)
    laws.identity_law(model, FAMILIES["timm/vit"].native)
    with pytest.raises(SwapRefused, match="ParametrizedLinear"):
        mh.convert(model, laws.everywhere(mh.Hallucinated()))


@pytest.mark.parametrize("kind", [Adapter, OfOneClass])
@pytest.mark.parametrize("name", ["timm/vit", "transformers/clip", "torchvision/vit"])
def test_compact_never_drops_an_adapter(name: str, kind: type[Any]) -> None:
    model = laws.randomise(FAMILIES[name].build(None))
    _, sites = find_host(model)
    for site in sites:
        parent, _, leaf = str(site.ffn_path).rpartition(".")
        home = model.get_submodule(parent)
        setattr(home, leaf, kind(home.get_submodule(leaf)))
    says = rf"a {kind.__name__}, no plain nn.Linear|no feed-forward layer"
    with pytest.raises(ManyheadsError, match=says):
        mh.convert(model, laws.COMPACT)


def test_compact_takes_the_product_of_a_parametrisation() -> None:
    model = laws.randomise(FAMILIES["timm/vit"].build(None))
    images = laws.pictures(model)
    expected = laws.answer(mh.convert(model, laws.COMPACT), images)
    weight_norm(model.blocks[0].mlp.fc2)
    assert_close(laws.answer(mh.convert(model, laws.COMPACT), images), expected)
