"""What timm's models can do, they can do converted: its generic checks, on ours."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import manyheads as mh
from manyheads.attention import AttentionSpec
from tests.helpers import assert_close
from tests.hosts import laws

SMALL = {"img_size": 64, "depth": 2, "num_classes": 7, "embed_dim": 48, "num_heads": 4}
MODELS = {
    "vit": "vit_tiny_patch16_224",
    "deit-distilled": "deit_tiny_distilled_patch16_224",
    "dinov3": "vit_small_patch16_dinov3",
    "perception": "vit_pe_core_tiny_patch16_384",
}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)
EACH_MECHANISM = pytest.mark.parametrize("spec", laws.SPECS, ids=repr)
IMAGE = (1, 3, 64, 64)


def recipe(spec: AttentionSpec) -> mh.Recipe:
    return mh.Recipe(mh.Swap(attention=spec), mh.Swap(ffn=mh.Compact(rank=8)))


def converted(name: str, spec: AttentionSpec, **changes: Any) -> Any:
    model = timm.create_model(MODELS[name], **(SMALL | changes))
    return mh.convert(laws.randomise(model), recipe(spec)).eval()


@EACH_MECHANISM
@EACH_MODEL
def test_features_and_head_make_the_logits(name: str, spec: AttentionSpec) -> None:
    model, image = converted(name, spec), torch.randn(IMAGE)
    features = model.forward_features(image)
    assert features.shape[-1] == model.num_features == 48
    logits = model.forward_head(features)
    assert_close(logits, model(image))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape[-1] == model.head_hidden_size


@EACH_MECHANISM
@EACH_MODEL
def test_intermediates_are_maps_of_each_block(name: str, spec: AttentionSpec) -> None:
    model, image = converted(name, spec), torch.randn(IMAGE)
    final, maps = model.forward_intermediates(image)
    assert [tuple(m.shape) for m in maps] == [(1, 48, 4, 4)] * 2
    assert_close(final, model.forward_features(image))
    kept = model.prune_intermediate_layers([0], prune_norm=True, prune_head=True)
    assert kept == [0]
    assert len(model.blocks) == 1


@pytest.mark.parametrize("spec", [mh.Softmax(), mh.Hydra()], ids=repr)
@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_a_feature_extractor_is_converted_through_its_wrapper(
    name: str, spec: AttentionSpec
) -> None:
    model = timm.create_model(
        MODELS[name],
        features_only=True,
        out_indices=(0, 1),
        **{k: SMALL[k] for k in SMALL if k != "num_classes"},
    )
    student = mh.convert(laws.randomise(model), recipe(spec))
    maps = student(torch.randn(IMAGE))
    assert [tuple(m.shape) for m in maps] == [(1, 48, 4, 4)] * len(maps)
    assert student.feature_info.channels() == [48] * len(maps)


@EACH_MECHANISM
@EACH_MODEL
def test_the_input_size_can_be_set_afterwards(name: str, spec: AttentionSpec) -> None:
    model = converted(name, spec)
    model.set_input_size(img_size=(48, 96))
    assert model(torch.randn(1, 3, 48, 96)).isfinite().all()


@EACH_MECHANISM
@EACH_MODEL
def test_checkpointing_gives_the_same_gradients(name: str, spec: AttentionSpec) -> None:
    model, image = converted(name, spec), torch.randn(IMAGE)
    model.train()
    model(image).square().sum().backward()
    expected = {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(image).square().sum().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert_close(parameter.grad, expected[path], slack=10)


@EACH_MECHANISM
@EACH_MODEL
def test_every_parameter_learns(name: str, spec: AttentionSpec) -> None:
    """timm's own check of a backward pass."""
    model = converted(name, spec).train()
    model(torch.randn(2, *IMAGE[1:])).square().mean().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient for {path}"
        assert parameter.grad.isfinite().all(), path


@EACH_MODEL
def test_the_classifier_can_be_reset(name: str) -> None:
    model, image = converted(name, mh.Hydra()), torch.randn(IMAGE)
    model.reset_classifier(3)
    head = model(image)
    assert head.shape == (1, 3)
    model.reset_classifier(0)
    assert model(image).shape == (1, 48)
    model.reset_classifier(5)
    assert isinstance(model.get_classifier(), nn.Linear | tuple)


def test_optimizer_groups_know_the_blocks() -> None:
    model = converted("vit", mh.Hydra())
    groups = model.group_matcher(coarse=False)
    assert "blocks" in groups
    listed = param_groups_layer_decay(model, layer_decay=0.75)
    assert sum(len(g["params"]) for g in listed) == len(list(model.parameters()))


_COMPILE = """
import sys, torch, timm, manyheads as mh
name, *specs = sys.argv[1:]
image = torch.randn(2, 3, 64, 64)
for text in specs:
    spec = eval(text, {n: getattr(mh, n) for n in mh.__all__})
    model = timm.create_model(
        name, img_size=64, depth=1, num_classes=7, embed_dim=48, num_heads=4
    )
    recipe = mh.Recipe(mh.Swap(attention=spec), mh.Swap(ffn=mh.Compact(rank=8)))
    student = mh.convert(model, recipe).eval()
    whole = torch.compile(student, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        difference = (whole(image) - student(image)).abs().max().item()
    assert difference < 1e-5, (text, difference)
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: under test every call is wrapped in type checks."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_every_mechanism_compiles_into_one_graph(name: str) -> None:
    done = run(_COMPILE, MODELS[name], *map(repr, laws.SPECS))
    assert done.returncode == 0, done.stderr[-2000:]


_COMPILE_OTHERS = """
import torch, torchvision, transformers, manyheads as mh
recipe = mh.Recipe(mh.Swap(blocks=[0], attention=mh.Hydra()))
config = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=64, image_size=32, patch_size=8,
)
models = [
    torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=7),
    transformers.ViTForImageClassification(config),
]
image = torch.randn(2, 3, 32, 32)
for model in models:
    student = mh.convert(model, recipe).eval()
    whole = torch.compile(student, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours, theirs = student(image), whole(image)
    ours, theirs = (getattr(x, "logits", x) for x in (ours, theirs))
    assert (ours - theirs).abs().max() < 1e-5
"""


def test_the_other_libraries_compile_too() -> None:
    pytest.importorskip("transformers")
    done = run(_COMPILE_OTHERS)
    assert done.returncode == 0, done.stderr[-2000:]


_SCRIPT = """
import torch, timm, manyheads as mh
model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
torch.jit.script(model)
student = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Hydra())))
try:
    torch.jit.script(student)
except mh.errors.NotExportable as error:
    assert "torch.export" in str(error), error
else:
    raise SystemExit("scripting was not refused")
"""


def test_scripting_is_refused_with_what_to_use_instead() -> None:
    done = run(_SCRIPT)
    assert done.returncode == 0, done.stderr[-2000:]


_TRACE = """
import torch, timm, manyheads as mh
model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
student = mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Hydra())))
image = torch.randn(1, 3, 32, 32)
traced = torch.jit.trace(student, image)
assert (traced(image) - student(image)).abs().max() < 1e-5
"""


def test_it_can_be_traced() -> None:
    done = run(_TRACE)
    assert done.returncode == 0, done.stderr[-2000:]
