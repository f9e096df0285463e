"""What transformers' models can do, they can do converted, or refuse by name."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import manyheads as mh
from manyheads.errors import ManyheadsError, MaskRefused
from manyheads.hosts import find_host
from manyheads.hosts.hf_attention import manyheads_attention
from manyheads.hosts.hf_names import MODELS
from tests.helpers import assert_close
from tests.hosts import laws
from tests.hosts.hf_models import FAMILIES, PICTURE, SMALL, TEXT, build

transformers = pytest.importorskip("transformers")

HYDRA = laws.everywhere(mh.Hydra())
FIRST = mh.Recipe(mh.Swap(blocks=[0], attention=mh.Hydra()))


def student_of(family: str, recipe: mh.Recipe = HYDRA) -> Any:
    return mh.convert(FAMILIES[family](), recipe).eval()


def tiny(name: str) -> nn.Module:
    """Any class of the library that a checkpoint may name, tiny."""
    if not name.startswith("Siglip2"):
        return build(name)
    kind = getattr(transformers, name)
    vision = SMALL | {"num_patches": 16, "patch_size": PICTURE["patch_size"]}
    if "vision_config" in getattr(kind.config_class, "sub_configs", {}):
        return laws.randomise(
            kind(kind.config_class(vision_config=vision, text_config=dict(TEXT)))
        )
    return laws.randomise(kind(kind.config_class(**vision)))


# Some of the classes came after the oldest version.
@pytest.mark.parametrize(
    "name", [n for n in sorted(MODELS) if hasattr(transformers, n)]
)
def test_every_class_that_may_be_saved_keeps_its_answer_and_comes_back(
    name: str, tmp_path: Path
) -> None:
    model = tiny(name)
    laws.identity_law(model)
    swaps = mh.Swap(blocks=[1], attention=mh.Hydra()), mh.Swap(ffn=mh.Compact(rank=8))
    laws.round_trip_law(model, mh.Recipe(*swaps), tmp_path / "student")


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "Siglip2Model"])
def test_text_towers_stay_as_they_were(name: str) -> None:
    model: Any = tiny(name)
    student = mh.convert(model, HYDRA)
    words = {"input_ids": torch.tensor([[3, 4, 1], [5, 1, 1]])}
    with torch.no_grad():
        before, after = (m.text_model(**words).pooler_output for m in (model, student))
    assert torch.equal(before, after)
    towers = {type(m).__name__: m.config for m in student.modules() if _is_layer(m)}
    assert len(towers) == 1, "both towers are built of one class"
    where = [
        path.startswith("vision_model")
        for path, m in student.named_modules()
        if hasattr(m, "core")
    ]
    assert where == [True, True]
    assert student.text_model.config._attn_implementation == "sdpa"


def _is_layer(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") and hasattr(module, "config")


@pytest.mark.parametrize("chosen", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["vit", "clip", "dinov3"])
def test_another_attention_implementation_never_replaces_the_mechanism(
    family: str, chosen: str
) -> None:
    """It would compute softmax with the weights of Hydra, and look right."""
    student = student_of(family)
    images = laws.pictures(student)
    expected = laws.answer(student, images)
    student.set_attn_implementation(chosen)
    with pytest.raises(ManyheadsError, match=rf"Hydra\(\).*{chosen!r}.*'manyheads'"):
        laws.answer(student, images)
    layer = next(m for m in student.modules() if hasattr(m, "core"))
    layer.config._attn_implementation = "manyheads"
    assert torch.equal(laws.answer(student, images), expected)


def test_a_layer_converted_twice_checks_once() -> None:
    again = mh.convert(student_of("vit"), laws.everywhere(mh.Softmax()))
    layer = next(m for m in again.modules() if hasattr(m, "core"))
    assert len(layer._forward_pre_hooks) == 1


_FRESH = """
import sys, torch
student, images, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(student(images).logits, expected)
"""


def test_a_pickled_student_runs_in_a_process_that_never_converted(
    tmp_path: Path,
) -> None:
    student = student_of("vit")
    images = laws.pictures(student)
    with torch.no_grad():
        parts = student, images, student(images).logits
    torch.save(parts, tmp_path / "student.pt")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FRESH, str(tmp_path / "student.pt")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]


# SigLIP's layers are not told that maps are asked for, whatever attention is chosen.
@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov3", "clip-vision"])
def test_mixed_layers_all_give_their_maps(family: str) -> None:
    student = student_of(family, FIRST)
    images = laws.pictures(student)
    old = transformers.__version__.startswith("4.") and family != "clip-vision"
    # Version 4 gives maps for names of its own only, and warns of that.
    told_so: Any = nullcontext()
    if old:
        told_so = pytest.warns(UserWarning, match="is not supported")
    with torch.no_grad(), told_so:
        plain = student(images)
        told = student(images, output_attentions=True)
    if old:
        return
    assert len(told.attentions) == 2, "every layer answers, converted or not"
    hydra, softmax = told.attentions
    assert hydra.shape[-2:] == softmax.shape[-2:]
    assert_close(softmax.sum(dim=-1), torch.ones(softmax.shape[:-1]))
    assert_close(told[0], plain[0])


def test_maps_of_plain_layers_leave_padding_out() -> None:
    model = FAMILIES["siglip"]()
    layer = model.get_submodule(find_host(model)[1][0].attention_path)
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    kept = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    options = {"scaling": 8**-0.5, "is_causal": False}
    mixed, maps = manyheads_attention(
        layer, q, k, v, kept, output_attentions=True, **options
    )
    assert maps is not None
    assert not maps[1, :, :, 4:].any()
    assert_close(mixed, manyheads_attention(layer, q, k, v, kept, **options)[0])


def test_a_position_bias_is_refused() -> None:
    student = student_of("vit")
    layer = next(m for m in student.modules() if hasattr(m, "core"))
    q, k, v = (torch.randn(1, 4, 6, 8) for _ in range(3))
    with pytest.raises(MaskRefused, match=r"position bias.*\[1, 4, 6, 6\]"):
        manyheads_attention(layer, q, k, v, None, position_bias=torch.randn(1, 4, 6, 6))


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov3", "siglip", "clip-vision"])
def test_checkpointing_gives_the_same_gradients(family: str) -> None:
    student, images = student_of(family).train(), torch.randn(2, 3, 32, 32)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            newest = getattr(student, "activation_checkpointing_enable", None)
            (newest or student.gradient_checkpointing_enable)()
        student.zero_grad()
        torch.manual_seed(0)  # DINOv3 jitters its rotation while it trains
        student(images)[0].square().sum().backward()
        met = (p.grad for p in student.parameters() if p.numel())
        grads.append([grad for grad in met if grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    for one, two in zip(*grads, strict=True):
        assert_close(two, one, slack=10)


def test_narrow_weights_beside_wide_frequencies_come_back(tmp_path: Path) -> None:
    """`from_pretrained` narrows parameters and leaves DINOv3's rotation wide."""
    FAMILIES["dinov3"]().save_pretrained(tmp_path / "source")
    load = transformers.DINOv3ViTModel.from_pretrained
    name = "dtype" if "dtype" in inspect.getsource(load) else "torch_dtype"
    narrow = load(tmp_path / "source", **{name: torch.bfloat16}).eval()
    for teacher in (narrow, FAMILIES["dinov3"]().bfloat16()):
        student = mh.convert(teacher, HYDRA).eval()
        again = mh.load(mh.save(student, tmp_path / "student"))
        types = [[b.dtype for _, b in m.named_buffers()] for m in (student, again)]
        assert types[0] == types[1]
        images = torch.randn(1, 3, 32, 32).bfloat16()
        assert torch.equal(laws.answer(again, images), laws.answer(student, images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_types_stay_half(family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family]().to(dtype)
    images = laws.pictures(model).to(dtype)
    expected = laws.answer(model, images)
    for spec in laws.SPECS:
        if laws.refused(model, spec):
            continue
        actual = laws.answer(mh.convert(model, laws.everywhere(spec)).eval(), images)
        assert actual.dtype == dtype
        assert actual.isfinite().all()
        if isinstance(spec, mh.Softmax):
            assert_close(actual, expected)
    assert find_host(model)[1]


PROCESSORS = {
    "CLIPImageProcessor": "CLIPVisionModelWithProjection",
    "SiglipImageProcessor": "SiglipVisionModel",
    "Siglip2ImageProcessor": "Siglip2VisionModel",
    "DINOv3ViTImageProcessorFast": "DINOv3ViTModel",
    "DINOv3ViTImageProcessor": "DINOv3ViTModel",
    "BitImageProcessor": "Dinov2Model",
    "DeiTImageProcessor": "DeiTModel",
}
MAJOR = transformers.__version__.partition(".")[0]
# Version 4 has two classes of each, version 5 one, under the shorter name.
PRESENT = [
    name
    for name in PROCESSORS
    if hasattr(transformers, name) and not (MAJOR == "5" and name.endswith("Fast"))
]


@pytest.mark.parametrize("name", PRESENT)
def test_each_familys_image_processor_is_saved_along(name: str, tmp_path: Path) -> None:
    model = tiny(PROCESSORS[name])
    model.save_pretrained(tmp_path / "source")
    getattr(transformers, name)(image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        tmp_path / "source"
    )
    read = type(model).from_pretrained(tmp_path / "source").eval()
    folder = mh.save(mh.convert(read, HYDRA), tmp_path / "student")
    written = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    assert written["image_processor_type"].startswith(name.removesuffix("Fast"))
    student = mh.load(folder)
    assert find_host(student)[0].image_input(student).mean == (0.1, 0.2, 0.3)


def test_the_image_part_of_a_joint_processor_is_saved_along(tmp_path: Path) -> None:
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (tmp_path / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = transformers.CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    )
    pictures = transformers.CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3])
    tiny("CLIPModel").save_pretrained(tmp_path / "source")
    joint = transformers.CLIPProcessor(pictures, tokenizer)
    joint.save_pretrained(tmp_path / "source")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "source").eval()
    student = mh.load(mh.save(mh.convert(model, HYDRA), tmp_path / "student"))
    assert find_host(student)[0].image_input(student).mean == (0.1, 0.2, 0.3)


def test_a_language_model_beside_the_tower_stays_as_it_was() -> None:
    text = transformers.LlamaConfig(
        **SMALL | {"vocab_size": 50}, num_key_value_heads=4, pad_token_id=0
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SMALL, **PICTURE),
        text_config=text,
        image_token_index=49,
    )
    model: Any = laws.randomise(transformers.LlavaModel(config))
    student = mh.convert(model, HYDRA)
    assert {type(m).__name__ for m in student.modules() if hasattr(m, "core")} == {
        "CLIPAttention"
    }
    words = {"input_ids": torch.tensor([[3, 4, 1]])}
    with torch.no_grad():
        before, after = (m(**words).last_hidden_state for m in (model, student))
    assert torch.equal(before, after)
