"""run and maps with pictures of every kind: the right answer, or the reason why not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from PIL import Image

import manyheads as mh
from tests.terminal.session import Terminal

pytest.importorskip("matplotlib", reason="needs the extra: manyheads[draw]")


@pytest.fixture(scope="module")
def file(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    # The tracer passes symbolic sizes where the type checks know only int.
    jaxtyping.config.update("jaxtyping_disable", True)
    path = tmp_path_factory.mktemp("exported") / "m.pt2"
    yield str(mh.export(mh.load(teacher), path, dynamic=False).path)
    jaxtyping.config.update("jaxtyping_disable", False)


def _corner(turned: bool = False) -> Image.Image:
    """Red with a white corner, up and left; or as a camera on its side stores it."""
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[..., 0] = 255
    pixels[:24, :24] = 255
    return Image.fromarray(np.rot90(pixels) if turned else pixels)


def _turned() -> tuple[Image.Image, dict[str, object]]:
    image = _corner(turned=True)
    exif = image.getexif()
    exif[0x0112] = 6  # Turn it by a quarter, clockwise, to see it upright.
    return image, {"exif": exif}


def _plain(colour: str, mode: str = "RGB", size: int = 64) -> Image.Image:
    return Image.new(mode, (size, size), colour)


KINDS: dict[str, tuple[Image.Image, str, dict[str, object], Image.Image]] = {
    "one pixel": (_plain("red", size=1), "PNG", {}, _plain("red")),
    "CMYK": (Image.new("CMYK", (64, 64), (0,) * 4), "JPEG", {}, _plain("white")),
    "16 bits": (
        Image.fromarray(np.full((64, 64), 32896, dtype=np.uint16)),
        "PNG",
        {},
        _plain("#808080"),
    ),
    "alpha": (Image.new("RGBA", (64, 64), (0, 0, 0, 0)), "PNG", {}, _plain("white")),
    "turned": (_turned()[0], "PNG", _turned()[1], _corner()),
}


@pytest.fixture(params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """A picture of this kind, and the plain one that shows the same, named alike."""
    odd, form, options, plain = KINDS[request.param]
    paths = tmp_path / "odd" / "photo.png", tmp_path / "plain" / "photo.png"
    for path in paths:
        path.parent.mkdir()
    odd.save(paths[0], form, **options)
    plain.save(paths[1])
    return str(paths[0]), str(paths[1])


def test_a_picture_of_any_kind_is_answered_as_the_plain_one(
    terminal: Terminal, file: str, both: tuple[str, str]
) -> None:
    first, second = terminal.json("run", file, *both)["result"]["answers"]
    assert first["guesses"] == [
        guess | {"probability": pytest.approx(guess["probability"], rel=1e-4)}
        for guess in second["guesses"]
    ]
    assert len(first["guesses"]) == 5


def test_a_picture_of_any_kind_is_drawn_as_the_plain_one(
    terminal: Terminal, teacher: str, both: tuple[str, str], tmp_path: Path
) -> None:
    drawn = []
    for photo in both:
        out = tmp_path / "maps.png"
        words = ("maps", photo, "--model", teacher, "--out", str(out))
        assert terminal(*words, "--blocks", "2", "--heads", "0")[0] == 0
        with Image.open(out) as picture:
            drawn.append(np.asarray(picture.convert("RGB")).astype(int))
    assert abs(drawn[0] - drawn[1]).max() <= 2


def test_what_is_no_picture_is_refused_by_both(
    terminal: Terminal, file: str, teacher: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("1", (12_000, 10_000)).save(tmp_path / "vast.png")
    for name, fact in (
        ("notes.jpg", "cannot identify"),
        ("empty.png", "cannot identify"),
        ("absent.png", "No such file"),
        ("vast.png", "more than 100 million"),
    ):
        photo = str(tmp_path / name)
        out = str(tmp_path / "maps.png")
        for words in (
            ("run", file, photo),
            ("maps", photo, "--model", teacher, "--out", out),
        ):
            said = terminal.refusal(*words)
            assert name in said
            assert fact in said
        assert not Path(out).exists()


def test_a_photograph_of_ten_thousand_pixels_takes_bounded_memory(
    file: str, teacher: str, tmp_path: Path
) -> None:
    _corner().save(tmp_path / "small.jpg")
    Image.new("RGB", (10_000, 8_000), "red").save(tmp_path / "wide.jpg")
    code = (
        "import resource, sys\n"
        "from manyheads.cli import main\n"
        "file, teacher = sys.argv[1:]\n"
        "def peak():\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "def look(photo):\n"
        "    assert main(['run', file, photo]) == 0\n"
        "    maps = ['maps', photo, '--model', teacher, '--out', 'maps.png']\n"
        "    assert main([*maps, '--blocks', '0']) == 0\n"
        "look('small.jpg')\n"
        "before = peak()\n"
        "look('wide.jpg')\n"
        "print('took', peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, file, teacher],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    # Whole, it would be 229 MiB before anything is done with it.
    assert int(done.stdout.split()[-1]) < 80
