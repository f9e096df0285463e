"""PVT-v2: what carries over, what is left alone, what is refused by name."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import manyheads as mh
from manyheads.errors import ImageSizeError, SwapRefused
from manyheads.geometry import Geometry
from manyheads.hosts import find_host, mechanism_of
from manyheads.ledger import keep_books
from tests.helpers import assert_close

SMALL = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_classes": 10}
HEADS = {"num_heads": (1, 2, 3, 4)}


def _pvt(name: str = "pvt_v2_b0", **changes: object) -> nn.Module:
    model = timm.create_model(name, **(SMALL | HEADS | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_identity_swap_leaves_logits_unchanged(name: str) -> None:
    model = _pvt(name)
    swapped = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Softmax())))
    images = _images()
    assert_close(swapped(images), model(images))
    assert find_host(swapped)[0].name == "timm-pvt"


def test_the_real_b0_keeps_its_logits_too() -> None:
    model = timm.create_model("pvt_v2_b0").eval()
    swapped = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Softmax())))
    images = _images()
    assert_close(swapped(images), model(images))


def test_blocks_come_in_order_with_their_sizes() -> None:
    _, sites = find_host(timm.create_model("pvt_v2_b2", device="meta"))
    assert len(sites) == 16
    assert [site.geometry.num_heads for site in sites[::4]] == [1, 2, 5, 5]
    assert sites[0].geometry.grid == (56, 56)
    assert sites[0].geometry.reduced_keys == 49
    assert sites[-1].geometry.reduced_keys is None
    assert sites[0].ffn_path == "stages.0.blocks.0.mlp.fc2"


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
@pytest.mark.parametrize(
    "spec",
    [
        mh.Hydra(),
        mh.Hydra(kernel="mean", reference_tokens=None),
        mh.Hydra(kernel="aft"),
        mh.Hallucinated(),
        mh.Hallucinated(stage="logits", rank=2),
    ],
    ids=repr,
)
def test_mechanisms_convert_where_they_are_defined(
    spec: mh.Hydra | mh.Hallucinated, name: str
) -> None:
    model = _pvt(name)
    student = mh.convert(model, mh.Recipe(mh.Swap(attention=spec)))
    images = _images().requires_grad_()
    student(images).sum().backward()
    assert images.grad.isfinite().all()
    wide = student(torch.randn(1, 3, 96, 64))
    assert wide.isfinite().all()


def test_stages_of_one_head_are_left_alone_and_reported() -> None:
    recipe = mh.Recipe(mh.Swap(attention=mh.Hallucinated()))
    model = _pvt()
    rows = mh.preview(model, recipe).rows
    assert "single head" in rows[0].left_alone
    assert [row.left_alone for row in rows[1:]] == ["", "", ""]
    student = mh.convert(model, recipe)
    assert type(student.stages[0].blocks[0].attn).__name__ == "Attention"
    assert student.stages[2].blocks[0].attn.q.out_features == 16


def test_a_hallucinated_layer_starts_from_its_partners() -> None:
    model = _pvt()
    images = _images()
    attention = model.stages[3].blocks[0].attn
    with torch.no_grad():
        for tensor in (attention.q.weight, attention.kv.weight[:32]):
            tensor[16:] = tensor[:16].clone()
        for tensor in (attention.q.bias, attention.kv.bias[:32]):
            tensor[16:] = tensor[:16].clone()
    recipe = mh.Recipe(mh.Swap(blocks=[3], attention=mh.Hallucinated()))
    assert_close(mh.convert(model, recipe)(images), model(images))


def test_another_order_of_heads_changes_no_logit() -> None:
    model = _pvt()
    host, sites = find_host(model)
    images = _images()
    before = model(images)
    host.permute_heads(model, sites[2], (2, 0, 1))
    host.permute_heads(model, sites[3], (3, 0, 2, 1))
    assert_close(model(images), before)


def test_calibration_images_choose_heads_and_starts() -> None:
    recipe = mh.Recipe(mh.Swap(attention=mh.Hallucinated(), ffn=mh.Compact()))
    report = mh.preview(_pvt(), recipe, images=_images())
    assert [choice.block for choice in report.heads] == [1, 2, 3]
    assert mh.convert(_pvt(), recipe, images=_images())(_images()).isfinite().all()


def test_full_rank_compaction_changes_no_logit() -> None:
    model = _pvt()
    images = _images()
    swaps = [
        mh.Swap(blocks=[i], ffn=mh.Compact(rank=width))
        for i, width in enumerate(SMALL["embed_dims"])
    ]
    assert_close(mh.convert(model, mh.Recipe(*swaps))(images), model(images), slack=5)


def test_a_saved_model_comes_back(tmp_path: object) -> None:
    recipe = mh.Recipe(mh.Swap(attention=mh.Hallucinated(), ffn=mh.Compact()))
    student = mh.convert(_pvt(), recipe)
    again = mh.load(mh.save(student, f"{tmp_path}/student"))
    images = _images()
    assert torch.equal(again(images), student(images))


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
@pytest.mark.parametrize(
    "spec", [mh.Softmax(), mh.Hydra(), mh.Hallucinated()], ids=repr
)
@pytest.mark.parametrize("size", [(64, 64), (96, 72)], ids=str)
def test_the_books_balance_at_any_size(
    spec: mh.Softmax | mh.Hydra | mh.Hallucinated, name: str, size: tuple[int, int]
) -> None:
    model = mh.convert(_pvt(name), mh.Recipe(mh.Swap(attention=spec)))
    host, sites = find_host(model)
    books = keep_books(model, host, sites, size)
    model.to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *size, device="meta"))
    counts = counter.get_flop_counts()
    inside = sum(
        work
        for site in sites
        for work in counts[f"PyramidVisionTransformerV2.{site.path}"].values()
    )
    assert sum(block.matmul for block in books.blocks) == inside // 2


def test_layouts_that_need_one_grid_are_refused_where_keys_are_reduced() -> None:
    grid = mh.Hallucinated(layout="grid")
    with pytest.raises(SwapRefused, match=r"coarser grid.*stages\.1\.blocks\.0\.attn"):
        mh.convert(_pvt(), mh.Recipe(mh.Swap(blocks=[1], attention=grid)))
    last = mh.convert(_pvt(), mh.Recipe(mh.Swap(blocks=[3], attention=grid)))
    assert last(_images()).isfinite().all()


@pytest.mark.parametrize("mix", ["after", "both", "none"])
def test_interactive_attention_converts_where_every_token_is_a_key(
    mix: str, tmp_path: object
) -> None:
    spec = mh.Interactive(landmarks=(2, 2), mix=mix)
    student = mh.convert(_pvt(), mh.Recipe(mh.Swap(blocks=[3], attention=spec)))
    core = mechanism_of(student.stages[3].blocks[0].attn)
    assert core is not None
    assert core.spec == spec
    images = torch.randn(2, 3, 96, 64, requires_grad=True)
    fast = student(images)
    fast.sum().backward()
    assert images.grad.isfinite().all()
    again = mh.load(mh.save(student, f"{tmp_path}/student"))
    assert_close(again(images), fast)
    # Its slow twin in its place, on the rows and columns of the stage.
    core.forward = core.reference
    assert_close(student(images), fast)


def test_interactive_attention_is_refused_where_keys_are_reduced() -> None:
    spec = mh.Interactive(landmarks=(2, 2))
    with pytest.raises(SwapRefused, match=r"reduced.*stages\.1\.blocks\.0\.attn"):
        mh.convert(_pvt(), mh.Recipe(mh.Swap(blocks=[1], attention=spec)))
    # The linear variant pools the keys of its last stage, too.
    with pytest.raises(SwapRefused, match=r"reduced.*stages\.3\.blocks\.0\.attn"):
        mh.convert(_pvt("pvt_v2_b2_li"), mh.Recipe(mh.Swap(blocks=[3], attention=spec)))


def test_mechanisms_of_one_token_set_are_refused_where_keys_are_reduced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mh.Hydra, "takes_reduced_keys", False)
    with pytest.raises(SwapRefused, match="keys are reduced to 49 tokens"):
        mh.convert(_pvt(), mh.Recipe(mh.Swap(attention=mh.Hydra())))


def test_images_smaller_than_one_cell_are_refused() -> None:
    with pytest.raises(ImageSizeError, match="32x32"):
        mh.cost(_pvt(), image_size=(16, 64))


@pytest.mark.parametrize("kernel", ["cosine", "mean", "aft"])
def test_hydra_sums_over_the_keys_there_are_with_every_gradient(kernel: str) -> None:
    geometry = Geometry(
        dim=16,
        num_heads=2,
        head_dim=8,
        num_prefix_tokens=0,
        grid=(4, 5),
        scale=1.0,
        reduced_keys=6,
    )
    core = mh.Hydra(kernel=kernel).build(geometry)
    q, k, v = (
        torch.randn(2, n, 2, 8, dtype=torch.float64, requires_grad=True)
        for n in (20, 6, 6)
    )
    fast, slow = core(q, k, v), core.reference(q, k, v)
    assert_close(fast, slow)
    upstream = torch.randn_like(fast)
    for ours, theirs in zip(
        torch.autograd.grad(fast, (q, k, v), upstream),
        torch.autograd.grad(slow, (q, k, v), upstream),
        strict=True,
    ):
        assert_close(ours, theirs, slack=4)
