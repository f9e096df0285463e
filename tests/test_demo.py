"""The demo in its quick form: it composes the verbs and writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import manyheads as mh
from manyheads.cli import main
from manyheads.demo import demo
from manyheads.demo.findings import Demo
from manyheads.errors import CheckpointError


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return demo(tmp_path_factory.mktemp("runs") / "demo", quick=True)


def test_it_records_the_stated_format(found: Demo) -> None:
    recorded = json.loads((found.folder / "demo.json").read_text())
    assert (recorded["format"], recorded["version"]) == ("manyheads.demo", 1)
    columns = {
        "model",
        "accuracy_before",
        "accuracy_swapped",
        "accuracy_healed",
        "parameters",
        "flops",
        "latency_ms",
        "peak_mib",
    }
    assert all(columns <= set(row) for row in recorded["rows"])
    assert recorded["conditions"]["large_weights"] == "random"


def test_the_softmax_teacher_comes_first_and_is_not_swapped(found: Demo) -> None:
    teacher, last, every = found.rows
    assert teacher.accuracy_swapped is None
    assert teacher.accuracy_healed is None
    assert 0 <= teacher.accuracy_before <= 1
    assert teacher.parameters == last.parameters == every.parameters
    assert teacher.flops > last.flops > every.flops
    assert None not in (last.accuracy_healed, every.accuracy_healed)


def test_the_large_model_is_counted_softmax_first_at_every_size(found: Demo) -> None:
    sizes = [row.image_size for row in found.large]
    assert sizes == [(32, 32), (32, 32), (40, 56), (40, 56)]
    for softmax, hydra in zip(found.large[::2], found.large[1::2], strict=True):
        assert softmax.flops > hydra.flops
        assert softmax.latency_ms > 0


def test_the_healed_model_reloads_as_hydra_in_all_blocks(found: Demo) -> None:
    student = mh.load(found.folder / "student")
    preview = mh.preview(student, mh.Recipe(mh.Swap(attention=mh.Hydra(kernel="mean"))))
    assert {row.was for row in preview.rows} == {"Hydra()"}
    with torch.no_grad():
        assert student(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_the_plot_is_a_picture(found: Demo) -> None:
    with Image.open(found.folder / "demo.png") as plot:
        assert plot.format == "PNG"
        assert min(plot.size) > 400


def test_it_prints_each_cost_with_its_ratio_and_names_random_weights(
    found: Demo,
) -> None:
    text = str(found)
    assert "(1.00)" in text
    assert "random weights" in text
    assert str(found.folder) in text
    assert all(row.model in text for row in (*found.rows, *found.large))


def test_nothing_else_is_left_in_the_folder(found: Demo) -> None:
    names = sorted(path.name for path in found.folder.iterdir())
    pictures = ["demo.png", "maps_1.png", "maps_2.png"]
    assert names == ["demo.json", *pictures, "report.html", "student"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        demo(tmp_path / "file" / "demo", quick=True)
    assert main(["demo", "--quick", "--out", str(tmp_path / "file")]) == 2
    assert "1/5" not in capsys.readouterr().err


def test_the_maps_show_teacher_swapped_and_healed_beside_the_digit(
    found: Demo,
) -> None:
    first, second = (
        Image.open(found.folder / f"maps_{number}.png") for number in (1, 2)
    )
    # Four square panels and a colour bar across, three blocks down.
    assert 1.0 < first.width / first.height < 1.3
    assert first.size == second.size
    assert first.tobytes() != second.tobytes()


def test_it_ends_with_a_page_that_shows_all_of_it(found: Demo) -> None:
    page = (found.folder / "report.html").read_text()
    assert str(found).endswith(f"Open {found.folder / 'report.html'} to see it all.")
    assert page.count('<img alt="') == 3
    assert page.count("before and after healing</figcaption>") == 2
    assert all(row.model in page for row in found.rows)
