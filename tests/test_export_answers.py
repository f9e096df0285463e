"""export: class names, labels and sizes are those of the model that is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import manyheads as mh
from manyheads.artifacts import open_artifact
from manyheads.data.photographs import sample_photographs
from manyheads.running import run
from tests.helpers import tiny_vit

pytest.importorskip("onnx", reason="needs the extra: manyheads[export]")
pytest.importorskip("onnxruntime", reason="needs the extra: manyheads[export]")

# The tracer passes symbolic sizes where the type checks know only int.
pytestmark = pytest.mark.usefixtures("untyped")


@pytest.mark.parametrize("count", [3, 7])
def test_names_of_a_classifier_that_was_replaced_are_left_out(
    count: int, tmp_path: Path
) -> None:
    model = tiny_vit(depth=1, num_classes=1000)
    model.head = nn.Linear(48, count)
    path = tmp_path / "m.pt2"
    with pytest.warns(RuntimeWarning, match=f"1000 class names for {count} outputs"):
        mh.export(model, path, dynamic=False)
    assert open_artifact(path).card.labels == tuple(map(str, range(count)))
    (answer,) = run(path, sample_photographs()[0], top=5).answers
    assert len(answer.guesses) == min(5, count)
    assert all(guess.label == str(guess.index) for guess in answer.guesses)


def test_names_that_fit_are_kept(tmp_path: Path) -> None:
    path = mh.export(
        tiny_vit(depth=1, num_classes=1000), tmp_path / "m.pt2", dynamic=False
    ).path
    (answer,) = run(path, sample_photographs()[0]).answers
    assert not any(guess.label.isdigit() for guess in answer.guesses)
    assert len(open_artifact(path).card.labels) == 1000
