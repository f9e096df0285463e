"""Layers of a model of one's own, named by path, under the same checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F

import manyheads as mh
from manyheads.attention import AttentionSpec
from manyheads.errors import (
    CheckpointError,
    MaskRefused,
    NothingToConvert,
    SwapRefused,
    UnknownHost,
)
from manyheads.hosts import find_host
from tests.helpers import assert_close
from tests.hosts import laws

HYDRA = laws.everywhere(mh.Hydra())
PATHS = ["blocks.0.attn", "blocks.1.attn"]


class LikeTimm(nn.Module):
    """Somebody's own attention, with timm's names and nothing of timm's."""

    def __init__(self, sharpen: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.scale = 4, 6**-0.5
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.sharpen = sharpen

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        maps = (self.sharpen * self.scale * q @ k.transpose(-1, -2)).softmax(dim=-1)
        return self.proj((maps @ v).transpose(1, 2).flatten(2))


class Banded(LikeTimm):
    """Full attention for short sequences, a band of keys for others."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1])
        band = (place[:, None] - place).abs() < 16
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=band)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class WithWeights(LikeTimm):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Masked(LikeTimm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None, "no test comes here"
        return super().forward(x)


class WithTable(LikeTimm):
    """A bias for every pair of 3 x 3 patches, which starts as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, 9, 9))


class ManyScales(LikeTimm):
    def __init__(self) -> None:
        super().__init__()
        del self.scale
        self.register_buffer("scale", torch.full((4, 1, 1), 6**-0.5))


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn, self.norm = attention, nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if hasattr(self.attn, "batch_first"):
            return x + self.attn(y, y, y)[0]
        return x + self.attn(y)


