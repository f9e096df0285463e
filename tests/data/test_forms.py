"""The same pictures as a folder, a table or shards: the same weights and score."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from torch import Tensor

from manyheads import Hydra, Recipe, Swap, convert, evaluate, heal, train
from manyheads.data import Augmentation
from tests.helpers import tiny_vit

CLASSES = ("cat", "dog", "eel")
EACH = 5


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fifteen pictures larger than the model's, one of them unreadable, three ways."""
    root, chance = tmp_path_factory.mktemp("forms"), np.random.default_rng(0)
    found = {form: root / form for form in ("folder", "table", "shards")}
    for folder in found.values():
        folder.mkdir()
    rows, labels = [], []
    with tarfile.open(found["shards"] / "a.tar", "w") as shard:
        for label, name in enumerate(CLASSES):
            (found["folder"] / name).mkdir()
            for number in range(EACH):
                pixels = chance.integers(0, 256, (40, 52, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, format="png")
                data = buffer.getvalue()
                if (label, number) == (1, 2):
                    data = data[:100]
                (found["folder"] / name / f"{number}.png").write_bytes(data)
                rows.append({"bytes": data, "path": None})
                labels.append(label)
                for ending, held in (("png", data), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{name}{number}.{ending}")
                    member.size = len(held)
                    shard.addfile(member, io.BytesIO(held))
    table = arrow.table({"image": rows, "label": labels})
    parquet.write_table(table, found["table"] / "train-00000-of-00001.parquet")
    return found


def learned(images: Path) -> tuple[dict[str, Tensor], float, int]:
    torch.manual_seed(0)
    teacher = tiny_vit(depth=2, num_classes=len(CLASSES))
    quick = {"batch_size": 4, "progress": False}
    trained = train(
        teacher, str(images), epochs=2, augment=Augmentation.deit(), **quick
    )
    student = convert(teacher, Recipe(Swap(attention=Hydra())))
    healed = heal(
        student,
        teacher,
        str(images),
        refit_images=8,
        block_epochs=1,
        logit_epochs=1,
        **quick,
    )
    assert len(healed.skipped) == 1
    found = evaluate(student, str(images), **quick)
    assert (found.images, len(found.skipped)) == (14, 1)
    return dict(student.state_dict()), found.loss, len(trained.skipped)


def test_pictures_teach_the_same_in_every_form(forms: dict[str, Path]) -> None:
    expected, loss, skipped = learned(forms["folder"])
    for form in ("table", "shards"):
        weights, other, missed = learned(forms[form])
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert (other, missed) == (loss, skipped), form
