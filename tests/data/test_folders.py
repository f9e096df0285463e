"""Folders as they lie on real disks: links, and files of several kinds."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from PIL import Image

from manyheads import Hydra, Recipe, Swap, convert, heal, train
from manyheads.data import image_source
from manyheads.errors import DataError
from tests.helpers import tiny_vit

QUICK = {"batch_size": 4, "progress": False}


def paint(path: Path, shade: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (shade, shade, shade)).save(path)
    return path


def two_classes(root: Path) -> Path:
    for name in ("a", "b"):
        for number in range(3):
            paint(root / name / f"{number}.png")
    return root


def read(images: object) -> list[str]:
    """Read all pictures of a source and name them."""
    source = image_source(tiny_vit(), images, labelled=False)
    list(source.batches(range(len(source)), 4))
    return [source.items.name(position) for position in range(len(source))]


def test_a_link_to_nothing_is_an_unreadable_picture(tmp_path: Path) -> None:
    folder = two_classes(tmp_path / "pictures")
    (folder / "a" / "x.png").symlink_to(tmp_path / "gone.png")
    (folder / "b" / "round.png").symlink_to("round.png")
    teacher = tiny_vit(num_classes=2)
    student = convert(teacher, Recipe(Swap(attention=Hydra())))
    trained = train(teacher, folder, epochs=1, max_unreadable=0.25, **QUICK)
    healed = heal(
        student, teacher, folder, logit_epochs=1, max_unreadable=0.25, **QUICK
    )
    for found in (trained, healed):
        assert (found.images, found.skipped) == (8, ("a/x.png", "b/round.png"))
    with pytest.raises(DataError, match=r"2 of 8 cannot be read: .*x\.png .*No such"):
        train(teacher, folder, epochs=1, max_unreadable=0.2, **QUICK)


@pytest.mark.parametrize("name", ["lost.png", "lost.parquet", "lost.tar"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a folder"])
def test_a_link_to_nothing_is_named_where_all_is_lost(
    tmp_path: Path, name: str, inside: bool
) -> None:
    link = tmp_path / name
    link.symlink_to("/nowhere")
    with pytest.raises(DataError, match=name):
        read(tmp_path if inside else link)


def test_links_to_folders_are_followed_and_never_in_a_circle(tmp_path: Path) -> None:
    elsewhere = two_classes(tmp_path / "elsewhere")
    folder = tmp_path / "pictures"
    paint(folder / "a" / "own.png")
    (folder / "b").symlink_to(elsewhere / "b", target_is_directory=True)
    (folder / "a" / "more").symlink_to(elsewhere / "a", target_is_directory=True)
    # Round in one step, in two, and from behind a link to a folder above all.
    (folder / "a" / "self").symlink_to(folder / "a", target_is_directory=True)
    (folder / "a" / "top").symlink_to(folder, target_is_directory=True)
    (elsewhere / "a" / "back").symlink_to(folder / "a", target_is_directory=True)
    expected = ["a/more/0.png", "a/more/1.png", "a/more/2.png", "a/own.png"]
    expected += ["b/0.png", "b/1.png", "b/2.png"]
    assert sorted(read(folder)) == [str(Path(name)) for name in expected]
    source = image_source(tiny_vit(), folder, labelled=True)
    assert source.labels.tolist() == [0] * 4 + [1] * 3
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert read(tmp_path / "link") == read(folder)


def test_a_link_to_a_folder_that_is_gone_is_refused(tmp_path: Path) -> None:
    folder = two_classes(tmp_path / "pictures")
    (folder / "c").symlink_to(tmp_path / "gone", target_is_directory=True)
    with pytest.raises(DataError, match=r"c is a link to .*gone, which is not there"):
        read(folder)


def test_a_folder_of_two_kinds_is_refused_with_what_holds_one(tmp_path: Path) -> None:
    folder = two_classes(tmp_path / "pictures")
    shard = folder / "c.tar"
    with tarfile.open(shard, "w") as tar:
        tar.add(folder / "a" / "0.png", "0.png")
    with pytest.raises(
        DataError, match=r"1 \.tar file \(c\.tar\) and 6 pict"
    ) as caught:
        read(folder)
    assert caught.value.fix == f'Give "{shard}".'
    assert read(shard) == ["c.tar:0"]
    (folder / "data").mkdir()
    shard.rename(folder / "data" / "c.tar")
    (folder / "data" / "d.tar").write_bytes((folder / "data" / "c.tar").read_bytes())
    with pytest.raises(DataError, match=r"2 \.tar files \(data/c\.tar, ") as caught:
        read(folder)
    assert caught.value.fix == f'Give "{folder / "data"}".'
    assert read(folder / "data") == ["c.tar:0", "d.tar:0"]
    (folder / "a" / "0.png").rename(folder / "x.parquet")
    with pytest.raises(
        DataError, match=r"1 \.parquet file \(x\.parquet\) and 2"
    ) as caught:
        read(folder)
    assert str(folder / "x.parquet") in caught.value.fix


def test_other_files_beside_pictures_do_not_matter(tmp_path: Path) -> None:
    folder = two_classes(tmp_path / "pictures")
    (folder / "README").write_text("a note")
    (folder / "labels.json").write_text("{}")
    assert len(read(folder)) == 6
