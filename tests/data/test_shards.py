"""WebDataset shards: indexed once, read anywhere, and never taken for whole if cut."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from PIL import Image

from manyheads.data import ImageSource, image_source
from manyheads.errors import DataError
from tests.helpers import tiny_vit


def encoded(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def pack(path: Path, members: Iterable[tuple[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            stored = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(stored)
            tar.addfile(info, io.BytesIO(stored))
    return path


def shard(path: Path, shades: Iterable[int], labels: Iterable[object] = ()) -> Path:
    members: list[tuple[str, bytes | str]] = []
    words = list(labels)
    for number, shade in enumerate(shades):
        members.append((f"{number:04}.png", encoded(shade)))
        if words:
            members.append((f"{number:04}.cls", f"{words[number]}\n"))
    return pack(path, members)


def open_(images: object, *, labelled: bool = True, **options: object) -> ImageSource:
    return image_source(tiny_vit(), images, labelled=labelled, **options)


def shades_of(source: ImageSource, **options: object) -> list[int]:
    batches = list(source.batches(range(len(source)), 4, **options))
    images = torch.cat([batch.images for batch in batches])
    return ((images.mean((1, 2, 3)) / 2 + 0.5) * 255).round().int().tolist()


def test_a_folder_of_shards_is_one_source_in_the_order_of_names(tmp_path: Path) -> None:
    shard(tmp_path / "train-000001.tar", [40, 50], [2, 0])
    shard(tmp_path / "train-000000.tar", [10, 20, 30], [0, 1, 2])
    shard(tmp_path / "val-000000.tar", [90], [1])
    source = open_(tmp_path)
    assert shades_of(source) == [10, 20, 30, 40, 50]
    assert source.labels.tolist() == [0, 1, 2, 2, 0]
    assert source.classes == ()
    assert shades_of(open_(tmp_path, held_out=True)) == [90]
    assert shades_of(open_(f"{tmp_path}[val]")) == [90]
    assert shades_of(open_(tmp_path / "train-000001.tar")) == [40, 50]


def test_any_position_is_read_alone_and_by_workers(tmp_path: Path) -> None:
    source = open_(shard(tmp_path / "a.tar", range(9)), labelled=False)
    order = source.order(0, 0)
    whole = [b.images for b in source.batches(order, 4, augment_seed=1)]
    late = [b.images for b in source.batches(order, 4, start=1, augment_seed=1)]
    there = [b.images for b in source.batches(order, 4, augment_seed=1, num_workers=2)]
    assert torch.equal(torch.cat(whole[1:]), torch.cat(late))
    assert torch.equal(torch.cat(whole), torch.cat(there))


def test_words_are_classes_in_sorted_order(tmp_path: Path) -> None:
    source = open_(shard(tmp_path / "a.tar", [1, 2, 3], ["owl", "cat", "owl"]))
    assert source.classes == ("cat", "owl")
    assert source.labels.tolist() == [1, 0, 1]


def test_a_missing_label_leaves_the_source_unlabelled(tmp_path: Path) -> None:
    members = [("a.png", encoded(1)), ("a.cls", "3"), ("b.png", encoded(2))]
    path = pack(tmp_path / "a.tar", members)
    assert open_(path, labelled=False).labels.tolist() == [3, -1]
    with pytest.raises(DataError, match="not every image has a label"):
        open_(path)


def test_what_is_no_sample_is_passed_over_and_a_lost_picture_is_counted(
    tmp_path: Path,
) -> None:
    members = [
        ("photos/a.seg.png.json", "{}"),
        ("photos/a.jpeg", encoded(10)),
        ("photos/b.cls", "1"),
        ("photos/c.png", b"no picture"),
        ("photos/._a.jpeg", b"what another system left"),
        ("README", "a note"),
        ("photos/d.PNG", encoded(20)),
    ]
    path = pack(tmp_path / "a.tar", members)
    source = open_(path, labelled=False, max_unreadable=0.6)
    assert shades_of(source) == [10, 20]
    assert source.skipped["a.tar:photos/b"] == "the sample has no picture"
    assert "cannot identify" in source.skipped["a.tar:photos/c"]
    with pytest.raises(DataError, match=r"2 of 4 cannot be read: a\.tar:photos/b"):
        shades_of(open_(path, labelled=False, max_unreadable=0.1))


def test_two_pictures_of_one_sample_are_refused(tmp_path: Path) -> None:
    members = [("a.left.png", encoded(1)), ("a.right.png", encoded(2))]
    with pytest.raises(DataError, match=r"a\.left\.png and a\.right\.png"):
        open_(pack(tmp_path / "a.tar", members), labelled=False)


def test_two_labels_of_one_sample_are_refused(tmp_path: Path) -> None:
    for second in ("a.cls", "a.CLS"):
        members = [("a.png", encoded(1)), ("a.cls", "1"), (second, "2")]
        with pytest.raises(DataError, match=rf"a\.cls and {second} are labels"):
            open_(pack(tmp_path / "a.tar", members), labelled=False)


def test_a_shard_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(6), range(6))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in (0, 100, 512, 700, 1500, 2000, end - 600, end - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.tar"):
            open_(path)
    path.write_bytes(whole)
    assert len(open_(path)) == 6


def test_joined_broken_or_compressed_shards_are_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(6), range(6))
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="not joined"):
        open_(path)
    broken = bytearray(whole)
    broken[512 * 6 : 512 * 7] = b"x" * 512
    path.write_bytes(broken)
    with pytest.raises(DataError, match="no member of a tar file"):
        open_(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__, "a.png")
    with pytest.raises(DataError, match="not compressed"):
        open_(path)


def test_an_archive_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 shards hold no picture"):
        open_(pack(tmp_path / "a.tar", [("a.cls", "1")]))


def test_another_content_is_another_source(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [1, 2])
    before = open_(path, labelled=False).identity
    assert open_(path, labelled=False).identity == before
    shard(path, [1, 2, 3])
    assert open_(path, labelled=False).identity != before
    before = open_(shard(path, [1, 2], [0, 1])).identity
    assert open_(shard(path, [1, 2], [1, 0])).identity != before
