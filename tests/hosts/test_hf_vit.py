"""transformers' vision towers: every family, both majors, masks delivered."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import manyheads as mh
from manyheads.attention import AttentionSpec
from manyheads.errors import CheckpointError, ManyheadsError, MaskRefused, UnknownHost
from manyheads.hosts import find_host, mechanism_of
from manyheads.hosts.hf_attention import manyheads_attention
from tests.helpers import assert_close
from tests.hosts import laws
from tests.hosts.hf_models import FAMILIES

transformers = pytest.importorskip("transformers")

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
HYDRA = laws.everywhere(mh.Hydra())


@EACH_FAMILY
def test_the_teacher_stays_untouched(family: str) -> None:
    model = FAMILIES[family]()
    was = str(model.config), model.config._attn_implementation
    laws.untouched_law(model, mh.Hydra())
    assert (str(model.config), model.config._attn_implementation) == was


@EACH_FAMILY
def test_blocks_cost_what_the_formula_says(family: str) -> None:
    for block in mh.cost(FAMILIES[family]()).blocks:
        N = block.num_tokens
        assert block.projections == 4 * N * 32 * 32
        assert block.attention_matrices == 2 * N * N * 32
        matrices = 3 if "gated" in family else 2
        assert block.feed_forward % (matrices * N * 32) == 0
        assert block.feed_forward >= matrices * N * 32 * 64 or "dinov2" in family


@EACH_FAMILY
def test_a_checkpoint_comes_back(family: str, tmp_path: Path) -> None:
    recipe = mh.Recipe(
        mh.Swap(blocks=[1], attention=mh.Hydra()), mh.Swap(ffn=mh.Compact(rank=8))
    )
    laws.round_trip_law(FAMILIES[family](), recipe, tmp_path / "student")


@pytest.mark.parametrize("family", ["vit", "mae-pretraining"])
def test_a_resized_model_comes_back_at_any_size(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    host, _ = find_host(model)
    host.resize(model, (24, 40))
    again = mh.load(mh.save(model, tmp_path / "model"))
    images = torch.randn(1, 3, 24, 40)
    assert torch.equal(laws.answer(again, images), laws.answer(model, images))


def test_converted_and_plain_layers_mix() -> None:
    model = FAMILIES["vit"]()
    images = laws.pictures(model)
    recipe = mh.Recipe(mh.Swap(blocks=[0], attention=mh.Softmax()))
    student = mh.convert(model, recipe)
    assert [s.attention for s in find_host(student)[1]] == [mh.Softmax()] * 2
    assert sum(mechanism_of(m) is not None for m in student.modules()) == 1
    assert_close(laws.answer(student, images), laws.answer(model, images))


def test_a_text_tower_stays_as_it_was() -> None:
    model = FAMILIES["clip"]()
    student = mh.convert(model, HYDRA)
    assert student.vision_model.config._attn_implementation == "manyheads"
    assert student.text_model.config._attn_implementation == "sdpa"
    words = {"input_ids": torch.tensor([[3, 4, 1], [5, 1, 1]])}
    words["attention_mask"] = torch.tensor([[1, 1, 1], [1, 1, 0]])
    pictures = laws.pictures(model)
    with torch.no_grad():
        before = model(pixel_values=pictures, **words)
        after = student(pixel_values=pictures, **words)
    assert torch.equal(before.text_embeds, after.text_embeds)
    assert not torch.equal(before.image_embeds, after.image_embeds)
    assert all("vision" in site.path for site in find_host(model)[1])


def test_a_decoder_is_no_vision_tower() -> None:
    _, sites = find_host(FAMILIES["mae-pretraining"]())
    assert len(sites) == 2
    assert not any("decoder" in site.path for site in sites)


def test_pooling_heads_are_left_alone() -> None:
    _, sites = find_host(FAMILIES["siglip"]())
    assert len(sites) == 2
    assert not any("head" in site.attention_path for site in sites)


# --- masks ------------------------------------------------------------------------


def padded(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same SigLIP 2 picture of 2 x 3 patches, alone and padded to 16."""
    patches = torch.randn(1, 6, 8 * 8 * 3)
    shape = torch.tensor([[2, 3]])
    alone = {"pixel_values": patches, "spatial_shapes": shape}
    alone["pixel_attention_mask"] = torch.ones(1, 6, dtype=torch.long)
    filled = {"spatial_shapes": shape}
    filled["pixel_values"] = torch.cat([patches, torch.randn(1, 10, 192)], dim=1)
    filled["pixel_attention_mask"] = (torch.arange(16) < 6).long()[None]
    return alone, filled


@pytest.mark.parametrize("blocks", [None, [0]], ids=["all", "mixed"])
@pytest.mark.parametrize("spec", [mh.Softmax(), mh.Hydra()], ids=repr)
def test_padding_is_really_delivered(spec: AttentionSpec, blocks: Any) -> None:
    model = FAMILIES["siglip2"]()
    alone, filled = padded(model)
    student = mh.convert(model, mh.Recipe(mh.Swap(blocks=blocks, attention=spec)))
    with torch.no_grad():
        expected = student(**alone)
        actual = student(**filled)
        wrong = student(**filled | {"pixel_attention_mask": None})
    assert_close(actual.pooler_output, expected.pooler_output)
    assert_close(actual.last_hidden_state[:, :6], expected.last_hidden_state, slack=2)
    difference = (wrong.pooler_output - expected.pooler_output).abs().max()
    assert difference > 1e-3, "the mask makes no difference, so nothing is tested"


def student_layer(spec: AttentionSpec) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    student = mh.convert(FAMILIES["siglip"](), laws.everywhere(spec))
    layer = next(m for m in student.modules() if mechanism_of(m) is not None)
    return layer, tuple(torch.randn(2, 4, 6, 8) for _ in range(3))


