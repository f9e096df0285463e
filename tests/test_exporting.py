"""export: what is written does what the model does, or is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import manyheads as mh
from manyheads.artifacts import Card, open_artifact
from manyheads.attention import MECHANISMS, AttentionSpec
from manyheads.data import digits
from manyheads.data.photographs import prepare_files, sample_photographs
from manyheads.errors import (
    ImageSizeError,
    NotExportable,
)
from manyheads.exporting import Exported
from manyheads.hosts import find_host
from tests.exports import each_target, file_for, small_model
from tests.helpers import assert_close, tiny_vit

onnx = pytest.importorskip("onnx", reason="needs the extra: manyheads[export]")
pytest.importorskip("onnxruntime", reason="needs the extra: manyheads[export]")

# The tracer passes symbolic sizes where the type checks know only int.
pytestmark = pytest.mark.usefixtures("untyped")

# The default landmarks want more patches than a tiny image has.
SMALL: dict[type[AttentionSpec], AttentionSpec] = {
    mh.Interactive: mh.Interactive(landmarks=(2, 2))
}


@each_target
@pytest.mark.parametrize("kind", MECHANISMS, ids=lambda kind: kind.__name__)
def test_every_mechanism_reaches_every_target_at_any_size(
    kind: type[AttentionSpec], target: str, tmp_path: Path
) -> None:
    spec = SMALL.get(kind, kind())
    model = small_model(spec)
    path = file_for(tmp_path, target)
    exported = mh.export(model, path, target=target)
    assert exported.target == target
    assert exported.cell == (8, 8)
    sizes = [check.image_size for check in exported.checks]
    assert sizes == [(32, 32), (48, 48), (32, 48)]
    assert all(check.difference <= 1e-4 for check in exported.checks)
    # Sizes that the verification did not look at, and another batch.
    artifact = open_artifact(path)
    reference = small_model(spec, dynamic_img_size=True)
    reference.load_state_dict(model.state_dict())
    images = torch.randn(3, 3, 72, 24)
    assert_close(artifact(images), reference(images).detach(), slack=5)


@pytest.mark.parametrize(
    ("target", "dtype"), [("pt2", "float16"), ("pt2", "bfloat16"), ("onnx", "float16")]
)
def test_half_types_stay_within_their_tolerance(
    target: str, dtype: str, tmp_path: Path
) -> None:
    exported = mh.export(small_model(), file_for(tmp_path, target), dtype=dtype)
    assert exported.dtype == dtype
    assert 1e-6 < max(c.difference for c in exported.checks) <= exported.tolerance
    outputs = open_artifact(exported.path)(torch.randn(1, 3, 32, 32))
    assert outputs.dtype == getattr(torch, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("onnx", {"dtype": "float16"}),
        ("onnx", {"int8": True}),
        ("pt2", {"dtype": "float16"}),
        ("pt2", {"dtype": "bfloat16"}),
        ("aoti", {"dtype": "float16"}),
        ("aoti", {"dtype": "bfloat16"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", MECHANISMS, ids=lambda kind: kind.__name__)
def test_every_mechanism_reaches_every_small_type(
    kind: type[AttentionSpec],
    target: str,
    options: dict[str, object],
    tmp_path: Path,
) -> None:
    model = small_model(SMALL.get(kind, kind()))
    exported = mh.export(model, file_for(tmp_path, target), target=target, **options)
    assert exported.cell == (8, 8)
    assert len(exported.checks) == 3
    assert all(c.difference <= exported.tolerance / 4 for c in exported.checks)


@pytest.mark.parametrize("target", ["pt2", "onnx"])
def test_the_file_says_what_it_is(target: str, tmp_path: Path) -> None:
    model = small_model()
    told = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    told |= {"interpolation": "bilinear", "crop_pct": 0.8}
    model.pretrained_cfg |= told
    exported = mh.export(model, file_for(tmp_path, target), dynamic=False)
    card = open_artifact(exported.path).card
    assert card.recipe == mh.Recipe.from_dict(card.recipe).to_dict()
    assert card.labels == tuple(map(str, range(10)))
    assert card.image.mean == told["mean"]
    assert card.image.std == told["std"]
    assert card.image.interpolation == "bilinear"
    assert card.image.crop == 0.8
    assert card.image.size == card.smallest == (32, 32)
    made = ["manyheads", "torch", "timm"]
    made += ["onnx", "onnxscript", "onnxruntime"] if target == "onnx" else []
    assert card.versions == {name: version(name) for name in made}
    assert Card.from_json(card.to_json(), where="here") == card
    again = json.loads(json.dumps(exported.to_json()))
    assert again["checks"][0]["image_size"] == [32, 32]
    assert "native size only: dynamic=False" in str(exported)


def test_the_onnx_file_carries_its_card_where_onnx_keeps_such_things(
    tmp_path: Path,
) -> None:
    mh.export(small_model(), tmp_path / "m.onnx")
    written = onnx.load(tmp_path / "m.onnx")
    properties = {p.key: p.value for p in written.metadata_props}
    assert json.loads(properties["manyheads.json"])["format"] == "manyheads.exported"
    shape = written.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in shape] == ["batch", "", "8*rows", "8*columns"]


def test_a_file_runs_where_this_package_is_not_installed(tmp_path: Path) -> None:
    model, images = small_model(), torch.randn(2, 3, 32, 48)
    path = mh.export(model, tmp_path / "m.pt2").path
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['manyheads'] = None\n"
        "program = torch.export.load('m.pt2').module()\n"
        "torch.save(program(torch.load('images.pt')), 'outputs.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    outputs = torch.load(tmp_path / "outputs.pt")
    assert_close(outputs, open_artifact(path)(images))


class _Remembering(nn.Module):
    """Counts its calls in Python, which no tracer can see."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_a_file_that_answers_something_else_is_removed_and_named(
    tmp_path: Path,
) -> None:
    model = tiny_vit(depth=1)
    model.fc_norm = _Remembering()
    with pytest.raises(NotExportable, match=r"differ.* at 48x48.*removed.*another"):
        mh.export(model, tmp_path / "wrong.pt2")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_all_zero_are_no_comparison(tmp_path: Path) -> None:
    model = tiny_vit(depth=1)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    with pytest.warns(RuntimeWarning, match="at 32x32 are 0.*trained weights"):
        exported = mh.export(model, tmp_path / "m.pt2", dynamic=False)
    assert [check.largest for check in exported.checks] == [0.0, 0.0]


