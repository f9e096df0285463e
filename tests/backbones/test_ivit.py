"""iViT held to what timm's tests/test_models.py expects of every model, and more."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import manyheads as mh
from manyheads.backbones import IVit
from manyheads.errors import ImageSizeError, InvalidOption
from manyheads.hosts import find_host
from tests.helpers import assert_close

SIZES = {"ivit_tiny": 5.4, "ivit_small": 13.1, "ivit_base": 29.8}
TINY = {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1), "num_classes": 7}


def _tiny(**options: object) -> nn.Module:
    return timm.create_model("ivit_tiny", **(TINY | options)).eval()


def _image(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, height, width)


# --- what timm expects --------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_each_size_has_about_the_promised_parameters(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(millions, 1) == SIZES[name]
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_importing_the_backbones_registers_them_and_the_package_stays_lean() -> None:
    script = (
        "import sys, manyheads; assert 'timm' not in sys.modules\n"
        "import manyheads.backbones, timm\n"
        "print(timm.list_models('ivit*'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(sorted(SIZES))


def test_the_forward_pass_is_finite_and_repeats() -> None:
    model, image = _tiny(), _image()
    with torch.no_grad():
        out = model(image)
        assert out.shape == (2, 7)
        assert out.isfinite().all()
        assert torch.equal(model(image), out)


def test_every_parameter_gets_a_gradient() -> None:
    model = _tiny(mix="both").train()
    model(_image()).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", SIZES)
def test_the_default_configuration_is_true(name: str) -> None:
    """As timm's test_model_default_cfgs, at its native size."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    config, state = model.default_cfg, model.state_dict()
    image = torch.empty(1, *config["input_size"], device="meta")
    features = model.forward_features(image)
    assert tuple(features.shape[-2:]) == config["pool_size"]
    assert features.shape[1] == model.num_features
    assert f"{config['classifier']}.weight" in state
    assert f"{config['first_conv']}.weight" in state
    assert model.get_classifier() is model.head.fc
    assert model.forward_head(features, pre_logits=True).shape == (
        1,
        model.head_hidden_size,
    )
    model.reset_classifier(0)
    assert f"{config['classifier']}.weight" not in model.state_dict()
    assert model(image).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(image).shape == features.shape


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_each_pooling_classifies(pool: str) -> None:
    model = _tiny(global_pool=pool)
    assert model(_image()).shape == (2, 7)
    model.reset_classifier(3)
    assert model(_image()).shape == (2, 3)
    assert model.num_classes == 3


def test_without_classes_the_pooled_features_come_out() -> None:
    assert _tiny(num_classes=0)(_image()).shape == (2, 64)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_are_built(channels: int) -> None:
    assert _tiny(in_chans=channels)(torch.randn(1, channels, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (0, 2), (3,), (-2, -1)])
def test_features_have_the_channels_and_strides_they_say(
    indices: tuple[int, ...],
) -> None:
    model = timm.create_model(
        "ivit_tiny", features_only=True, out_indices=indices, **TINY
    ).eval()
    maps = model(_image(96, 64))
    assert len(maps) == len(indices)
    for found, channels, reduction in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert found.shape == (2, channels, 96 // reduction, 64 // reduction)
    if indices == (0, 1, 2, 3):
        assert model.feature_info.reduction() == [4, 8, 16, 32]


def test_features_are_those_of_the_whole_model() -> None:
    whole, image = _tiny(), _image()
    parts = timm.create_model("ivit_tiny", features_only=True, **TINY).eval()
    renamed = {
        name.replace("stages_", "stages.").replace("stem_", "stem."): name
        for name in parts.state_dict()
    }
    state = whole.state_dict()
    parts.load_state_dict({ours: state[theirs] for theirs, ours in renamed.items()})
    with torch.no_grad():
        expected = whole.forward_intermediates(image, intermediates_only=True)
        for ours, theirs in zip(parts(image), expected, strict=True):
            assert_close(ours, theirs)


def test_intermediates_come_with_the_final_features() -> None:
    model, image = _tiny(), _image()
    with torch.no_grad():
        final, maps = model.forward_intermediates(image)
        assert_close(final, model.forward_features(image))
        assert_close(model.forward_head(final), model(image))
        assert [m.shape[1] for m in maps] == [8, 16, 32, 64]
        (last,) = model.forward_intermediates(
            image, indices=1, norm=True, intermediates_only=True
        )
        assert_close(last, final)
        early = model.forward_intermediates(
            image, indices=[1], stop_early=True, intermediates_only=True
        )
        assert_close(early[0], maps[1])
        _, early = model.forward_intermediates(image, indices=[1], stop_early=True)
        assert_close(early[0], maps[1])
    with pytest.raises(InvalidOption, match=r"output_fmt='NHWC'.*NCHW"):
        model.forward_intermediates(image, output_fmt="NHWC")


def test_pruning_to_a_stage_keeps_its_features() -> None:
    model, image = _tiny(), _image()
    with torch.no_grad():
        expected = model.forward_intermediates(image, intermediates_only=True)[2]
        assert model.prune_intermediate_layers([2]) == [2]
        assert len(model.stages) == 3
        assert model.num_features == 32
        assert_close(model(image), expected)


def test_the_state_dict_comes_back() -> None:
    model, again, image = _tiny(), _tiny(), _image()
    again.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))


def test_checkpointing_gives_the_same_gradients() -> None:
    plain = _tiny().train()
    saving, image = copy.deepcopy(plain), _image()
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model(image).square().mean().backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


