"""What is drawn can be read: titles, labels, the colour bar, one common scale."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra: manyheads[draw]")

from matplotlib.backends.backend_agg import FigureCanvasAgg

import manyheads as mh
from manyheads.data.photographs import sample_photographs
from manyheads.drawing import compose
from manyheads.maps import Maps
from tests.helpers import tiny_vit


def _maps(*blocks: int, **options: object) -> Maps:
    """Maps of a model of which some blocks are converted."""
    torch.manual_seed(0)
    model = tiny_vit(depth=2)
    if blocks:
        model = mh.convert(model, mh.Recipe(mh.Swap(blocks=blocks, attention=_WORDY)))
    options = {"heads": range(2), "queries": [0]} | options
    return mh.attention_maps(model, list(sample_photographs()), **options)


_WORDY = mh.Hallucinated(kernel_size=5, rank=2, exempt_prefix=False)


def _titles(figure: Any) -> list[str]:
    return [title for axes in figure.axes if (title := axes.get_title())]


def _bars(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_ylabel() == "x average patch"]


def _scales(figure: Any) -> list[tuple[float, float]]:
    """Give the scale of every map: the second picture in its place, over the photo."""
    laid = [axes.images[1] for axes in figure.axes if len(axes.images) == 2]
    return [picture.get_clim() for picture in laid]


def test_blocks_heads_and_what_looks_are_written_above() -> None:
    figure = compose(_maps(), title="tiny, china.jpg")
    assert figure.get_suptitle() == "tiny, china.jpg\nseen by the class token"
    row = ["all heads", "head 0", "head 1"]
    assert _titles(figure) == ["block 0\nSoftmax()", *row, "block 1\nSoftmax()", *row]
    seen = compose(_maps(queries=[5]), query=5).get_suptitle()
    assert seen == "seen by patch 4"


def test_a_column_for_each_model_names_it_and_its_mechanism() -> None:
    figure = compose({"teacher": _maps(), "student": _maps(1)})
    flat = [title.replace("\n", " ") for title in _titles(figure)]
    assert flat == [
        *("block 0", "teacher Softmax()", "student Softmax()"),
        *("block 1", "teacher Softmax()", f"student {_WORDY!r}"),
    ]


@pytest.mark.parametrize("compared", [False, True], ids=["heads", "models"])
def test_pictures_that_one_compares_share_a_scale_with_the_bar(compared: bool) -> None:
    plain, student = _maps(), _maps(0)
    assert not torch.equal(plain.blocks[0].influence, student.blocks[0].influence)
    figure = compose({"teacher": plain, "student": student} if compared else student)
    each = 2 if compared else 3
    scales, bars = _scales(figure), _bars(figure)
    assert len(scales) == 2 * each
    assert len(bars) == 2
    for row, bar in enumerate(bars):
        low, high = scales[row * each]
        assert scales[row * each : (row + 1) * each] == [(low, high)] * each
        assert bar.get_ylim() == pytest.approx((low, high))
        assert low <= 0 < high


def test_maps_of_both_signs_are_white_where_nothing_is_said() -> None:
    student = _maps(1)
    block = student.blocks[1]
    block.maps.neg_()
    figure = compose(student)
    (low, high) = _scales(figure)[-1]
    assert low == -high


@pytest.mark.parametrize(
    "name",
    ["student", "vit_small_patch16_224.augreg_in21k_ft_in1k", "/a/long/folder" * 4],
    ids=["short", "timm", "path"],
)
@pytest.mark.parametrize("compared", [False, True], ids=["heads", "models"])
def test_no_word_is_cut_off_or_written_over_another(compared: bool, name: str) -> None:
    student = _maps(0)
    maps = {f"{name}/teacher": _maps(), name: student} if compared else student
    figure = compose(maps, title=f"{name}, china.jpg")
    FigureCanvasAgg(figure).draw()
    whole = figure.bbox
    rows: dict[int, list[Any]] = {}
    for axes in figure.axes:
        if axes.get_title():
            box = axes.title.get_window_extent()
            rows.setdefault(round(axes.get_position().y0, 3) * 1000, []).append(box)
    above = figure._suptitle.get_window_extent()
    for box in [above, *(box for row in rows.values() for box in row)]:
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    assert len(rows) == 2
    for row in rows.values():
        assert all(a.x1 < b.x0 for a, b in pairwise(sorted(row, key=lambda b: b.x0)))
        assert all(box.y1 <= above.y0 for box in row)
