"""export: any size and any batch are what was promised, or the file is removed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import manyheads as mh
from manyheads.artifacts import open_artifact
from manyheads.attention import AttentionSpec
from manyheads.errors import NotExportable
from tests.helpers import assert_close, tiny_vit

pytest.importorskip("onnx", reason="needs the extra: manyheads[export]")
pytest.importorskip("onnxruntime", reason="needs the extra: manyheads[export]")

# The tracer passes symbolic sizes where the type checks know only int.
pytestmark = pytest.mark.usefixtures("untyped")


class _Frozen(nn.Module):
    """Computes with the number of tokens in a way that tracers take for a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.shape[1])


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("m.pt2", r"does not run.* == 21.*dynamic=False"),
        ("m.onnx", r"differ.* at 48x48.*removed.*dynamic=False"),
    ],
)
def test_a_size_that_was_frozen_is_found_and_the_file_removed(
    name: str, facts: str, tmp_path: Path
) -> None:
    model = tiny_vit(depth=1)
    model.norm = nn.Sequential(model.norm, _Frozen())
    with pytest.raises(NotExportable, match=facts):
        mh.export(model, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
@pytest.mark.parametrize(
    "name",
    [
        "eva02_tiny_patch14_336",
        "vit_small_patch16_dinov3",
        pytest.param("vit_pe_core_tiny_patch16_384", marks=pytest.mark.slow),
        pytest.param("vit_small_patch16_rope_mixed_224", marks=pytest.mark.slow),
    ],
)
def test_rotary_models_run_at_any_size(name: str, ending: str, tmp_path: Path) -> None:
    patch = 14 if "patch14" in name else 16
    # Of their own accord layer scales are too small for attention to show.
    scale = {"init_values": 1.0} if "dinov3" in name else {}
    sizes = {"embed_dim": 96, "depth": 1, "num_heads": 3, "num_classes": 7} | scale
    model = timm.create_model(name, img_size=4 * patch, **sizes).eval()
    path = tmp_path / f"m.{ending}"
    assert mh.export(model, path).cell == (patch, patch)
    larger = timm.create_model(name, img_size=(5 * patch, 3 * patch), **sizes).eval()
    larger.load_state_dict(_resampled(model, larger))
    images = torch.randn(3, 3, 5 * patch, 3 * patch)
    expected = larger(images).detach()
    assert_close(open_artifact(path)(images), expected, slack=5)
    if ending == "pt2":  # As someone without this package runs it, guards and all.
        assert_close(torch.export.load(path).module()(images), expected, slack=5)


class _OfTwo(nn.Module):
    """Answers for two images, whatever the batch, in a way that tracers freeze."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (float(len(x)) / 2)


@pytest.mark.parametrize("name", ["m.pt2", "m.onnx"])
def test_a_batch_that_was_frozen_is_found_at_the_native_size_alone(
    name: str, tmp_path: Path
) -> None:
    model = tiny_vit(depth=1)
    model.fc_norm = _OfTwo()
    with pytest.raises(NotExportable):
        mh.export(model, tmp_path / name, dynamic=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spec", [mh.Hydra(), mh.Hallucinated()], ids=repr)
def test_next_vit_runs_at_any_size_and_batch(
    spec: AttentionSpec, tmp_path: Path
) -> None:
    model = timm.create_model("nextvit_small", depths=(1, 1, 5, 1), num_classes=7)
    model = mh.convert(model.eval(), mh.Recipe(mh.Swap(attention=spec))).eval()
    path = mh.export(model, tmp_path / "m.pt2", image_size=(64, 64)).path
    program = torch.export.load(path).module()
    for batch, size in ((1, (64, 64)), (1, (64, 160)), (3, (96, 64))):
        images = torch.randn(batch, 3, *size)
        assert_close(program(images), model(images).detach(), slack=10)


class _Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operator gives."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        for x in given if isinstance(given, tuple | list) else [given]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return given


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": "full"}, {"stage": "logits", "rank": 2}, {"cross_map": True}],
    ids=str,
)
def test_the_program_of_hallucinated_attention_holds_no_map(
    options: dict[str, Any],
) -> None:
    recipe = mh.Recipe(mh.Swap(attention=mh.Hallucinated(**options)))
    model = mh.convert(tiny_vit(depth=1, img_size=256), recipe).eval()
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        program = torch.export.export(model, (images,), strict=False).module()
        with _Largest() as seen:
            found = program(images)
        assert_close(found, model(images), slack=5)
    tokens = 1 + (256 // 8) ** 2
    assert 0 < seen.elements < tokens**2


def _resampled(model: nn.Module, larger: nn.Module) -> dict[str, Tensor]:
    """Give the weights as timm resamples them for the size of the other model."""
    model = copy.deepcopy(model)
    model.set_input_size(img_size=larger.patch_embed.img_size)
    return model.state_dict()
