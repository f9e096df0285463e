"""The terminal: exit codes, streams, and one paragraph for each mistake of a user."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import manyheads as mh
from manyheads.cli import app, main
from manyheads.terminal.console import run
from tests.helpers import tiny_vit

VERBS = ["preview", "convert", "heal", "train", "evaluate", "cost", "bench", "demo"]
PROGRAM = [
    sys.executable,
    "-c",
    "import sys; from manyheads.cli import main; sys.exit(main())",
]


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


class Terminal:
    """Runs a command line in this process and keeps what it wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = main(list(words))
        out, err = self.capsys.readouterr()
        return code, out, err

    def refusal(self, *words: str) -> str:
        """Run what must fail as the user's mistake; give the one paragraph."""
        code, out, err = self(*words)
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert "\n" not in err.strip()
        return err

    def json(self, *words: str) -> dict:
        code, out, err = self(*words, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


def test_the_commands_are_the_verbs() -> None:
    assert [c.callback.__name__ for c in app.registered_commands] == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(terminal: Terminal, verb: str) -> None:
    code, out, _ = terminal(verb, "--help")
    assert code == 0
    assert f"Example: manyheads {verb}" in out
    assert "--json" in out


def test_preview_changes_nothing_and_names_the_weights(
    terminal: Terminal, teacher: str
) -> None:
    before = sorted(Path(teacher).iterdir())
    code, out, _ = terminal("preview", teacher, "--attention", "hydra", "--blocks", "2")
    assert code == 0
    assert "blocks.2" in out
    assert "Hydra()" in out
    assert "weights read from the folder" in out
    assert sorted(Path(teacher).iterdir()) == before


def test_random_weights_are_called_random(terminal: Terminal) -> None:
    found = terminal.json("cost", "deit_tiny_patch16_224")
    assert found["models"] == [{"name": "deit_tiny_patch16_224", "weights": "random"}]
    assert found["result"]["parameters"] == 5_717_416
    assert "random weights" in terminal("cost", "deit_tiny_patch16_224")[1]


def test_cost_counts_at_the_size_that_was_asked_for(
    terminal: Terminal, teacher: str
) -> None:
    result = terminal.json("cost", teacher, "--image-size", "40x60")["result"]
    assert result["image_size"] == [40, 60]
    assert result["fed_size"] == [40, 64]


def test_convert_writes_a_model_that_loads(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "student")
    words = ("convert", teacher, "--attention", "hydra:kernel=mean", "--out", out)
    assert len(terminal.json(*words, "--blocks", "0,-1")["result"]["rows"]) == 2
    student = mh.load(out)
    recipe = mh.Recipe(mh.Swap(blocks=[0, 2], attention=mh.Hydra(kernel="mean")))
    expected = mh.convert(mh.load(teacher), recipe)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(student(x), expected(x))


def test_convert_takes_a_recipe_file(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    recipe = mh.Recipe(mh.Swap(blocks=[1], ffn=mh.Compact(rank=3)))
    file = tmp_path / "recipe.json"
    file.write_text(recipe.to_json())
    found = terminal.json("preview", teacher, "--recipe", str(file))
    assert [row["becomes"] for row in found["result"]["rows"]] == [
        "Softmax() + Compact(rank=3)"
    ]


def test_heal_evaluate_and_bench_follow_each_other(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    student, healed = str(tmp_path / "student"), str(tmp_path / "healed")
    terminal.json("convert", teacher, "--attention", "hydra", "--out", student)
    passes = ("--block-epochs", "1", "--logit-epochs", "1", "--batch-size", "4")
    terminal.json("heal", student, teacher, pictures, "--out", healed, *passes)
    x = torch.randn(1, 3, 32, 32)
    assert not torch.equal(mh.load(student)(x), mh.load(healed)(x))
    accuracy = terminal.json("evaluate", healed, pictures)["result"]["top1"]
    assert 0 <= accuracy <= 1
    timed = terminal.json("bench", teacher, healed, "--rounds", "2", "--no-memory")
    assert [row["name"] for row in timed["result"]["rows"]] == [teacher, healed]


def test_train_writes_a_model_that_loads(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "trained")
    terminal.json("train", teacher, pictures, "--epochs", "1", "--out", out)
    assert mh.load(out).head.out_features == 10


# The user's mistakes: what, what is there, where, what to do; exit code 2.


def test_an_unknown_model_is_answered_with_near_names(terminal: Terminal) -> None:
    said = terminal.refusal("cost", "deit_smal_patch16_224")
    assert "UnknownModel" in said
    assert "'deit_smal_patch16_224'" in said
    assert "Did you mean deit_small_patch16_224" in said


def test_a_missing_folder_is_not_taken_for_a_name(
    terminal: Terminal, tmp_path: Path
) -> None:
    said = terminal.refusal("cost", str(tmp_path / "nothing"))
    assert "UnknownModel" in said
    assert "no such folder" in said


def test_a_model_without_attention_is_refused(
    terminal: Terminal, tmp_path: Path
) -> None:
    said = terminal.refusal("preview", "resnet10t", "--attention", "hydra")
    assert "UnknownHost" in said
    assert "no attention" in said


def test_a_recipe_that_matches_no_block_is_refused(
    terminal: Terminal, tmp_path: Path
) -> None:
    # Its feed-forward layers are not timm's Mlp, and nothing else is asked for.
    out = tmp_path / "student"
    words = ("--ffn", "compact", "--no-pretrained", "--out", str(out))
    said = terminal.refusal("convert", "vitamin_small_224", *words)
    assert "NothingToConvert" in said
    assert not out.exists()


def test_a_block_out_of_range_names_the_range(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    words = ("--attention", "hydra", "--blocks", "1-3", "--out", str(out))
    said = terminal.refusal("convert", teacher, *words)
    assert "NothingToConvert" in said
    assert "block 3" in said
    assert "0-2" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"version": 9}, "version 9"),
        ({"speed": "high"}, "'speed'"),
        ({"swaps": [{"attention": {"kind": "Hydra", "kernl": "mean"}}]}, "'kernel'"),
        ({"swaps": [{"attention": {"kind": "Hidra"}}]}, "'Hydra'"),
        ({"swaps": []}, "one or more"),
    ],
    ids=["version", "field", "option", "kind", "empty"],
)
def test_a_wrong_recipe_file_is_refused(
    terminal: Terminal, teacher: str, tmp_path: Path, change: dict, fact: str
) -> None:
    recipe = mh.Recipe(mh.Swap(attention=mh.Hydra())).to_dict() | change
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    said = terminal.refusal("preview", teacher, "--recipe", str(file))
    assert "InvalidRecipe" in said
    assert fact in said


