"""What a model of every timm family can do, it can do converted.

Each seam is a function that uses a model as timm's users do and gives tensors. It is
run on three models of each family: timm's own, its identity swap, which must give the
same, and one whose blocks hold the mechanisms in turn, which must give other numbers of
the same shapes. Where timm's own model lacks a seam, `WITHOUT` says in what words.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
from timm.models._manipulate import group_with_matcher
from timm.optim import param_groups_layer_decay
from tools import census
from torch import Tensor, nn

import manyheads as mh
from manyheads.hosts import find_host
from tests.helpers import assert_close
from tests.hosts import laws
from tests.hosts.families import FAMILIES, Size, at

TIMM = [name for name in FAMILIES if name.startswith("timm/")]
MIXERS = [spec for spec in laws.SPECS if spec != mh.Softmax()]


def features_and_head(model: Any, family: str) -> list[Tensor]:
    image = picture(FAMILIES[family].native)
    features = model.forward_features(image)
    logits = model.forward_head(features)
    assert_close(logits, model(image))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape[-1] == model.head_hidden_size
    return [logits, pooled]


def intermediates(model: Any, family: str) -> list[Tensor]:
    image = picture(FAMILIES[family].native)
    final, maps = model.forward_intermediates(image)
    whole = model.forward_features(image)
    for one, other in zip(listed(final), listed(whole), strict=True):
        assert_close(one, other)
    return [*listed(final), *maps]


def first_layer_alone(model: Any, family: str) -> list[Tensor]:
    kept = model.prune_intermediate_layers([-1], prune_norm=True, prune_head=True)
    assert len(kept) == 1
    image = picture(FAMILIES[family].native)
    return model.forward_intermediates(
        image, indices=kept, norm=False, intermediates_only=True
    )


def input_size(model: Any, family: str) -> list[Tensor]:
    other = FAMILIES[family].other
    model.set_input_size(img_size=other)
    return [model(picture(other))]


def checkpointing(model: Any, family: str) -> list[Tensor]:
    model.train()
    image = picture(FAMILIES[family].native, count=2)
    learnt = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        torch.manual_seed(0)
        total = sum(out.square().mean() for out in listed(model(image)))
        total.backward()
        learnt.append({n: p.grad for n, p in model.named_parameters()})
    plain, recomputed = learnt
    for path, gradient in plain.items():
        assert gradient is not None, f"no gradient for {path}"
        assert gradient.isfinite().all(), path
        assert_close(recomputed[path], gradient, slack=10)
    return [total.detach()]


def classifier(model: Any, family: str) -> list[Tensor]:
    image, given = picture(FAMILIES[family].native), []
    for count in (3, 0):
        torch.manual_seed(0)
        model.reset_classifier(count)
        given.append(model(image))
    assert given[0].shape == (1, 3)
    assert given[1].shape[-1] == model.num_features
    return given


def layer_decay(model: Any, family: str) -> list[Tensor]:
    matcher = model.group_matcher(coarse=False)
    depth = group_with_matcher(model.named_parameters(), matcher, reverse=True)
    groups = param_groups_layer_decay(model, layer_decay=0.75)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    own = at(family, FAMILIES[family].native)
    expected = group_with_matcher(own.named_parameters(), matcher, reverse=True)
    for site in find_host(model)[1]:
        depths = [
            {deep for name, deep in found.items() if name.startswith(f"{site.path}.")}
            for found in (depth, expected)
        ]
        assert depths[0] == depths[1], site.path
    return [picture(FAMILIES[family].native)]


Seam = Callable[[Any, str], list[Tensor]]
SEAMS: dict[str, Seam] = {
    "forward_features": features_and_head,
    "forward_intermediates": intermediates,
    "prune_intermediate_layers": first_layer_alone,
    "set_input_size": input_size,
    "set_grad_checkpointing": checkpointing,
    "reset_classifier": classifier,
    "group_matcher": layer_decay,
}
WITHOUT: dict[str, tuple[str, set[str]]] = {
    "set_input_size": (
        "has no attribute 'set_input_size'",
        {
            "timm/naflexvit",
            "timm/mobilevit",
            "timm/csatv2",
            "timm/pit",
            "timm/crossvit",
            "timm/pvt",
            "timm/pvt-linear",
            "timm/nextvit",
            "timm/qwen3",
            "timm/deepseek",
        },
    ),
    "set_grad_checkpointing": (
        "gradient checkpointing not supported",
        {"timm/pit", "timm/crossvit"},
    ),
    "group_matcher": (
        "has no attribute 'group_matcher'",
        {"timm/csatv2", "timm/pit"},
    ),
}


def picture(size: Size, count: int = 1) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@cache
def swapped(family: str, kind: str) -> nn.Module:
    """Convert a family once; nothing may change what this returns."""
    model = at(family, FAMILIES[family].native)
    if kind == "identity":
        return mh.convert(model, laws.everywhere(mh.Softmax())).eval()
    carried = [spec for spec in MIXERS if not laws.refused(model, spec)]
    turn = TIMM.index(family)  # so that short models, too, meet every mechanism
    swaps = []
    for site in find_host(model)[1]:
        spec = carried[(turn + site.index) % len(carried)]
        if not site.fixed and not spec.exempt(site.geometry):
            swaps.append(mh.Swap(blocks=[site.index], attention=spec))
        if site.ffn_path is not None:
            swaps.append(mh.Swap(blocks=[site.index], ffn=mh.Compact(rank=4)))
    return mh.convert(model, mh.Recipe(*swaps)).eval()


def used(seam: str, model: nn.Module, family: str) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.set_grad_enabled(seam == "set_grad_checkpointing"):
        return SEAMS[seam](copy.deepcopy(model), family)


@pytest.mark.parametrize("seam", SEAMS)
@pytest.mark.parametrize("family", TIMM)
def test_a_converted_model_keeps_the_seam(family: str, seam: str) -> None:
    model = at(family, FAMILIES[family].native)
    words, lacking = WITHOUT.get(seam, ("", set[str]()))
    if family in lacking:
        with pytest.raises((AttributeError, AssertionError), match=words):
            used(seam, model, family)
        return
    expected = used(seam, model, family)
    same = used(seam, swapped(family, "identity"), family)
    other = used(seam, swapped(family, "mixed"), family)
    for ours, theirs in zip(same, expected, strict=True):
        assert_close(ours, theirs, slack=10)
    assert [t.shape for t in other] == [t.shape for t in expected]
    assert all(t.isfinite().all() for t in other)
    if seam != "group_matcher":
        assert not all(map(torch.equal, other, expected)), "nothing was converted"


def test_every_family_that_the_census_says_yes_to_is_here() -> None:
    models = [at(name, FAMILIES[name].native) for name in TIMM]
    names = [model.pretrained_cfg["architecture"] for model in models]
    here = {timm.model_entrypoint(n).__module__.rpartition(".")[2] for n in names}
    rows = [row.split("|") for row in census.table_on(census.PAGE.read_text("utf-8"))]
    assert {row[1].strip() for row in rows if " yes " in row[4:-2]} == here
