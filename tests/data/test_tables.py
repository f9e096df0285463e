"""Parquet folders, data sets of the hub's cache, and Dataset objects."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from manyheads.data import ImageSource, image_source
from manyheads.errors import DataError, MissingExtra
from tests.helpers import tiny_vit

NAMES = ["cat", "dog", "owl"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write Arrow files beside the test's own and reach for no hub."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def encoded(shade: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, shade, shade)).save(file, form)
    return file.getvalue()


def table(shades: Sequence[int], **columns: object) -> datasets.Dataset:
    """Grey pictures of these shades, labelled 0, 1, 2, 0, ... unless told otherwise."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    rows = {
        "image": [{"bytes": encoded(shade), "path": None} for shade in shades],
        "label": [i % 3 for i in range(len(shades))],
    }
    for name, (values, feature) in columns.items():
        rows[name], features[name] = values, feature
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def write(path: Path, shades: Sequence[int], **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table(shades, **columns).to_parquet(path)
    return path


def shades_of(source: ImageSource) -> list[int]:
    batches = list(source.batches(range(len(source)), 4))
    images = torch.cat([batch.images for batch in batches])
    return ((images.mean((1, 2, 3)) / 2 + 0.5) * 255).round().int().tolist()


def open_(images: object, *, labelled: bool = True, **options: object) -> ImageSource:
    return image_source(tiny_vit(), images, labelled=labelled, **options)


def test_a_parquet_folder_as_the_hub_lays_it_out(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write(root / "data/train-00000-of-00002.parquet", [10, 20, 30])
    write(root / "data/train-00001-of-00002.parquet", [40, 50])
    write(root / "data/test-00000-of-00001.parquet", [90])
    (root / "README.md").write_text("a card")
    learn, measure = open_(root), open_(root, held_out=True)
    assert (learn.where, measure.where) == (f"{root}[train]", f"{root}[test]")
    assert shades_of(learn) == [10, 20, 30, 40, 50]
    assert shades_of(measure) == [90]
    assert learn.labels.tolist() == [0, 1, 2, 0, 1]
    assert learn.classes == tuple(NAMES)
    assert shades_of(open_(f"{root}[test]")) == [90]
    assert learn.identity != measure.identity
    assert learn.identity == open_(str(root)).identity


@pytest.mark.parametrize("layout", ["file", "plain", "nested"])
def test_other_places_of_parquet_files(tmp_path: Path, layout: str) -> None:
    names = {"file": "a.parquet", "plain": "set/a.parquet"}
    file = write(tmp_path / names.get(layout, "set/plain_text/train/0.parquet"), [7, 8])
    assert shades_of(open_(file if layout == "file" else tmp_path / "set")) == [7, 8]


@pytest.mark.parametrize("column", ["bytes", "struct"])
def test_parquet_files_of_other_writers(tmp_path: Path, column: str) -> None:
    pictures = [encoded(60), encoded(70)]
    values = pictures if column == "bytes" else [{"bytes": p} for p in pictures]
    plain = pa.table({"jpg": values, "label": ["owl", "cat"], "width": [40, 40]})
    pq.write_table(plain, tmp_path / "train.parquet")
    source = open_(tmp_path / "train.parquet")
    assert shades_of(source) == [60, 70]
    assert (source.classes, source.labels.tolist()) == (("cat", "owl"), [1, 0])


def test_rows_that_cannot_be_read_are_named_by_file_and_row(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write(root / "train-0.parquet", [10, 20, 30])
    made = table([40, 50, 60]).cast_column("image", datasets.Image(decode=False))
    rows = [*made["image"]]
    rows[1], rows[2] = {"bytes": b"no picture", "path": None}, None
    made = made.remove_columns("image").add_column("image", rows)
    made.cast_column("image", datasets.Image()).to_parquet(root / "train-1.parquet")
    source = open_(root, max_unreadable=0.5)
    assert shades_of(source) == [10, 20, 30, 40]
    assert set(source.skipped) == {"train-1.parquet:1", "train-1.parquet:2"}
    assert source.skipped["train-1.parquet:2"] == "the row has no picture"
    with pytest.raises(DataError, match=r"train-1\.parquet:1"):
        shades_of(open_(root, max_unreadable=0.1))


def test_a_data_set_object_and_its_rows_in_its_own_order() -> None:
    made = table([10, 20, 30, 40]).select([3, 0, 2])
    source = open_(made)
    assert shades_of(source) == [40, 10, 30]
    assert source.labels.tolist() == [0, 0, 2]
    parts = datasets.DatasetDict(train=made, validation=table([99]))
    assert shades_of(open_(parts)) == [40, 10, 30]
    assert shades_of(open_(parts, held_out=True)) == [99]
    assert shades_of(open_(made.with_format("torch"))) == [40, 10, 30]


def test_pictures_get_the_rules_of_files() -> None:
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=exif)
    made = table([0]).cast_column("image", datasets.Image(decode=False))
    rows = [{"bytes": file.getvalue(), "path": None}]
    made = made.remove_columns("image").add_column("image", rows)
    store = open_(made.cast_column("image", datasets.Image())).items.store
    assert store.name(0) == "row:0"
    with Image.open(store.open(0)) as opened:
        assert opened.getexif()[0x0112] == 6, "decoded by datasets, not here"


def test_workers_read_the_same_rows(tmp_path: Path) -> None:
    source = open_(write(tmp_path / "a.parquet", range(9)))
    order = source.order(0, 0)
    here = [b.images for b in source.batches(order, 4, augment_seed=1)]
    there = [b.images for b in source.batches(order, 4, augment_seed=1, num_workers=2)]
    assert torch.equal(torch.cat(here), torch.cat(there))


TWO = ([0, 1], datasets.ClassLabel(names=["a", "b"]))
WORDS = (["x", "y"], datasets.Value("string"))
SCORES = ([0.1, 0.2], datasets.Value("float32"))


@pytest.mark.parametrize(
    ("columns", "facts"),
    [
        ({"mask": ([None, None], datasets.Image())}, ("image, mask", "are all pict")),
        ({"coarse": TWO}, ("label, coarse", "are all labels")),
    ],
    ids=["pictures", "labels"],
)
def test_a_choice_between_columns_is_left_to_the_user(
    columns: dict[str, object], facts: Sequence[str]
) -> None:
    made = table([1, 2], **columns)
    with pytest.raises(DataError, match="a guess") as caught:
        open_(made)
    assert all(fact in str(caught.value) for fact in facts)
    assert "select_columns" in caught.value.fix
    assert len(open_(made.select_columns(["image", "label"]))) == 2


def test_labels_that_nobody_needs_may_be_ambiguous_or_absent() -> None:
    assert not open_(table([1, 2], coarse=TWO), labelled=False).labelled
    lone = table([1, 2], caption=WORDS, score=SCORES).remove_columns("label")
    assert open_(lone, labelled=False).labels is None
    with pytest.raises(DataError, match="not every image has a label"):
        open_(lone)
    hidden = table([1, 2], label=([-1, -1], datasets.ClassLabel(names=NAMES)))
    with pytest.raises(DataError, match="not every image has a label"):
        open_(hidden)


def test_a_table_without_pictures_says_what_it_has() -> None:
    made = table([1, 2], score=SCORES).remove_columns("image")
    with pytest.raises(DataError, match=r"label \(int64\), score \(float32\)"):
        open_(made)


@pytest.mark.parametrize(
    ("images", "fact"),
    [
        (lambda: table([1]).to_iterable_dataset(), "a stream"),
        (lambda: table([1]).select([]), "no row"),
        (lambda: table([1]).with_transform(lambda rows: rows), "transform of its own"),
        (lambda: datasets.DatasetDict(a=table([1]), b=table([2])), "the parts a, b"),
    ],
    ids=["stream", "empty", "transform", "parts"],
)
def test_a_data_set_that_cannot_be_numbered_is_refused(
    images: object, fact: str
) -> None:
    with pytest.raises(DataError, match=fact):
        open_(images())


def test_other_files_behind_a_table_are_another_source(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    identities = []
    for shade in (10, 20):
        Image.new("RGB", (40, 30), (shade, shade, shade)).save(path)
        made = datasets.Dataset.from_dict({"image": [str(path)]})
        source = open_(made.cast_column("image", datasets.Image()), labelled=False)
        identities.append(source.identity)
    assert identities[0] != identities[1]


def test_bad_parquet_files_and_parts_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write(root / "train.parquet", [1])
    with pytest.raises(DataError, match=r"'test' of .*, but there is train"):
        open_(f"{root}[test]")
    write(root / "extra.parquet", [1])
    with pytest.raises(DataError, match=r"extra\.parquet says no such word"):
        open_(root)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"broken\.parquet, but Arrow"):
        open_(tmp_path / "broken.parquet")


def test_a_hub_data_set_comes_from_the_cache_when_there_is_no_network(
    tmp_path: Path,
) -> None:
    """The cache is laid out as datasets writes it when it fetches owner/name."""
    folder = tmp_path / "cache/owner___name/default/0.0.0/0123456789abcdef"
    for split, shades in (("train", [10, 20, 30]), ("test", [90])):
        builder = datasets.load_dataset(
            "parquet",
            data_files={split: str(write(tmp_path / f"{split}.parquet", shades))},
            cache_dir=tmp_path / "made",
        )
        (file,) = builder[split].cache_files
        folder.mkdir(parents=True, exist_ok=True)
        Path(file["filename"]).rename(folder / f"name-{split}.arrow")
        info = builder[split].info
    info.dataset_name, info.config_name = "name", "default"
    info.splits = {
        split: datasets.SplitInfo(name=split, num_examples=n, dataset_name="name")
        for split, n in (("train", 3), ("test", 1))
    }
    info.write_to_directory(folder)
    source = open_("hub:owner/name")
    assert source.where == "hub:owner/name[train]"
    assert shades_of(source) == [10, 20, 30]
    assert shades_of(open_("hub:owner/name", held_out=True)) == [90]
    assert shades_of(open_("hub:owner/name[train[1:]]")) == [20, 30]
    with pytest.raises(DataError, match=r"hub:owner/name, but .*nothing"):
        open_("hub:owner/name[nothing]")


def test_a_hub_out_of_reach_says_so_and_what_to_do() -> None:
    with pytest.raises(DataError, match="hub:owner/absent") as caught:
        open_("hub:owner/absent")
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
    assert ".parquet" in caught.value.fix


@pytest.mark.parametrize("name", ["", " ", "[train]", "owner/", "a/b/c/d"])
def test_what_is_no_name_of_a_hub_data_set_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="is no name of a data set") as caught:
        open_(f"hub:{name}")
    assert '"hub:uoft-cs/cifar10"' in caught.value.fix


def test_without_datasets_the_pip_line_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [1])
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from manyheads.data import image_source\n"
        "from tests.helpers import tiny_vit\n"
        "image_source(tiny_vit(), sys.argv[1], labelled=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.parquet")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert MissingExtra.__name__ in done.stderr
    assert 'pip install "manyheads[train]"' in done.stderr
