"""Training learns, evaluation measures, and neither does anything in silence."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from manyheads import Hydra, Recipe, Swap, convert
from manyheads.errors import DataError, InvalidOption, NonFiniteLoss, UnknownHost
from manyheads.training import DEIT, DEIT_MODEL, evaluate, train
from tests.helpers import tiny_vit

QUICK = {"epochs": 4, "batch_size": 16, "progress": False}


def coloured(count: int = 60, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Images whose class is the channel that is bright."""
    labels = torch.arange(count) % classes
    images = 0.3 * torch.randn(count, 3, 32, 32)
    images[torch.arange(count), labels % 3] += 1
    return images, labels


def class_folders(root: Path, names: tuple[str, ...] = ("blue", "red")) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(4):
            image = Image.new("RGB", (40, 40), name)
            image.save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize("converted", [False, True])
def test_training_learns_what_carries_over_to_unseen_images(converted: bool) -> None:
    model = tiny_vit(num_classes=3)
    if converted:
        model = convert(model, Recipe(Swap(attention=Hydra())))
    unseen = coloured(30)
    trained = train(model, coloured(), validation=unseen, **QUICK)
    assert trained.losses[-1] < trained.losses[0] / 2
    assert trained.steps == 16
    assert trained.validation.top1 > 0.9
    assert trained.validation == evaluate(model, unseen, batch_size=16, progress=False)
    assert trained.history[-1]["top1"] == trained.validation.top1
    assert len(trained.history) == 4


def test_one_step_is_made_at_the_whole_rate_and_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = QUICK | {"epochs": 1, "log_every": 1, "run_dir": tmp_path / "run"}
    assert train(tiny_vit(num_classes=3), coloured(16), **options).steps == 1
    assert [record.getMessage() for record in caplog.records] == []
    lines = (tmp_path / "run" / "steps.csv").read_text().splitlines()
    (line,) = csv.DictReader(lines)
    assert float(line["learning_rate"]) == 1e-3


def test_evaluation_agrees_with_a_hand_computation_whatever_the_batch() -> None:
    model, (images, labels) = tiny_vit(), coloured(20, classes=10)
    with torch.no_grad():
        scores = model(images)
    ranked = scores.argsort(dim=-1, descending=True)
    for batch_size in (1, 7, 64):
        found = evaluate(model, (images, labels), batch_size=batch_size, progress=False)
        assert found.top1 == (ranked[:, 0] == labels).float().mean()
        expected = (ranked[:, :5] == labels[:, None]).any(1).float().mean().item()
        assert found.top5 == pytest.approx(expected)
        assert found.loss == pytest.approx(F.cross_entropy(scores, labels).item(), 1e-5)
        assert found.images == 20


def test_five_classes_or_fewer_have_no_top_five() -> None:
    found = evaluate(tiny_vit(num_classes=3), coloured(), progress=False)
    assert found.top5 is None
    assert "top-5" not in str(found)