def call(layer: nn.Module, tensors: Any, mask: Any, **options: Any) -> Any:
    return manyheads_attention(layer, *tensors, mask, **options)


def test_a_causal_call_is_refused() -> None:
    layer, tensors = student_layer(mh.Hydra())
    with pytest.raises(MaskRefused, match=r"Hydra\(\) was called causally"):
        call(layer, tensors, None, is_causal=True)


def test_a_causal_mask_reaches_the_mechanism_in_full_and_is_refused() -> None:
    config = FAMILIES["clip"]().text_model.config
    config._attn_implementation = "manyheads"
    masks = transformers.masking_utils
    mask = masks.create_causal_mask(
        config=config,
        **{_embeds_name(masks): torch.zeros(2, 6, 32)},
        attention_mask=torch.tensor([[1] * 6, [1] * 5 + [0]]).bool(),
        past_key_values=None,
        **_position_arguments(masks),
    )
    assert mask is not None
    assert mask.shape == (2, 1, 6, 6)
    assert not mask[0, 0, 0, 1]
    layer, tensors = student_layer(mh.Hydra())
    with pytest.raises(MaskRefused, match=r"\[2, 1, 6, 6\]"):
        call(layer, tensors, mask)


def _embeds_name(masks: Any) -> str:
    names = inspect.signature(masks.create_causal_mask).parameters
    return "inputs_embeds" if "inputs_embeds" in names else "input_embeds"


def _position_arguments(masks: Any) -> dict[str, Any]:
    names = inspect.signature(masks.create_causal_mask).parameters
    required = names.get("cache_position")
    return {"cache_position": torch.arange(6)} if required is not None else {}


def test_a_relative_bias_is_refused() -> None:
    layer, tensors = student_layer(mh.Hydra())
    with pytest.raises(MaskRefused, match=r"float32 mask of shape \[1, 4, 6, 6\]"):
        call(layer, tensors, torch.randn(1, 4, 6, 6))


def test_an_expanded_padding_of_numbers_is_read_as_what_it_is() -> None:
    layer, tensors = student_layer(mh.Hydra())
    kept = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    lowest = torch.finfo(torch.float32).min
    numbers = torch.zeros(2, 1, 6, 6).masked_fill(~kept[:, None, None], lowest)
    expected, _ = call(layer, tensors, kept)
    assert_close(call(layer, tensors, numbers)[0], expected)


def test_maps_are_returned_where_they_are_asked_for() -> None:
    layer, tensors = student_layer(mh.Softmax())
    mixed, nothing = call(layer, tensors, None)
    again, maps = call(layer, tensors, None, output_attentions=True)
    assert nothing is None
    assert torch.equal(mixed, again)
    applied = (maps @ tensors[2]).transpose(1, 2)
    assert_close(applied, mixed)


# --- where it came from -------------------------------------------------------------


def test_the_image_processor_is_saved_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    FAMILIES["vit"]().save_pretrained(source)
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32},
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
        resample=3,
    )
    processor.save_pretrained(source)
    model = transformers.ViTForImageClassification.from_pretrained(source).eval()
    folder = mh.save(mh.convert(model, HYDRA), tmp_path / "student")
    again = transformers.AutoImageProcessor.from_pretrained(folder)
    assert list(again.image_mean) == [0.1, 0.2, 0.3]
    student = mh.load(folder)
    host, _ = find_host(student)
    wanted = host.image_input(student)
    assert wanted.size == (32, 32)
    assert wanted.mean == (0.1, 0.2, 0.3)
    assert wanted.interpolation == "bicubic"
    second = mh.save(student, tmp_path / "second")
    assert (second / "preprocessor_config.json").is_file()


def test_a_plain_from_pretrained_drops_what_was_converted(tmp_path: Path) -> None:
    student = mh.convert(FAMILIES["vit"](), HYDRA)
    student.save_pretrained(tmp_path / "plain")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "plain")
    assert not any(mechanism_of(m) is not None for m in again.modules())
    assert again.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"class": "AutoModel"}, "'AutoModel' is no class"),
        ({"class": "BertModel"}, "'BertModel' is no class"),
        ({"major": "3"}, "written with transformers '3'"),
        ({"config": {"auto_map": {"AutoModel": "evil.py"}}}, "names code or files"),
        ({"switches": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"config": {"hidden_size": "large"}}, "transformers refuses"),
    ],
)
def test_a_strangers_description_is_not_trusted(change: dict, says: str) -> None:
    model = FAMILIES["vit"]()
    host, _ = find_host(model)
    with pytest.raises(CheckpointError, match=says):
        host.rebuild(host.describe(model) | change)


def test_the_description_is_json(tmp_path: Path) -> None:
    model = FAMILIES["clip"]()
    host, _ = find_host(model)
    description = host.describe(model)
    assert json.loads(json.dumps(description)) == description


def test_a_model_without_a_comparable_tensor_says_so() -> None:
    host, _ = find_host(FAMILIES["vit"]())
    with pytest.raises(ManyheadsError, match="no logits, embedding or tokens"):
        host.output({})


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("SwinModel", {"depths": [1], "num_heads": [2]}, "windowed"),
        ("BeitModel", {"use_relative_position_bias": True}, "relative position bias"),
        ("SegformerModel", {}, "spatially reduced"),
        ("BertModel", {}, "not among those whose forward pass is known"),
    ],
)
def test_other_families_are_refused_by_name(name: str, config: Any, says: str) -> None:
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(**config))
    with pytest.raises(UnknownHost, match=says):
        mh.preview(model, HYDRA)
