"""export: what cannot be written, held or traced is named, and nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import manyheads as mh
from manyheads.artifacts import open_artifact
from manyheads.errors import (
    DataError,
    ImageSizeError,
    InvalidOption,
    NotExportable,
    UnknownHost,
)
from tests.disk import small_disk
from tests.exports import small_model
from tests.helpers import tiny_vit

pytest.importorskip("onnx", reason="needs the extra: manyheads[export]")
pytest.importorskip("onnxruntime", reason="needs the extra: manyheads[export]")

# The tracer passes symbolic sizes where the type checks know only int.
pytestmark = pytest.mark.usefixtures("untyped")


@pytest.mark.parametrize(
    ("name", "options", "facts"),
    [
        ("m.onnx", {"dtype": "bfloat16"}, "CPU kernels.*bfloat16"),
        ("m.pt2", {"int8": True}, "int8 is offered for onnx, not for 'pt2'"),
        ("m.pt2", {"int8": True, "target": "aoti"}, "for onnx, not for 'aoti'"),
        ("m.onnx", {"int8": True, "dtype": "float16"}, "float32 weights"),
    ],
)
def test_what_a_target_cannot_hold_is_refused_with_the_reason(
    name: str, options: dict[str, object], facts: str, tmp_path: Path
) -> None:
    with pytest.raises(NotExportable, match=facts):
        mh.export(small_model(), tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "facts"),
    [
        ("m.bin", {}, "ending '.bin'.*model.onnx"),
        ("m.onnx", {"target": "aoti"}, "ending '.onnx'"),
        ("m.pt2", {"target": "onxx"}, "'onxx'.*Did you mean 'onnx'"),
        ("m.pt2", {"dtype": "int4"}, "'int4'.*float32"),
        ("m.pt2", {"tolerance": 0.0}, "tolerance=0.0"),
    ],
)
def test_options_that_no_export_could_use_are_refused(
    name: str, options: dict[str, object], facts: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidOption, match=facts):
        mh.export(small_model(), tmp_path / name, **options)


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotExportable, match="meta device"):
        mh.export(tiny_vit(device="meta"), tmp_path / "m.pt2")


class _Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_traced_is_refused_with_the_tracer_s_words(
    tmp_path: Path,
) -> None:
    model = tiny_vit(depth=1)
    model.norm = nn.Sequential(model.norm, _Undecided())
    with pytest.raises(NotExportable, match=r"the exporter fails: .*Guard"):
        mh.export(model, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written_are_refused_before_any_work(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.pt2").mkdir()
    with pytest.raises(NotExportable, match=r"a\.pt2, but a folder is there"):
        mh.export(small_model(), tmp_path / "a.pt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotExportable, match="cannot be written"):
        mh.export(small_model(), tmp_path / "file" / "m.pt2")
    with pytest.raises(NotExportable, match="cannot be written"):
        mh.export(small_model(), "/proc/nowhere/m.pt2")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("m.pt2", {}, id="pt2"),
        pytest.param("m.onnx", {}, id="onnx"),
        pytest.param("q.onnx", {"int8": True}, id="int8"),
        pytest.param("m.pt2", {"target": "aoti"}, id="aoti", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_named_and_nothing_is_left_on_it(
    name: str, options: dict[str, object], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk"):
        with pytest.raises(NotExportable, match=r"cannot be written.*with room"):
            mh.export(small_model(), tmp_path / "disk" / name, dynamic=False, **options)
        assert list((tmp_path / "disk").iterdir()) == []


def test_a_model_that_no_host_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownHost, match="ResNet"):
        mh.export(timm.create_model("resnet10t"), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_native_size_between_patches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageSizeError, match=r"44x64.*image_size=\(48, 64\)"):
        mh.export(small_model(), tmp_path / "m.pt2", image_size=(44, 64))
    assert list(tmp_path.iterdir()) == []


def test_opening_what_export_did_not_write_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        open_artifact(tmp_path / "none.onnx")
    for name in ("bytes.onnx", "bytes.pt2"):
        (tmp_path / name).write_bytes(b"\x00" * 100)
        with pytest.raises(DataError, match=r"cannot be opened|neither a \.pt2"):
            open_artifact(tmp_path / name)
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),))
    torch.export.save(program, tmp_path / "foreign.pt2")
    with pytest.raises(DataError, match="carries no description"):
        open_artifact(tmp_path / "foreign.pt2")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    exported = mh.export(small_model(), tmp_path / "m.pt2", dynamic=False)
    whole = exported.path.read_bytes()
    exported.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"m\.pt2"):
        open_artifact(exported.path)
