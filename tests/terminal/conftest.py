"""A saved teacher, a folder of labelled pictures, and a terminal."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import manyheads as mh
from tests.helpers import tiny_vit
from tests.terminal.session import Terminal


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return str(mh.save(tiny_vit(), tmp_path_factory.mktemp("models") / "teacher"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pictures")
    for label in range(10):  # as many as the teacher's classes
        (folder / f"class{label}").mkdir()
        for number in range(2):
            image = Image.new("RGB", (32, 32), (20 * label, 30 * number, 7))
            image.save(folder / f"class{label}" / f"{number}.png")
    return str(folder)


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)