def test_evaluation_changes_nothing() -> None:
    model = tiny_vit(num_classes=3).train()
    model.blocks[0].eval()
    model.head.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    images = coloured()
    noise = torch.get_rng_state()
    evaluate(model, images, progress=False)
    assert [m.training for m in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    assert torch.equal(noise, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_folders_with_one_subfolder_per_class_train_and_evaluate(
    tmp_path: Path,
) -> None:
    folder = class_folders(tmp_path / "images")
    (folder / "red" / "broken.jpg").write_bytes(b"")
    model = tiny_vit(num_classes=2)
    options = QUICK | {"max_unreadable": 0.2}
    trained = train(model, folder, validation=folder, **options)
    assert trained.images == 9
    assert trained.skipped == ("red/broken.jpg",)
    assert trained.validation.images == 8
    assert trained.validation.skipped == ("red/broken.jpg",)
    assert trained.validation.top1 == 1.0
    assert "1 skipped" in str(trained)


def test_missing_labels_are_an_error(tmp_path: Path) -> None:
    model, (images, _) = tiny_vit(num_classes=3), coloured()
    Image.new("RGB", (40, 40)).save(tmp_path / "1.png")
    for source in (images, tmp_path, TensorDataset(images)):
        with pytest.raises(DataError):
            train(model, source, **QUICK)
        with pytest.raises(DataError):
            evaluate(model, source, progress=False)


def test_labels_beyond_the_classes_are_refused_before_anything_moves() -> None:
    model, (images, labels) = tiny_vit(num_classes=3), coloured()
    before = model.head.weight.clone()
    for source in ((images, labels + 1), TensorDataset(images, labels + 1)):
        with pytest.raises(DataError, match="labels 0 to 2"):
            evaluate(model, source, progress=False)
    with pytest.raises(DataError, match="3 first"):
        train(model, (images, labels + 1), **QUICK)
    assert torch.equal(model.head.weight, before)


def test_another_number_of_class_folders_is_refused(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "images")
    with pytest.raises(DataError, match="2 class subfolders and the model names 10"):
        evaluate(tiny_vit(), folder, progress=False)


def test_validation_with_other_classes_is_refused(tmp_path: Path) -> None:
    learned = class_folders(tmp_path / "a")
    other = class_folders(tmp_path / "b", ("blue", "green"))
    with pytest.raises(DataError, match="green, red"):
        train(tiny_vit(num_classes=2), learned, validation=other, **QUICK)


def table(names: list[str]) -> datasets.Dataset:
    rows = {"image": [Image.new("RGB", (40, 40), name) for name in names]}
    rows["label"] = list(range(len(names)))
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def shards(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            picture = io.BytesIO()
            Image.new("RGB", (40, 40), name).save(picture, "PNG")
            for ending, held in (("png", picture.getvalue()), ("cls", name.encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(held)
                tar.addfile(member, io.BytesIO(held))
    return path


def test_messages_on_classes_name_what_the_source_has(tmp_path: Path) -> None:
    colours = ["blue", "green", "red"]
    sources = {
        "3 classes in the label column": table(colours),
        "3 classes in the .cls members": shards(tmp_path / "a.tar", colours),
        "10 classes and": "digits",
    }
    for told, source in sources.items():
        with pytest.raises(DataError, match=told) as caught:
            evaluate(tiny_vit(num_classes=12), source, progress=False)
        assert "folder" not in str(caught.value)
    model = tiny_vit(num_classes=3)
    other = shards(tmp_path / "b.tar", ["blue", "red", "white"])
    for theirs, told in (
        (table(["blue", "red", "white"]), "classes in the label column differ: green"),
        (table(["red", "green", "blue"]), "column differ in their order"),
        (other, "classes in the .cls members differ: green, white"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            train(model, table(colours), validation=theirs, **QUICK)
        assert "folder" not in str(caught.value)
    with pytest.raises(DataError, match="not every image has a label") as caught:
        evaluate(model, table(colours).remove_columns("label"), progress=False)
    assert "column label" in caught.value.fix


def test_scores_that_are_not_finite_are_an_error_with_the_block() -> None:
    model = tiny_vit(num_classes=3)
    model.blocks[2].attn.proj.bias.data[0] = torch.nan
    with pytest.raises(NonFiniteLoss) as caught:
        evaluate(model, coloured(), progress=False)
    assert caught.value.where == "blocks.2 (block 2)"


def test_a_model_without_a_known_host_is_refused() -> None:
    with pytest.raises(UnknownHost):
        evaluate(nn.Linear(3, 3), coloured(), progress=False)


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(InvalidOption, match="batch_size=0"):
        evaluate(tiny_vit(), coloured(), batch_size=0, progress=False)


def test_biases_and_norms_have_no_weight_decay() -> None:
    model = tiny_vit(num_classes=3)
    model.norm.weight.data.fill_(5.0)
    before = model.norm.weight.clone()
    # A rate this low and a decay this high: whatever decays halves at least.
    options = QUICK | {"learning_rate": 1e-6, "weight_decay": 1e5, "warmup_epochs": 0}
    matrix = model.head.weight.norm().item()
    train(model, coloured(), **options)
    torch.testing.assert_close(model.norm.weight, before, atol=1e-3, rtol=0)
    assert model.head.weight.norm() < matrix * 0.9


def test_results_are_json_and_read_well() -> None:
    model = tiny_vit(num_classes=3)
    trained = train(model, coloured(), validation=coloured(9), **QUICK)
    value = json.loads(json.dumps(trained.to_json()))
    assert value["validation"]["images"] == 9
    assert str(trained).count("\n") == 1
    assert "top-1" in str(trained)
    assert "16 steps over 60 images" in str(trained)


def test_the_deit_recipe_is_the_published_one() -> None:
    told = dict(DEIT)
    augment = told.pop("augment").to_json()
    assert told == {
        "epochs": 300,
        "batch_size": 1024,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "warmup_epochs": 5,
        "max_grad_norm": None,
        "ema_decay": 0.99996,
    }
    published = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25, "label_smoothing": 0.1}
    published |= {"rand_magnitude": 9, "rand_spread": 0.5, "repeats": 3}
    assert {name: augment[name] for name in published} == published
    assert dict(DEIT_MODEL) == {"drop_path_rate": 0.1}
    built = tiny_vit(**DEIT_MODEL)
    assert built.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