def test_a_tolerance_that_nothing_meets_refuses_and_keeps_what_was_there(
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(b"mine")
    with pytest.raises(NotExportable, match=r"at 32x32.*1e-30 is allowed.*removed"):
        mh.export(small_model(), path, tolerance=1e-30)
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


class _Branchy(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)  # type: ignore[return-value]

    def fuse(self) -> nn.Module:
        plain = nn.Linear(*self.branches[0].weight.shape)
        with torch.no_grad():
            plain.weight.copy_(sum(b.weight for b in self.branches))
            plain.bias.copy_(sum(b.bias for b in self.branches))
        return plain


def test_branches_are_folded_and_the_model_keeps_its_own(tmp_path: Path) -> None:
    model = tiny_vit(depth=1)
    model.fc_norm = _Branchy(48)
    exported = mh.export(model, tmp_path / "m.pt2")
    assert exported.folded == 1
    assert isinstance(model.fc_norm, _Branchy)
    assert "1 branched layers folded" in str(exported)
    program = torch.export.load(exported.path)
    assert not any("branches" in name for name in program.state_dict)


def test_the_model_is_not_touched(tmp_path: Path) -> None:
    model = small_model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mh.export(model, tmp_path / "m.pt2", dtype="float16")
    assert model.training
    assert not model.dynamic_img_size
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_int8_states_its_accuracy_on_labelled_images(tmp_path: Path) -> None:
    model = small_model()
    images = prepare_files(sample_photographs() * 10, _image(model))
    labels = model(images).argmax(dim=-1)
    path = tmp_path / "m.onnx"
    exported = mh.export(model, path, int8=True, images=(images, labels))
    assert exported.labelled is not None
    assert exported.labelled.images == 20
    assert exported.labelled.accuracy_model == 1.0
    assert 0 <= exported.labelled.accuracy_file <= 1.0
    assert "accuracy on 20 labelled images: model 100.00 %" in str(exported)
    assert "(allowed 0.25)" in str(exported)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("MatMulInteger") >= 8


def test_a_folder_with_classes_counts_as_labelled(tmp_path: Path) -> None:
    for number, file in enumerate(sample_photographs()):
        (tmp_path / "photos" / str(number)).mkdir(parents=True)
        os.symlink(file, tmp_path / "photos" / str(number) / file.name)
    exported = mh.export(
        small_model(), tmp_path / "m.pt2", images=tmp_path / "photos", dynamic=False
    )
    assert exported.labelled is not None
    assert exported.labelled.accuracy_file == exported.labelled.accuracy_model
    assert exported.conditions["photographs"] == ("0/china.jpg", "1/flower.jpg")


def test_a_size_between_patches_is_padded_as_the_library_pads(tmp_path: Path) -> None:
    padded = mh.export(small_model(), tmp_path / "m.pt2")
    reference = small_model(dynamic_img_size=True, dynamic_img_pad=True)
    artifact = open_artifact(padded.path)
    reference.load_state_dict(_state(artifact, reference))
    images = torch.randn(1, 3, 35, 46)
    assert_close(artifact(images), reference(images).detach(), slack=5)


def test_a_fixed_file_names_the_size_it_takes(tmp_path: Path) -> None:
    path = mh.export(small_model(), tmp_path / "m.pt2", dynamic=False).path
    with pytest.raises(ImageSizeError, match=r"48x32.*exported for 32x32 only"):
        open_artifact(path)(torch.randn(1, 3, 48, 32))


@each_target
def test_another_native_size_is_what_the_file_takes(
    target: str, tmp_path: Path
) -> None:
    model = small_model()
    path = file_for(tmp_path, target)
    exported = mh.export(model, path, target=target, dynamic=False, image_size=(48, 64))
    assert [(c.image_size, c.images) for c in exported.checks] == [
        ((48, 64), 2),
        ((48, 64), 1),
    ]
    artifact = open_artifact(path)
    assert artifact.card.image.size == (48, 64)
    reference = small_model(dynamic_img_size=True)
    reference.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 48, 64)
    assert_close(artifact(images), reference(images).detach(), slack=5)
    assert model.patch_embed.img_size == (32, 32)


