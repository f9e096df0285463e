"""torchvision's vit_*: exact for the identity swap, square images only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import manyheads as mh
from manyheads.attention import AttentionSpec
from manyheads.errors import (
    CheckpointError,
    GeometryMismatch,
    ImageSizeError,
    MaskRefused,
    UnknownHost,
)
from manyheads.geometry import Geometry
from manyheads.hosts import find_host
from manyheads.hosts.torch_attention import TorchAttention, multihead_geometry
from tests.helpers import assert_close
from tests.hosts import laws

EACH_MECHANISM = pytest.mark.parametrize("spec", laws.SPECS, ids=repr)


def tiny(**changes: object) -> nn.Module:
    arguments = {
        "image_size": 32,
        "patch_size": 8,
        "num_layers": 3,
        "num_heads": 4,
        "hidden_dim": 48,
        "mlp_dim": 96,
        "num_classes": 7,
    }
    model = torchvision.models.VisionTransformer(**(arguments | changes))
    return laws.randomise(model)


def test_identity_law() -> None:
    laws.identity_law(tiny())


def test_without_torchs_own_fast_path_logits_are_equal_bit_for_bit() -> None:
    model = tiny()
    images = laws.pictures(model)
    student = mh.convert(model, laws.everywhere(mh.Softmax()))
    assert torch.equal(student(images), model(images))


def test_identity_law_with_a_representation_layer() -> None:
    laws.identity_law(tiny(representation_size=24))


def test_an_oblong_image_is_refused_with_a_size_that_works() -> None:
    model = tiny()
    host, _ = find_host(model)
    with pytest.raises(ImageSizeError, match=r"32x48.*square.*multiple of 8.*48x48"):
        host.resize(model, (32, 48))


def test_an_image_between_two_grids_is_padded() -> None:
    model = tiny()
    assert mh.cost(model, image_size=(41, 44)).ledger.fed_size == (48, 48)


def test_compact_takes_the_second_matrix_of_the_mlp() -> None:
    student = laws.compact_law(tiny())
    _, sites = find_host(student)
    assert sites[0].ffn_path == "encoder.layers.encoder_layer_0.mlp.3"


@EACH_MECHANISM
def test_a_checkpoint_comes_back(spec: AttentionSpec, tmp_path: Path) -> None:
    recipe = mh.Recipe(
        mh.Swap(blocks=[1, 2], attention=spec), mh.Swap(ffn=mh.Compact(rank=8))
    )
    laws.round_trip_law(tiny(), recipe, tmp_path / "student")


def test_a_resized_model_is_saved_at_its_size(tmp_path: Path) -> None:
    model = tiny()
    find_host(model)[0].resize(model, (48, 48))
    again = mh.load(mh.save(model, tmp_path / "model"))
    assert find_host(again)[0].image_input(again).size == (48, 48)


def test_a_model_with_another_norm_is_not_saved(tmp_path: Path) -> None:
    model = tiny(norm_layer=nn.LayerNorm)
    with pytest.raises(CheckpointError, match="norm_layer"):
        mh.save(model, tmp_path / "model")


@pytest.mark.parametrize(
    "change",
    [{"weights": 1}, {"num_heads": None}, {"patch_size": "8"}, {"dropout": []}],
)
def test_a_strangers_description_may_hold_numbers_only(change: dict) -> None:
    host, _ = find_host(tiny())
    with pytest.raises(CheckpointError):
        host.rebuild(host.describe(tiny()) | change)


@pytest.mark.parametrize("name", ["swin_t", "maxvit_t"])
def test_windowed_transformers_are_refused_by_name(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    with pytest.raises(UnknownHost, match=r"windowed.*relative bias"):
        mh.preview(model, laws.everywhere(mh.Hydra()))


def test_a_convolutional_network_is_refused() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    with pytest.raises(UnknownHost, match="ResNet is not"):
        mh.preview(model, laws.everywhere(mh.Hydra()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_l_16", "vit_h_14"])
def test_every_registered_model_is_supported(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    assert "Hydra()" in str(mh.preview(model, laws.everywhere(mh.Hydra())))


def test_vit_b_16_costs_what_the_library_says() -> None:
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    books = mh.cost(model)
    assert books.num_parameters == 86_567_656
    published = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.meta["_ops"]
    matmul = sum(block.matmul for block in books.blocks) + books.ledger.rest
    assert round(matmul / 1e9, 3) == published
    for block in books.blocks:
        assert block.projections == 4 * 197 * 768**2
        assert block.attention_matrices == 2 * 197**2 * 768


# --- the drop-in itself ---------------------------------------------------------


def both(**options: object) -> tuple[nn.MultiheadAttention, TorchAttention, Geometry]:
    source = nn.MultiheadAttention(24, 4, **{"batch_first": True, **options}).eval()
    geometry = multihead_geometry(source)
    return source, TorchAttention(source, geometry, mh.Softmax()).eval(), geometry


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["BND", "NBD"])
def test_the_drop_in_equals_torch(bias: bool, batch_first: bool) -> None:
    source, layer, _ = both(bias=bias, batch_first=batch_first)
    x = torch.randn(3, 5, 24)
    expected, _ = source(x, x, x, need_weights=False)
    actual, weights = layer(x, x, x)
    assert weights is None
    assert_close(actual, expected)


def test_queries_and_keys_may_carry_other_positions_than_values() -> None:
    source, layer, _ = both()
    x, position = torch.randn(2, 5, 24), torch.randn(1, 5, 24)
    expected, _ = source(x + position, x + position, x)
    assert_close(layer(x + position, x + position, x)[0], expected)


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "float"])
def test_padding_means_what_it_means_in_torch(additive: bool) -> None:
    source, layer, _ = both()
    x = torch.randn(2, 5, 24)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    if additive:
        padding = torch.zeros(2, 5).masked_fill(padding, -torch.inf)
    expected, _ = source(x, x, x, key_padding_mask=padding)
    assert_close(layer(x, x, x, key_padding_mask=padding)[0], expected)


@pytest.mark.parametrize("heads", [False, True], ids=["NN", "BHNN"])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "float"])
def test_pair_masks_reach_softmax(additive: bool, heads: bool) -> None:
    source, layer, _ = both()
    x = torch.randn(2, 5, 24)
    pairs = torch.ones(5, 5).triu(1).bool()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    if additive:
        pairs = torch.randn(5, 5)
        padding = torch.zeros(2, 5).masked_fill(padding, -torch.inf)
    if heads:
        pairs = pairs.expand(8, 5, 5)
    expected, _ = source(x, x, x, key_padding_mask=padding, attn_mask=pairs)
    actual, _ = layer(x, x, x, key_padding_mask=padding, attn_mask=pairs)
    assert_close(actual, expected)


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "float"])
def test_a_pair_mask_without_padding_is_no_key_mask(
    additive: bool, images: int
) -> None:
    """With as many images as tokens, [N, N] looks like one truth value per key."""
    source, layer, _ = both()
    x = torch.randn(images, 5, 24)
    pairs = torch.randn(5, 5) if additive else torch.ones(5, 5).triu(1).bool()
    expected, _ = source(x, x, x, attn_mask=pairs)
    assert_close(layer(x, x, x, attn_mask=pairs)[0], expected)


def test_the_causal_hint_needs_its_mask_as_in_torch() -> None:
    source, layer, _ = both()
    x = torch.randn(2, 5, 24)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    with pytest.raises(RuntimeError, match="attn_mask"):
        source(x, x, x, is_causal=True)
    with pytest.raises(MaskRefused, match=r"is_causal=True.*attn_mask is None"):
        layer(x, x, x, is_causal=True)
    expected, _ = source(x, x, x, attn_mask=mask, is_causal=True)
    assert_close(layer(x, x, x, attn_mask=mask, is_causal=True)[0], expected)


def test_masked_keys_leave_hydras_sum() -> None:
    source, _, geometry = both()
    layer = TorchAttention(source, geometry, mh.Hydra()).eval()
    x = torch.randn(1, 5, 24)
    padding = torch.tensor([[False] * 3 + [True] * 2])
    short = layer(*[x[:, :3]] * 3)[0]
    assert_close(layer(x, x, x, key_padding_mask=padding)[0][:, :3], short)


def test_hydra_refuses_masks_on_pairs_and_soft_padding() -> None:
    source, _, geometry = both()
    layer = TorchAttention(source, geometry, mh.Hydra())
    x = torch.randn(1, 5, 24)
    with pytest.raises(MaskRefused, match=r"attn_mask \[5, 5\].*Hydra"):
        layer(x, x, x, attn_mask=torch.ones(5, 5).triu(1).bool())
    with pytest.raises(MaskRefused, match="neither 0 nor minus infinity"):
        layer(x, x, x, key_padding_mask=torch.full((1, 5), -1.0))


def test_cross_attention_is_refused_when_it_is_called() -> None:
    _, layer, _ = both()
    with pytest.raises(GeometryMismatch, match=r"\[1, 5, 24\].*\[1, 7, 24\].*self-att"):
        layer(torch.randn(1, 5, 24), *[torch.randn(1, 7, 24)] * 2)


def test_it_stands_in_torchs_encoder_too() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 4, 48, batch_first=True), num_layers=2
    ).eval()
    x = torch.randn(2, 5, 24)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = encoder(x, src_key_padding_mask=padding)
    for block in encoder.layers:
        geometry = multihead_geometry(block.self_attn)
        block.self_attn = TorchAttention(block.self_attn, geometry, mh.Softmax())
    actual = encoder.eval()(x, src_key_padding_mask=padding)
    assert_close(actual[0], expected[0])
    assert_close(actual[1, :3], expected[1, :3])


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("converted", [0, 1])
def test_padding_packed_by_torchs_encoder_is_refused_with_its_switch(
    converted: int,
) -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 4, 48, batch_first=True), num_layers=2
    ).eval()
    student = mh.convert(
        encoder,
        laws.everywhere(mh.Softmax()),
        paths=[f"layers.{converted}.self_attn"],
    )
    x = torch.randn(2, 5, 24)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        assert_close(student(x), encoder(x))
        with pytest.raises(GeometryMismatch, match="enable_nested_tensor=False"):
            student(x, src_key_padding_mask=padding)
        encoder.use_nested_tensor = student.use_nested_tensor = False
        expected = encoder(x, src_key_padding_mask=padding)
        actual = student(x, src_key_padding_mask=padding)
    assert_close(actual, expected)
