"""Next-ViT: pooled keys, convolutional blocks that only their MLP can change."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import manyheads as mh
from manyheads.errors import NothingToConvert, SwapRefused
from manyheads.ffn import CompactLinear
from manyheads.hosts import find_host, mechanism_of
from manyheads.ledger import keep_books
from tests.helpers import assert_close

BOTH = mh.Recipe(mh.Swap(attention=mh.Hallucinated(), ffn=mh.Compact()))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """Next-ViT of the smallest depths that timm's class allows, stirred statistics."""
    torch.manual_seed(0)
    model = timm.create_model("nextvit_small", depths=(1, 1, 5, 1), num_classes=10)
    model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


def _images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *(size or (64, 64)))


def test_identity_swap_leaves_logits_unchanged(small: nn.Module) -> None:
    swapped = mh.convert(small, mh.Recipe(mh.Swap(attention=mh.Softmax())))
    images = _images()
    assert_close(swapped(images), small(images))
    assert find_host(swapped)[0].name == "timm-nextvit"


def test_blocks_come_in_order_with_their_sizes() -> None:
    _, sites = find_host(timm.create_model("nextvit_small", device="meta"))
    attending = [site for site in sites if not site.fixed]
    assert len(sites) == 20
    assert [site.geometry.num_heads for site in attending] == [6, 12, 12, 24]
    assert [site.geometry.reduced_keys for site in attending] == [49, 49, 49, None]
    assert all(site.ffn_path for site in sites)


def test_convolutional_blocks_keep_their_mixing_and_say_so(small: nn.Module) -> None:
    rows = mh.preview(small, BOTH).rows
    assert "convolution" in rows[0].left_alone
    assert "Compact" in rows[0].becomes
    assert "convolution" in rows[0].was
    assert rows[-1].left_alone == ""
    student = mh.convert(small, BOTH)
    output = student.stages[0].blocks[0].mlp.fc2
    assert isinstance(output, CompactLinear)
    assert isinstance(output.inner, nn.Conv2d)
    with pytest.raises(NothingToConvert, match="convolution"):
        mh.convert(small, mh.Recipe(mh.Swap(blocks=[0], attention=mh.Hydra())))


@pytest.mark.parametrize(
    "spec",
    [mh.Hydra(), mh.Hallucinated(), mh.Hallucinated(stage="logits", cross_map=True)],
    ids=repr,
)
def test_mechanisms_convert_where_they_are_defined(
    small: nn.Module, spec: mh.Hydra | mh.Hallucinated
) -> None:
    student = mh.convert(small, mh.Recipe(mh.Swap(attention=spec)))
    for size in ((64, 64), (96, 64)):
        assert student(_images(*size)).isfinite().all()


def test_a_grid_is_known_where_every_token_is_a_key(small: nn.Module) -> None:
    recipe = mh.Recipe(mh.Swap(blocks=[-1], attention=mh.Hallucinated(layout="grid")))
    student = mh.convert(small, recipe)
    images = _images(96, 64)
    plain = mh.Recipe(mh.Swap(blocks=[-1], attention=mh.Hallucinated()))
    # Fresh kernels are deltas: the layout makes no difference yet.
    assert_close(student(images), mh.convert(small, plain)(images))


@pytest.mark.parametrize("mix", ["after", "both"])
def test_interactive_attention_converts_where_every_token_is_a_key(
    small: nn.Module, mix: str
) -> None:
    spec = mh.Interactive(landmarks=(2, 2), mix=mix)
    student = mh.convert(small, mh.Recipe(mh.Swap(blocks=[-1], attention=spec)))
    _, sites = find_host(student)
    core = mechanism_of(student.get_submodule(sites[-1].attention_path))
    assert core is not None
    assert core.spec == spec
    images = torch.randn(2, 3, 96, 64, requires_grad=True)
    fast = student(images)
    fast.sum().backward()
    assert images.grad.isfinite().all()
    core.forward = core.reference
    assert_close(student(images), fast)
    pooled = [i for i, site in enumerate(sites) if site.geometry.reduced_keys]
    with pytest.raises(SwapRefused, match=r"reduced.*e_mhsa"):
        mh.convert(small, mh.Recipe(mh.Swap(blocks=pooled[:1], attention=spec)))


def test_another_order_of_heads_changes_no_logit(small: nn.Module) -> None:
    model = mh.convert(small, mh.Recipe(mh.Swap(attention=mh.Softmax())))
    host, sites = find_host(model)
    for site in sites:
        if not site.fixed:
            order = torch.randperm(site.geometry.num_heads).tolist()
            host.permute_heads(model, site, order)
    images = _images()
    assert_close(model(images), small(images))


def test_calibration_images_choose_heads_and_starts(small: nn.Module) -> None:
    report = mh.preview(small, BOTH, images=_images())
    assert [choice.path.rpartition(".")[2] for choice in report.heads] == ["e_mhsa"] * 3
    assert mh.convert(small, BOTH, images=_images())(_images()).isfinite().all()


def test_timm_folds_a_converted_model(small: nn.Module) -> None:
    student = mh.convert(small, BOTH)
    images = _images()
    assert_close(reparameterize_model(student)(images), student(images), slack=20)


def test_a_saved_model_comes_back(small: nn.Module, tmp_path: object) -> None:
    student = mh.convert(small, BOTH)
    again = mh.load(mh.save(student, f"{tmp_path}/student"))
    images = _images()
    assert torch.equal(again(images), student(images))


@pytest.mark.parametrize(
    "spec", [mh.Softmax(), mh.Hydra(), mh.Hallucinated()], ids=repr
)
def test_the_books_balance(
    small: nn.Module, spec: mh.Softmax | mh.Hydra | mh.Hallucinated
) -> None:
    swaps = (mh.Swap(attention=spec), mh.Swap(ffn=mh.Compact()))
    model = mh.convert(small, mh.Recipe(*swaps))
    host, sites = find_host(model)
    books = keep_books(model, host, sites, (64, 96))
    model.to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 64, 96, device="meta"))
    counts = counter.get_flop_counts()
    for site, block in zip(sites, books.blocks, strict=True):
        paths = (site.attention_path, f"{site.path}.mlp")
        counted = sum(
            work for path in paths for work in counts[f"NextViT.{path}"].values()
        )
        assert block.matmul == counted // 2