def test_every_parameter_has_a_layer_and_mixes_do_not_decay() -> None:
    model = _tiny()
    for groups in (
        param_groups_layer_decay(
            model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay()
        ),
        param_groups_layer_decay(model, weight_decay=0.1),
    ):
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert len(model.no_weight_decay()) == 2 * 3
    assert all("core.mix_" in name for name in model.no_weight_decay())


def test_drop_path_and_dropouts_act_in_training_only() -> None:
    model = _tiny(drop_rate=0.5, proj_drop_rate=0.2, drop_path_rate=0.5)
    image = _image()
    with torch.no_grad():
        assert torch.equal(model(image), model(image))
        model.train()
        assert not torch.equal(model(image), model(image))


# --- any size -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (224, 224), (97, 131), (1, 1)])
def test_any_image_size_runs(size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert _tiny()(_image(*size)).isfinite().all()


def test_sizes_may_change_from_call_to_call() -> None:
    model, small, large = _tiny(), _image(64, 64), _image(128, 96)
    with torch.no_grad():
        before = model(small)
        model(large)
        assert torch.equal(model(small), before)


_TOOLS = """
import timm, torch, manyheads.backbones
from timm.layers import create_feature_extractor
from torch.export import Dim
torch.manual_seed(0)
model = timm.create_model(
    "ivit_tiny", dims=(8, 16, 32, 64), depths=(1, 1, 1, 1), num_classes=7
).eval()
example, close = torch.randn(2, 3, 128, 160), torch.testing.assert_close
"""
_EXPORT = """
shapes = ({2: 32 * Dim("rows", min=2, max=32), 3: 32 * Dim("columns", min=2, max=32)},)
program = torch.export.export(model, (example,), dynamic_shapes=shapes).module()
for size in [(64, 64), (224, 224), (320, 96)]:
    image = torch.randn(2, 3, *size)
    close(program(image), model(image))
"""
_FX = """
nodes = create_feature_extractor(model, ["stages.2", "head.fc"])(example)
close(nodes["head.fc"], model(example))
"""
_COMPILE = """
run = torch.compile(model, fullgraph=True, backend="eager")
close(run(example), model(example))
"""


@pytest.mark.parametrize(
    "use",
    [_EXPORT, _FX, _COMPILE],
    ids=["export at three sizes", "fx", "compile in one graph"],
)
def test_the_tools_of_torch_see_the_same_model(use: str) -> None:
    """In a process where no type checker wraps the functions that are traced."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _TOOLS + use],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# --- the mechanism inside -----------------------------------------------------------


@pytest.mark.parametrize("mix", ["none", "before", "after", "both"])
def test_the_mix_is_an_option_and_starts_as_none(mix: str) -> None:
    model, plain, image = _tiny(mix=mix), _tiny(mix="none"), _image(224, 224)
    plain.load_state_dict(model.state_dict(), strict=False)
    per_map = {"none": 0, "before": 1, "after": 1, "both": 2}[mix]
    # Stages of one head and of two heads, in two blocks and one.
    added = 2 * per_map * (2 * 1**2 + 1 * 2**2)
    count = sum(p.numel() for p in model.parameters())
    assert count - sum(p.numel() for p in plain.parameters()) == added
    with torch.no_grad():
        assert_close(model(image), plain(image))


def test_the_fast_form_is_the_slow_one() -> None:
    model, image = _tiny().double(), _image(224, 128).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        fast = model(image)
        for block in (*model.stages[2].blocks, *model.stages[3].blocks):
            block.attn.core.forward = block.attn.core.reference
        assert_close(model(image), fast)


def test_cost_finds_the_token_blocks_at_any_size() -> None:
    model = _tiny()
    cost = mh.cost(model)
    assert [block.num_tokens for block in cost.blocks] == [196, 196, 49]
    assert {block.attention for block in cost.blocks} == {"Interactive()"}
    wide = mh.cost(model, image_size=(100, 333))
    assert [block.num_tokens for block in wide.blocks] == [7 * 21, 7 * 21, 4 * 11]
    assert wide.num_parameters == sum(p.numel() for p in model.parameters())
    with pytest.raises(ImageSizeError, match="32x32"):
        mh.cost(model, image_size=(16, 64))


def test_cost_grows_in_proportion_to_the_pixels() -> None:
    once = mh.cost(_tiny(), image_size=(256, 256)).flops
    sixteenfold = mh.cost(_tiny(), image_size=(1024, 1024)).flops
    assert sixteenfold == pytest.approx(16 * once, rel=0.02)


def test_saved_and_loaded_gives_the_same_logits(tmp_path: Path) -> None:
    model = _tiny(mix="both", landmarks=(3, 4))
    again = mh.load(mh.save(model, tmp_path / "plain"))
    image = _image()
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    swapped = mh.convert(
        model,
        mh.Recipe(
            mh.Swap(blocks=[0], attention=mh.Softmax()),
            mh.Swap(blocks=[2], attention=mh.Hydra(), ffn=mh.Compact()),
        ),
    )
    again = mh.load(mh.save(swapped, tmp_path / "swapped"))
    kept = [repr(site.attention) for site in find_host(again)[1]]
    assert kept == [
        "Softmax()",
        "Interactive(landmarks=(3, 4), mix='both')",
        "Hydra()",
    ]
    with torch.no_grad():
        assert torch.equal(again(image), swapped(image))


@pytest.mark.parametrize("dims", [(8, 16, 32), (8, 16, 40, 64)])
def test_widths_that_hold_no_whole_heads_are_refused(dims: tuple[int, ...]) -> None:
    with pytest.raises(InvalidOption, match=r"multiples of 32.*dims="):
        IVit(dims=dims)