def test_a_recipe_file_that_is_no_json_is_refused(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.json"
    file.write_text("{'swaps': ")
    said = terminal.refusal("preview", teacher, "--recipe", str(file))
    assert "not JSON" in said
    assert str(file) in said


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["--attention", "hidra"], ["hidra", "'hydra'"]),
        (["--attention", "hydra:kernl=mean"], ["'kernl'", "'kernel'"]),
        (["--attention", "hydra:kernel=men"], ["'men'", "'mean'"]),
        (["--attention", "hydra:kernel"], ["key=value"]),
        (["--attention", "compact"], ["compact", "hydra"]),
        (["--ffn", "compact:rank=1.5"], ["1.5"]),
        (["--attention", "hydra", "--blocks", "2-1"], ["2-1", "--blocks"]),
        (["--attention", "hydra", "--blocks", "x"], ["'x'"]),
        (["--attention", "hydra", "--image-size", "axb"], ["axb", "1080x1920"]),
        (["--blocks", "1"], ["--attention"]),
        (["--recipe", "r.json", "--blocks", "1"], ["r.json", "--blocks"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_wrong_option_is_refused(
    terminal: Terminal, teacher: str, words: list[str], facts: list[str], untyped: None
) -> None:
    said = terminal.refusal("preview", teacher, *words)
    assert all(fact in said for fact in facts), said


def test_an_impossible_image_size_names_the_smallest(
    terminal: Terminal, teacher: str
) -> None:
    said = terminal.refusal("cost", teacher, "--image-size", "4x32")
    assert "ImageSizeError" in said
    assert "4x32" in said
    assert "8x8" in said


@pytest.mark.parametrize("verb", ["heal", "train", "evaluate"])
@pytest.mark.parametrize("state", ["missing", "empty", "unreadable"])
def test_a_folder_without_images_is_refused(
    terminal: Terminal, teacher: str, tmp_path: Path, verb: str, state: str
) -> None:
    student = str(tmp_path / "student")
    terminal("convert", teacher, "--attention", "hydra", "--out", student)
    images, out = tmp_path / "images", tmp_path / "out"
    if state != "missing":
        (images / "class0").mkdir(parents=True)
    if state == "unreadable":
        for number in range(3):
            (images / "class0" / f"{number}.png").write_bytes(b"not a picture")
    words = {
        "heal": ["heal", student, teacher, str(images), "--out", str(out)],
        "train": ["train", student, str(images), "--epochs", "1", "--out", str(out)],
        "evaluate": ["evaluate", student, str(images)],
    }[verb]
    said = terminal.refusal(*words)
    assert "DataError" in said
    assert str(images) in said
    assert not out.exists()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "no card", "newer"])
