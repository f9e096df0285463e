"""The accuracy study on a data set of forty pictures: cells, resuming, tables."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import timm
import torch
from benchmarks.accuracy import __main__ as study
from benchmarks.accuracy.budget import healing_work, images_within, training_work
from benchmarks.accuracy.cases import CASES, CIFAR10, MODELS, Case
from benchmarks.accuracy.pictures import MissingData, Views, read_data
from benchmarks.accuracy.records import OtherCase, is_recorded, read
from benchmarks.accuracy.table import accuracy_table, healing_table
from benchmarks.tables import TABLES
from PIL import Image

from manyheads import Hydra, Recipe, Swap, cost, load, save
from manyheads.loop.weights import fingerprint
from tests.helpers import tiny_vit

TINY = replace(
    CIFAR10,
    train_images=24,
    epochs=20,
    model=(
        *(p for p in CIFAR10.model if p[0] not in ("embed_dim", "patch_size")),
        ("embed_dim", 16),
        ("patch_size", 16),
    ),
    batch_size=8,
    calibration_images=8,
    healing_share=0.5,
)
FEW = (("refit_images", 8),)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet files as the real ones are: a struct with the bytes, and a label."""
    folder = tmp_path_factory.mktemp("cifar10")
    chance = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 16)):
        images = []
        for _ in range(count):
            pixels = chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="png")
            images.append({"bytes": buffer.getvalue(), "path": None})
        labels = [number % 10 for number in range(count)]
        table = arrow.table({"image": images, "label": labels})
        parquet.write_table(table, folder / f"{part}-00000-of-00001.parquet")
    return folder


def tiny(model: str, treatment: str, **changes: Any) -> Case:
    recipe = MODELS[model][0] if model in MODELS else None
    fields: dict[str, Any] = {"recipe": recipe}
    if treatment == "healed":
        fields["heal"] = FEW
    return Case(
        setting=TINY,
        model=model,
        treatment=treatment,  # type: ignore[arg-type]
        **fields | changes,
    )


CELLS = (
    tiny("teacher", "teacher"),
    tiny("hydra_all", "converted"),
    tiny("hydra_all", "calibrated"),
    tiny("hydra_all", "healed", target=6.0),
    tiny(
        "hydra_all",
        "progressive",
        kind="healing",
        variant="last_blocks_first",
        heal=(*FEW, ("block_epochs", 0), ("logit_epochs", 1)),
        order=((4, 5), (0, 1, 2, 3)),
    ),
    tiny(
        "hydra_all",
        "resized",
        kind="healing",
        variant="at_48_pixels_correction_on",
        recipe=Recipe(Swap(attention=Hydra(reference_tokens=5))),
        size=48,
    ),
    tiny("compact", "scratch"),
)


@pytest.fixture(scope="module")
def done(cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    assert study.main(arguments(cifar, folder), cases=CELLS) == 0
    return folder


def arguments(cifar: Path, folder: Path, *more: str) -> list[str]:
    out, runs = str(folder / "out"), str(folder / "runs")
    given = ["--data-cifar10", str(cifar), "--out", out, "--runs", runs]
    return [*given, "--seeds", "0", *more]


def test_every_cell_is_recorded_with_all_that_it_stands_on(done: Path) -> None:
    records = {r["case"]["name"]: r for r in read(done / "out")}
    assert set(records) == {cell.name for cell in CELLS}
    teacher = records["cifar10-teacher"]
    for record in records.values():
        assert record["format"] == "manyheads.accuracy"
        assert record["seed"] == 0
        assert record["data"]["train_images"] == 24
        assert 0 <= record["top1"] <= 1
        assert record["conditions"]["torch"]
        if record is not teacher:
            assert record["teacher_weights"] == teacher["weights"]
        if record["case"].get("size", 32) == 48:
            continue
        if record is not teacher:
            assert record["teacher_top1"] == teacher["top1"]
            assert record["teacher_work"] == teacher["work"]["multiply_adds"]
    for name in ("cifar10-hydra_all-healed", "cifar10-hydra_all-progressive-"):
        [record] = [r for n, r in records.items() if n.startswith(name)]
        assert 0 < record["work"]["multiply_adds"] <= 0.5 * record["teacher_work"]
    assert records["cifar10-hydra_all-converted"]["work"]["multiply_adds"] == 0


def test_models_of_the_table_are_saved(done: Path) -> None:
    for cell in CELLS:
        if cell.treatment == "resized":
            continue
        model = load(done / "runs" / "models" / f"{cell.name}-seed0")
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_cell_that_is_recorded_is_not_run_again(
    done: Path, cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "out").iterdir()}
    assert study.main(arguments(cifar, done), cases=CELLS) == 0
    assert capsys.readouterr().out == ""
    after = {path: path.stat().st_mtime_ns for path in (done / "out").iterdir()}
    assert after == before


