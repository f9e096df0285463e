"""What users hang on layers, hooks for one: no swap drops it without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyheads as mh
from manyheads.errors import SwapRefused
from manyheads.hosts import find_host
from tests.helpers import tiny_vit
from tests.hosts import laws
from tests.hosts.families import FAMILIES

REPLACED = ["timm/vit", "timm/dinov3", "timm/pvt", "timm/nextvit", "torchvision/vit"]
IDENTITY = laws.everywhere(mh.Softmax())
HALF = laws.everywhere(mh.Hallucinated())


def triple(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output * 3


def watch(_: nn.Module, __: Any) -> None: ...


def replace_forward(layer: Any) -> None:
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs)


HUNG: dict[str, tuple[Callable[[Any], object], str]] = {
    "hook": (lambda m: m.register_forward_hook(triple), r"a forward hook \(triple\)"),
    "pre-hook": (
        lambda m: m.register_forward_pre_hook(watch),
        r"a forward pre-hook \(watch\)",
    ),
    "backward": (
        lambda m: m.register_full_backward_hook(triple),
        r"a backward hook \(triple\)",
    ),
    "forward": (replace_forward, "a forward of its own, set on the instance"),
}


def built(name: str) -> tuple[nn.Module, str]:
    """A model with the path of the first attention layer that is converted."""
    model = laws.randomise(FAMILIES[name].build(None))
    _, sites = find_host(model)
    return model, next(s.attention_path for s in sites if not s.fixed)


@pytest.mark.parametrize("name", REPLACED)
def test_a_hook_on_attention_is_refused_by_name(name: str) -> None:
    model, path = built(name)
    handle = model.get_submodule(path).register_forward_hook(triple)
    says = rf"a forward hook \(triple\) \(at {path}\).*handle\.remove\(\)"
    with pytest.raises(SwapRefused, match=says):
        mh.convert(model, IDENTITY)
    handle.remove()
    mh.convert(model, IDENTITY)


@pytest.mark.parametrize(("hang", "says"), HUNG.values(), ids=HUNG)
@pytest.mark.parametrize("verb", [mh.preview, mh.convert])
def test_every_kind_is_refused(
    verb: Any, hang: Callable[[Any], object], says: str
) -> None:
    model = tiny_vit()
    hang(model.blocks[1].attn)
    with pytest.raises(SwapRefused, match=rf"{says} \(at blocks\.1\.attn\)"):
        verb(model, IDENTITY)
    mh.convert(model, mh.Recipe(mh.Swap(blocks=[0, 2], attention=mh.Hydra())))


@pytest.mark.parametrize(("hang", "says"), HUNG.values(), ids=HUNG)
@pytest.mark.parametrize("name", ["timm/vit", "torchvision/vit", "transformers/vit"])
def test_the_output_matrix_is_watched_too(
    name: str, hang: Callable[[Any], object], says: str
) -> None:
    model, _ = built(name)
    path = str(find_host(model)[1][0].ffn_path)
    hang(model.get_submodule(path))
    with pytest.raises(SwapRefused, match=rf"{says} \(at {path}\)"):
        mh.convert(model, laws.COMPACT)
    mh.convert(model, IDENTITY)


def test_all_of_them_are_named_together() -> None:
    model = tiny_vit()
    for block in model.blocks:
        block.attn.register_forward_hook(triple)
    with pytest.raises(SwapRefused, match=r"blocks\.0\.attn.*blocks\.2\.attn"):
        mh.convert(model, IDENTITY)


def test_a_hook_on_a_part_that_stays_goes_on() -> None:
    model, image = tiny_vit(), torch.randn(2, 3, 32, 32)
    model.blocks[0].attn.qkv.register_forward_hook(triple)
    student = mh.convert(model, IDENTITY)
    torch.testing.assert_close(student(image), model(image))
    with pytest.raises(SwapRefused, match=r"at blocks\.0\.attn\.qkv"):
        mh.convert(model, HALF)


def test_a_hook_on_a_part_that_goes_is_refused() -> None:
    model = tiny_vit()
    model.blocks[0].attn.attn_drop.register_forward_hook(triple)
    with pytest.raises(SwapRefused, match=r"at blocks\.0\.attn\.attn_drop"):
        mh.convert(model, IDENTITY)


def test_layers_of_transformers_stay_and_keep_their_hooks() -> None:
    model, path = built("transformers/vit")
    seen: list[nn.Module] = []
    layer: Any = model.get_submodule(path)
    layer.register_forward_hook(lambda module, *_: seen.append(module))
    student = mh.convert(model, laws.everywhere(mh.Hydra()))
    laws.answer(student, laws.pictures(student))
    assert seen == [student.get_submodule(path)]


def test_layers_named_by_path_are_no_exception() -> None:
    model = nn.Sequential(nn.MultiheadAttention(24, 4, batch_first=True))
    model[0].register_forward_pre_hook(watch)
    with pytest.raises(SwapRefused, match=r"pre-hook \(watch\) \(at 0\)"):
        mh.convert(model, IDENTITY, paths=["0"])