class Own(nn.Module):
    """A model that no library knows."""

    def __init__(self, *attention: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.blocks = nn.Sequential(*map(Block, attention))
        self.head = nn.Linear(24, 5)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.patches(image).flatten(2).transpose(1, 2)
        return self.head(self.blocks(tokens).mean(dim=1))


def own() -> Own:
    return Own(nn.MultiheadAttention(24, 4, batch_first=True), LikeTimm()).eval()


def test_identity_swap_leaves_the_answer() -> None:
    model, image = own(), torch.randn(2, 3, 32, 32)
    same = mh.convert(model, laws.everywhere(mh.Softmax()), paths=PATHS)
    assert_close(same(image), model(image))
    assert type(model.blocks[0].attn) is nn.MultiheadAttention


@pytest.mark.parametrize("spec", laws.SPECS, ids=repr)
def test_each_mechanism_goes_in_or_is_refused_by_name(spec: AttentionSpec) -> None:
    _, sites = find_host(own(), PATHS)
    if any(spec.problem(site.geometry) for site in sites):
        with pytest.raises(SwapRefused, match=r"blocks\.0\.attn"):
            mh.convert(own(), laws.everywhere(spec), paths=PATHS)
        return
    student = mh.convert(own(), laws.everywhere(spec), paths=PATHS)
    assert student(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_one_layer_alone_is_converted() -> None:
    student = mh.convert(own(), HYDRA, paths=["blocks.1.attn"])
    assert type(student.blocks[0].attn) is nn.MultiheadAttention
    assert "Hydra()" in repr(student.blocks[1].attn)


def test_the_preview_counts_at_a_given_size() -> None:
    shown = mh.preview(own(), HYDRA, image_size=(48, 32), paths=PATHS)
    assert [row.path for row in shown.rows] == ["blocks.0", "blocks.1"]
    tokens = 6 * 4
    saved = 2 * (2 * tokens**2 * 24) - 2 * (4 * tokens * 24)
    assert shown.flops[0] - shown.flops[1] == saved


def test_a_converted_model_is_known_afterwards() -> None:
    student = mh.convert(own(), HYDRA, paths=PATHS)
    assert [b.attention for b in mh.cost(student, image_size=(32, 32)).blocks] == [
        "Hydra()"
    ] * 2


def test_weights_come_back_through_a_state_dict(tmp_path: Path) -> None:
    student, image = mh.convert(own(), HYDRA, paths=PATHS), torch.randn(1, 3, 32, 32)
    with pytest.raises(CheckpointError, match=r"Own.*state_dict\(\)"):
        mh.save(student, tmp_path / "student")
    again = mh.convert(own(), HYDRA, paths=PATHS)
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(image), student(image))


def test_a_path_that_leads_nowhere_names_the_nearest() -> None:
    with pytest.raises(NothingToConvert, match=r"'blocks.0.atn'.*'blocks.0.attn'"):
        mh.convert(own(), HYDRA, paths=["blocks.0.atn"])
    with pytest.raises(NothingToConvert, match="no path is given"):
        mh.convert(own(), HYDRA, paths=[])


def test_one_string_is_no_list_of_paths() -> None:
    with pytest.raises(NothingToConvert, match=r"paths=\['blocks.0.attn'\]"):
        mh.convert(own(), HYDRA, paths="blocks.0.attn")


def test_a_layer_named_twice_or_the_model_itself_is_refused() -> None:
    with pytest.raises(NothingToConvert, match=r"'blocks.0.attn' is named twice"):
        mh.preview(own(), HYDRA, paths=["blocks.0.attn"] * 2)
    with pytest.raises(NothingToConvert, match="no module ''"):
        mh.convert(LikeTimm(), HYDRA, paths=[""])


@pytest.mark.parametrize("path", PATHS)
def test_a_layer_that_stands_in_two_places_is_refused(path: str) -> None:
    """It would be swapped in one of them only."""
    shared = LikeTimm()
    with pytest.raises(SwapRefused, match=r"same layer also stands at blocks"):
        mh.convert(Own(shared, shared), HYDRA, paths=[path])


def test_masks_mean_nothing_known_to_a_layer_of_ones_own() -> None:
    """Here True leaves a key out, in timm it keeps it: nobody can tell."""
    model = Own(Masked()).eval()
    student = mh.convert(model, laws.everywhere(mh.Softmax()), paths=["blocks.0.attn"])
    layers = [m.blocks[0].attn for m in (model, student)]
    x = torch.randn(2, 5, 24)
    assert_close(layers[1](x, None), layers[0](x))
    assert_close(layers[1](x, mask=None), layers[0](x))
    again = mh.convert(student, HYDRA).blocks[0].attn
    for layer in (layers[1], again):
        with pytest.raises(MaskRefused, match=r"given argument 2"):
            layer(x, torch.zeros(2, 5, dtype=torch.bool))
        with pytest.raises(MaskRefused, match=r"given mask"):
            layer(x, mask=torch.zeros(2, 5, dtype=torch.bool))


def test_a_layer_of_no_known_kind_is_refused() -> None:
    with pytest.raises(UnknownHost, match=r"Linear.*neither.*at head"):
        mh.convert(own(), HYDRA, paths=["head"])


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (LikeTimm(sharpen=2.0), "identity swap differs by"),
        (Banded(), "with 225 tokens its identity swap differs by"),
        (WithTable(), "it holds table, which a swap would drop"),
        (ManyScales(), "its scale has 4 values"),
        (WithWeights(), "it returns tuple"),
        (nn.MultiheadAttention(24, 4, kdim=12, vdim=12), r"widths of their own \(12"),
        (nn.MultiheadAttention(24, 4, add_bias_kv=True), "keys that are no tokens"),
        (nn.MultiheadAttention(24, 4, add_zero_attn=True), "keys that are no tokens"),
        (LikeTimm().to("meta"), "meta device"),
    ],
    ids=[
        "sharpened",
        "banded",
        "table",
        "scales",
        "tuple",
        "kdim",
        "bias-kv",
        "zero-attn",
        "meta",
    ],
)
def test_a_layer_that_does_more_is_refused_by_name(layer: Any, says: str) -> None:
    with pytest.raises(SwapRefused, match=rf"{says}.*at blocks\.0\.attn"):
        mh.convert(Own(layer), HYDRA, paths=["blocks.0.attn"])


def test_timms_own_layer_is_like_timms() -> None:
    model = Own(Attention(24, num_heads=4, qk_norm=True, norm_layer=nn.LayerNorm))
    image = torch.randn(1, 3, 32, 32)
    same = mh.convert(
        model.eval(), laws.everywhere(mh.Softmax()), paths=["blocks.0.attn"]
    )
    assert_close(same(image), model(image))


def test_a_windowed_layer_is_found_out_by_its_answer() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))
    with pytest.raises(SwapRefused, match="it holds relative_position_bias_table"):
        mh.convert(swin, HYDRA, paths=["layers.0.blocks.0.attn"])


def test_dropout_is_refused_as_everywhere() -> None:
    model = Own(nn.MultiheadAttention(24, 4, dropout=0.1))
    with pytest.raises(SwapRefused, match=r"p=0\.1"):
        mh.convert(model, HYDRA, paths=["blocks.0.attn"])


def test_compact_finds_no_output_matrix_there() -> None:
    with pytest.raises(NothingToConvert, match="no feed-forward layer"):
        mh.convert(own(), laws.COMPACT, paths=PATHS)