def test_a_cell_recorded_with_other_settings_is_an_error(
    done: Path, cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(CELLS[3], heal=(("refit_images", 4),))
    with pytest.raises(OtherCase, match="another heal"):
        is_recorded(done / "out", other, 0)
    assert study.main(arguments(cifar, done), cases=[other]) == 2
    assert "healed-seed0.json" in capsys.readouterr().err


@pytest.fixture
def moved(done: Path, tmp_path: Path) -> Path:
    """The records of the study without the models: what another checkout has."""
    shutil.copytree(done / "out", tmp_path / "out")
    return tmp_path


def test_a_resized_cell_heals_the_model_again_that_it_takes(
    done: Path, moved: Path, cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resized = next(cell for cell in CELLS if cell.treatment == "resized")
    record = moved / "out" / f"{resized.name}-seed0.json"
    expected = json.loads(record.read_text())
    record.unlink()
    told = arguments(cifar, moved, "--only", "resized")
    assert study.main(told, cases=CELLS) == 0
    assert capsys.readouterr().err == ""
    found = json.loads(record.read_text())
    for name in ("weights", "teacher_weights", "top1", "teacher_top1"):
        assert found[name] == expected[name]
    remade = {path.name for path in (moved / "runs" / "models").iterdir()}
    assert remade == {"cifar10-teacher-seed0", "cifar10-hydra_all-healed-seed0"}
    before = {p.name for p in (done / "out").iterdir()}
    assert {p.name for p in (moved / "out").iterdir()} == before


def test_a_resized_cell_needs_a_healed_one_of_its_own_setting(cifar: Path) -> None:
    resized = next(cell for cell in CELLS if cell.treatment == "resized")
    with pytest.raises(OtherCase, match="needs a cell cifar10-hydra_all-healed"):
        study._healed_of(resized, [resized])
    assert study._healed_of(resized, CELLS) == CELLS[3]
    for cell in CASES:
        if cell.treatment == "resized":
            assert study._healed_of(cell, [cell]) in CASES


@pytest.mark.parametrize("gone", ["", "cifar10-teacher-seed0.json"])
def test_another_teacher_under_the_same_seed_is_an_error(
    moved: Path, cifar: Path, gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (moved / "out" / "cifar10-hydra_all-healed-seed0.json").unlink()
    other = tiny_vit(embed_dim=16, patch_size=16, depth=6)
    save(other, moved / "runs" / "models" / "cifar10-teacher-seed0")
    if gone:
        (moved / "out" / gone).unlink()
    before = {p.name for p in (moved / "out").iterdir()}
    told = arguments(cifar, moved, "--only", "hydra_all-healed")
    assert study.main(told, cases=CELLS) == 2
    said = capsys.readouterr().err
    recorded = read(moved / "out")[0]
    taught = recorded["teacher_weights"] or recorded["weights"]
    for fact in (fingerprint(other, values=True), taught, "give another --out"):
        assert fact in said
    assert {p.name for p in (moved / "out").iterdir()} == before


def test_a_teacher_trained_again_is_compared_with_what_stands_on_it(
    moved: Path, cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = moved / "out" / "cifar10-hydra_all-converted-seed0.json"
    told = json.loads(record.read_text()) | {"teacher_weights": "0123456789abcdef"}
    record.write_text(json.dumps(told))
    teacher = moved / "out" / "cifar10-teacher-seed0.json"
    teacher.unlink()
    only = arguments(cifar, moved, "--only", "teacher")
    assert study.main(only, cases=CELLS) == 2
    assert "0123456789abcdef" in capsys.readouterr().err
    assert not teacher.exists()


def test_what_there_is_and_what_is_done_can_be_listed(
    done: Path, cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (*CELLS, tiny("hydra_last2", "converted"))
    told = arguments(cifar, done, "--list", "--only", "converted")
    assert study.main(told, cases=more) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4].strip() for line in lines] == ["done", ""]


def test_a_word_in_no_cell_s_name_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--out", str(tmp_path), "--only", "hydra", "--only", "hidra"]
    assert study.main(told, cases=CELLS) == 2
    assert "no cell has 'hydra' and 'hidra'" in capsys.readouterr().err


def test_data_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MANYHEADS_CIFAR10", raising=False)
    told = ["--out", str(tmp_path), "--runs", str(tmp_path)]
    assert study.main(told, cases=CELLS) == 2
    assert "--data-cifar10 FOLDER" in capsys.readouterr().err
    with pytest.raises(MissingData, match=r"no train-\*\.parquet"):
        read_data("cifar10", str(tmp_path))
    with pytest.raises(MissingData, match=r"train-images-idx3-ubyte\.gz"):
        read_data("fashion", str(tmp_path))


def test_grey_garments_are_padded_and_shown_in_three_channels(tmp_path: Path) -> None:
    for stem, count in (("train", 3), ("t10k", 2)):
        pixels = np.full((count, 28, 28), 200, dtype=np.uint8).tobytes()
        with gzip.open(tmp_path / f"{stem}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + pixels)
        with gzip.open(tmp_path / f"{stem}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + bytes(range(count)))
    data = read_data("fashion", str(tmp_path))
    images, labels = data.train
    assert images.shape == (3, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2]
    assert (images[:, :, 2:30, 2:30] == 200).all()
    assert images[:, :, :2].sum() == 0


def test_views_are_the_same_every_time_and_each_picture_comes_equally_often() -> None:
    images = torch.arange(5 * 3 * 32 * 32).reshape(5, 3, 32, 32).remainder(251).byte()
    pictures = (images, torch.arange(5))
    views = Views(pictures, count=15, seed=3)
    again = Views(pictures, count=15, seed=3)
    labels = [views[number][1] for number in range(15)]
    assert sorted(labels) == sorted(list(range(5)) * 3)
    for number in range(15):
        assert torch.equal(views[number][0], again[number][0])
    plain = Views(pictures, labelled=False)
    torch.testing.assert_close(plain.tensor(), images.float() / 127.5 - 1)


def test_work_is_counted_in_forward_passes() -> None:
    teacher = tiny_vit()
    forward = cost(teacher).flops
    assert training_work(teacher, 10) == 30 * forward
    assert healing_work(teacher, teacher, 10, looked_at=3) == 46 * forward
    assert images_within(teacher, teacher, 46.5 * forward, 2, 3) == 5


def test_tables_show_misses_and_what_is_not_there_yet(done: Path) -> None:
    records = read(done / "out")
    for record in records:
        if record["case"]["name"] == "cifar10-hydra_all-healed":
            record["top1"] = record["teacher_top1"] - 0.07
    table = accuracy_table(records)
    [row] = [line for line in table.splitlines() if line.startswith("| hydra_all")]
    assert "-7.00 (one seed)" in row
    assert "-6: missed !" in row
    [row] = [line for line in table.splitlines() if line.startswith("| compact")]
    assert row.count(" - ") == 4
    for record in records:
        if record["teacher_top1"] is not None:
            record["top1"] = record["teacher_top1"]
    assert "-6: met" in accuracy_table(records)
    [healed] = [r for r in records if r["case"]["name"] == "cifar10-hydra_all-healed"]
    pair = [healed | {"top1": 0.5424 - b, "teacher_top1": 0.5424} for b in (0.07, 0.05)]
    assert "-6: met" in accuracy_table(pair)
    pair[0]["top1"] -= 0.0002
    assert "-6: missed !" in accuracy_table(pair)
    ways = healing_table(records)
    assert "| last_blocks_first |" in ways
    beside = json.loads(json.dumps(healed))
    beside["case"]["variant"], beside["top1"] = "batch_64", beside["teacher_top1"] - 0.5
    table = accuracy_table([*records, beside])
    [row] = [line for line in table.splitlines() if line.startswith("| hydra_all")]
    assert "| +0.00 (one seed) | -6: met | -50.00 (one seed) |" in row
    assert "| batch_64 |" in healing_table([*records, beside])
    assert "| as in the table of accuracies |" in ways
    assert accuracy_table([]) == healing_table([]) == "Not recorded yet."
    assert {"accuracy", "healing"} <= set(TABLES)


def test_names_of_cells_are_unique_and_every_target_of_the_study_is_there() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    targets = {c.model: c.target for c in CASES if c.target is not None}
    assert targets["hydra_last2"] == targets["hallucinated_compact"] == 1.0
    assert targets["interactive_after"] == 2.0
    assert targets["hydra_all"] == 6.0
    for case in CASES:
        json.dumps(case.to_json())
    assert timm.is_model("vit_tiny_patch16_224")
