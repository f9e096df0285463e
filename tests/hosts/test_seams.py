"""What timm's models can do, they can do converted: its generic checks, on ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import manyheads as mh
from manyheads.attention import AttentionSpec
from manyheads.errors import UnknownHost
from tests.helpers import assert_close
from tests.hosts import laws
from tests.hosts.families import FAMILIES

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


PLAIN = {"img_size": 64, "depth": 2, "out_indices": (0, 1)}
ROTARY = PLAIN | {"embed_dim": 96, "num_heads": 3}
EXTRACTORS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": PLAIN,
    "deit3_small_patch16_224": PLAIN,
    "vit_base_patch16_18x2_224": PLAIN,
    "vit_tiny_r_s16_p8_224": PLAIN | {"img_size": 128},
    "naflexvit_base_patch16_gap": {"depth": 2, "out_indices": (0, 1)},
    "eva02_tiny_patch14_224": ROTARY | {"img_size": 56},
    "vit_small_patch16_dinov3": ROTARY,
    "vit_pe_core_tiny_patch16_384": ROTARY,
    "qwen3_vit_88m": ROTARY | {"pos_embed_grid_size": 4},
    "pit_ti_224": {"img_size": 64},
    "mobilevit_xxs": {},
}


@pytest.mark.parametrize("name", EXTRACTORS)
def test_a_feature_extractor_is_converted_through_its_wrapper(
    name: str, tmp_path: Path
) -> None:
    model: Any = timm.create_model(name, features_only=True, **EXTRACTORS[name])
    images = laws.pictures(laws.randomise(model))[:1]
    with torch.no_grad():
        expected = model(images)
        for spec in laws.SPECS:
            if laws.refused(model, spec):
                continue
            student: Any = mh.convert(model, laws.everywhere(spec)).eval()
            maps = student(images)
            assert [m.shape for m in maps] == [e.shape for e in expected]
            assert student.feature_info.channels() == [m.shape[1] for m in maps]
            for ours, theirs in zip(maps, expected, strict=True):
                if spec == mh.Softmax():
                    assert_close(ours, theirs)
            assert spec == mh.Softmax() or not torch.equal(maps[-1], expected[-1])
        again: Any = mh.load(mh.save(student, tmp_path / "student"))
        assert all(map(torch.equal, again(images), student(images)))


@pytest.mark.parametrize("name", ["pvt_v2_b0", "nextvit_small"])
def test_a_pyramid_that_was_taken_apart_is_refused_with_the_reason(name: str) -> None:
    model = timm.create_model(name, features_only=True, device="meta")
    with pytest.raises(UnknownHost, match="features_only=True took that apart"):
        mh.preview(model, laws.everywhere(mh.Hydra()))


@EACH_MECHANISM
def test_the_patch_size_can_be_set_afterwards(spec: AttentionSpec) -> None:
    model = converted("vit", spec)
    model.set_input_size(img_size=(48, 64), patch_size=8)
    assert model(torch.randn(1, 3, 48, 64)).isfinite().all()
    assert set(laws.grids_seen(model)) <= {(6, 8)}


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_what_was_changed_afterwards_is_saved(
    name: str, classes: int, tmp_path: Path
) -> None:
    model = converted(name, mh.Hydra())
    model.reset_classifier(classes)
    model.set_input_size(img_size=(48, 96))
    again = mh.load(mh.save(model.eval(), tmp_path / "student"))
    image = torch.randn(1, 3, 48, 96)
    assert torch.equal(again(image), model(image))


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


_COMPILE_FAMILIES = """
import sys, torch, manyheads as mh
from manyheads.hosts.hf_names import vision_root
from tests.hosts import laws
from tests.hosts.families import FAMILIES, at
for name in sys.argv[1:]:
    size = FAMILIES[name].native
    model, image = at(name, size), torch.randn(1, 3, *size)
    host, sites = laws.find_host(model)
    carried = [spec for spec in laws.SPECS[::-1] if not laws.refused(model, spec)]
    specs = {site.index: carried[site.index % len(carried)] for site in sites}
    recipe = mh.Recipe(*(
        mh.Swap(blocks=[site.index], attention=specs[site.index])
        for site in sites
        if not site.fixed and not specs[site.index].exempt(site.geometry)
    ))
    student = mh.convert(model, recipe).eval()
    # SigLIP 2, CLIP and ViT-MAE are not called with an image alone, or not as a whole.
    apart = hasattr(model, "get_image_features")
    target = vision_root(student)[1] if apart else student
    called = []
    note = target.register_forward_pre_hook(
        lambda _, *call: called.append(call), with_kwargs=True
    )
    ours = laws.answer(student, image)
    note.remove()
    (args, kwargs), = called
    torch._dynamo.reset()
    whole = torch.compile(target, fullgraph=True, backend="eager")
    with torch.no_grad():
        theirs = host.output(whole(*args, **kwargs))
    assert (ours - theirs).abs().max() < 1e-5, name
    print(name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(FAMILIES), 8))
def test_every_family_compiles_into_one_graph(first: int) -> None:
    names = list(FAMILIES)[first : first + 8]
    done = run(_COMPILE_FAMILIES, *names)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == names


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