def test_a_damaged_checkpoint_is_refused(
    terminal: Terminal, tmp_path: Path, damage: str
) -> None:
    folder = mh.save(tiny_vit(), tmp_path / "model")
    card, weights = folder / "manyheads.json", folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "foreign":
        card.write_text('{"model_type": "vit"}')
    elif damage == "no card":
        card.unlink()
    else:
        card.write_text(json.dumps(json.loads(card.read_text()) | {"version": 2}))
    said = terminal.refusal("cost", str(folder))
    assert "CheckpointError" in said
    assert str(folder) in said
    assert "manyheads.save" in said


def test_what_is_not_ours_is_never_overwritten(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    words = ("--attention", "hydra", "--out", str(tmp_path))
    said = terminal.refusal("convert", teacher, *words)
    assert "CheckpointError" in said
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 1


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """Give a folder of 64 KiB: a real small disk, or a limit on any file's size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_left_leaves_nothing_behind(
    terminal: Terminal, teacher: str, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with _small_disk(disk):
        words = ("--attention", "hydra", "--out", str(disk / "student"))
        said = terminal.refusal("convert", teacher, *words)
        assert list(disk.iterdir()) == []
    assert "CheckpointError" in said
    assert str(disk / "student") in said
    assert "Free space" in said


def test_pretrained_weights_out_of_reach_say_so() -> None:
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent/cache"}
    words = [*PROGRAM, "evaluate", "deit_tiny_patch16_224", "photos"]
    ended = subprocess.run(
        words, env=offline, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "CheckpointError: the pretrained weights" in ended.stderr
    assert "--no-pretrained" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "words", [["cost"], ["fly"], ["cost", "x", "--fast"], ["bench", "--rounds", "0"]]
)
def test_a_wrong_command_line_exits_with_2(
    terminal: Terminal, words: list[str]
) -> None:
    code, out, err = terminal(*words)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


# Our mistakes, and leaving early.


def _divide(_: list[str]) -> float:
    return 1 / 0


def test_a_mistake_of_ours_exits_with_1_and_keeps_the_traceback_in_a_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(_divide, []) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "report" in err
    log = Path(err.split()[-1])
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


def test_debug_prints_the_traceback_of_a_mistake_of_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(_divide, ["cost", "--debug"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_debug_changes_nothing_about_a_mistake_of_the_user(terminal: Terminal) -> None:
    terminal.refusal("cost", "no_such_model", "--debug")


def test_control_c_leaves_cleanly_with_130(tmp_path: Path) -> None:
    words = [*PROGRAM, "demo", "--out", str(tmp_path / "demo")]
    # A shell that runs the tests in the background lets its children ignore Ctrl-C.
    running = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stderr is not None
    assert "1/5" in running.stderr.readline()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130, err
    assert "Traceback" not in err