def test_int8_keeps_the_accuracy_of_a_trained_model(tmp_path: Path) -> None:
    (images, labels), (held_out, answers) = digits(image_size=32)
    model = tiny_vit(depth=1, embed_dim=32, class_token=False, global_pool="avg")
    mh.train(
        model,
        (images, labels),
        epochs=20,
        learning_rate=5e-3,
        warmup_epochs=0.5,
        progress=False,
    )
    exported = mh.export(
        model.eval(), tmp_path / "m.onnx", int8=True, images=(held_out, answers)
    )
    found = exported.labelled
    assert found is not None
    assert found.images == len(answers)
    assert found.accuracy_model > 0.75
    assert abs(found.accuracy_file - found.accuracy_model) < 0.02
    plain = mh.export(model, tmp_path / "plain.onnx")
    assert exported.size_mib < plain.size_mib


def test_exported_is_the_result_type(tmp_path: Path) -> None:
    exported = mh.export(small_model(), tmp_path / "new" / "m.pt2", dynamic=False)
    assert isinstance(exported, Exported)
    assert exported.path.stat().st_mode & 0o444
    assert exported.path.parent.name == "new"


def _image(model: nn.Module) -> object:
    return find_host(model)[0].image_input(model)


def _state(artifact: object, like: nn.Module) -> dict[str, Tensor]:
    state = artifact._program.state_dict()  # type: ignore[attr-defined]
    return {key: state[f"model.{key}"] for key in like.state_dict()}
