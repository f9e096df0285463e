"""heal, train, evaluate: every keyword is an option, from words or from a file."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import manyheads as mh
from manyheads.cli import app
from manyheads.terminal.options import words_of
from tests.terminal.session import PROGRAM, Terminal

QUICK = ("--no-progress", "--batch-size", "10")


def _weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return mh.load(folder).state_dict()


def _equal(one: str | Path, other: str | Path) -> bool:
    ours, theirs = _weights(one), _weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("verb", [mh.train, mh.heal, mh.evaluate])
def test_every_keyword_of_the_verb_is_an_option_with_its_own_words(
    verb: Callable[..., Any],
) -> None:
    command = get_command(app).commands[verb.__name__]  # type: ignore[attr-defined]
    offered = {parameter.name: parameter for parameter in command.params}
    for name, parameter in inspect.signature(verb).parameters.items():
        assert name in offered
        assert offered[name].help, name
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            dashed = f"--{name.replace('_', '-')}"
            assert dashed in offered[name].opts
    assert all(word.told for word in words_of(verb))


def test_a_file_gives_what_the_command_line_does_not(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    by_words, by_file = tmp_path / "words", tmp_path / "file"
    words = ("train", teacher, pictures, "--epochs", "2", "--learning-rate", "1e-3")
    found = terminal.json(*words, "--seed", "3", *QUICK, "--out", str(by_words))
    file = tmp_path / "run.toml"
    file.write_text(
        f'command = "train"\nmodel = "{teacher}"\nimages = "{pictures}"\n'
        "epochs = 2\nseed = 3\nbatch-size = 10\nlearning_rate = 0.5\n"
        f'progress = false\nout = "{tmp_path / "elsewhere"}"\n'
    )
    # What is typed wins over the file.
    typed = ("--learning-rate", "1e-3", "--out", str(by_file))
    again = terminal.json("train", "--config", str(file), *typed)
    assert again["config"]["learning_rate"] == 1e-3
    assert again["config"] == found["config"] | {"out": str(by_file)}
    assert _equal(by_words, by_file)
    assert not (tmp_path / "elsewhere").exists()


def test_the_example_of_the_documentation_runs(
    terminal: Terminal, pictures: str, tmp_path: Path
) -> None:
    example = Path(__file__).parents[2] / "examples" / "train.toml"
    places = ("--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    smaller = ("--epochs", "1", "--validation", pictures, *QUICK)
    smaller += ("--model-arguments", "num_classes=10,img_size=32")
    words = ("train", "test_vit", pictures, "--config", str(example))
    assert terminal.json(*words, *places, *smaller)["config"]["learning_rate"] == 1e-3


def test_what_a_run_keeps_repeats_it(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("train", teacher, pictures, "--epochs", "1", "--seed", "5", *QUICK)
    first = ("--out", str(tmp_path / "first"), "--run-dir", str(run))
    terminal.json(*words, *first)
    kept = json.loads((run / "config.json").read_text())
    assert (kept["format"], kept["command"]) == ("manyheads.command", "train")
    assert (kept["epochs"], kept["seed"], kept["weight_decay"]) == (1, 5, 0.05)
    assert kept["versions"]["torch"].split("+")[0] in torch.__version__
    # The same folder: the run is finished, and its result is given again.
    config = ("train", "--config", str(run / "config.json"))
    terminal.json(*config)
    assert json.loads((run / "config.json").read_text()) == kept
    # New folders: the run is done again, to the same weights.
    anew = ("--out", str(tmp_path / "second"), "--run-dir", str(tmp_path / "anew"))
    terminal.json(*config, *anew)
    assert _equal(tmp_path / "first", tmp_path / "second")
    assert (tmp_path / "anew" / "config.json").exists()


def test_a_model_says_which_command_made_it(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    student, healed = tmp_path / "student", tmp_path / "healed"
    terminal("convert", teacher, "--attention", "hydra", "--out", str(student))
    passes = ("--block-epochs", "1", "--logit-epochs", "0", *QUICK)
    words = ("heal", str(student), teacher, pictures, *passes)
    terminal.json(*words, "--out", str(healed))
    command = healed / "command.json"
    terminal.json("heal", "--config", str(command), "--out", str(tmp_path / "again"))
    assert _equal(healed, tmp_path / "again")
    assert not _equal(student, healed)


def test_evaluate_repeats_what_its_json_says(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    found = terminal.json("evaluate", teacher, pictures, *QUICK)
    (tmp_path / "found.json").write_text(json.dumps(found))
    again = terminal.json("evaluate", "--config", str(tmp_path / "found.json"))
    assert again == found


def test_a_killed_run_goes_on_from_what_it_kept(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    words = ["train", teacher, pictures, "--epochs", "4", "--batch-size", "2"]
    words += ["--checkpoint-every", "2", "--no-progress"]
    run = tmp_path / "run"
    killed = [*words, "--out", str(tmp_path / "killed"), "--run-dir", str(run)]
    process = subprocess.Popen([*PROGRAM, *killed], stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(run.glob("step-*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    terminal.json("train", "--config", str(run / "config.json"))
    terminal.json(*words, "--out", str(tmp_path / "whole"))
    assert _equal(tmp_path / "killed", tmp_path / "whole")


def test_a_signal_to_the_whole_group_stops_a_run_and_its_workers(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    """As Ctrl-C and torchrun signal: workers must not die before the run is saved."""
    words = ["train", teacher, pictures, "--epochs", "400", "--batch-size", "2"]
    words += [
        "--num-workers",
        "2",
        "--log-every",
        "1",
        "--checkpoint-every",
        "100000",
        "--no-progress",
    ]
    run, logged = tmp_path / "run", tmp_path / "run" / "steps.csv"
    stopped = ["--out", str(tmp_path / "stopped"), "--run-dir", str(run)]
    process = subprocess.Popen(
        [*PROGRAM, *words, *stopped],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not (
        logged.is_file() and len(logged.read_text().splitlines()) > 4
    ):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert len(list(run.glob("step-*"))) == 1
    assert "mistake" not in said


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("epoch = 3", ["'epoch'", "Did you mean 'epochs'"]),
        ('command = "heal"', ["file of a 'heal'", "manyheads heal --config"]),
        ("epochs = true", ["epochs = True", "a whole number"]),
        ('epochs = "many"', ["'many'", "a whole number"]),
        ('augment = "perhaps"', ["'perhaps'"]),
        ("epochs = ", ["cannot be read"]),
        ('format = "manyheads.run"', ["'manyheads.run'", "config.json"]),
        ("epochs = 1", ["MODEL, IMAGES, --out", "not given"]),
        ('recipe = "diet"', ["--recipe diet", "no such published settings"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_followed_is_refused(
    terminal: Terminal, text: str, facts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(text + "\n")
    said = terminal.refusal("train", "--config", str(tmp_path / "run.toml"))
    assert all(fact in said for fact in facts), said


def test_files_of_another_kind_are_refused(terminal: Terminal, tmp_path: Path) -> None:
    said = terminal.refusal("train", "--config", str(tmp_path / "absent.toml"))
    assert "cannot be read" in said
    (tmp_path / "run.yaml").write_text("epochs: 3")
    said = terminal.refusal("train", "--config", str(tmp_path / "run.yaml"))
    assert "neither .toml nor .json" in said
    (tmp_path / "run.json").write_text("[1]")
    said = terminal.refusal("train", "--config", str(tmp_path / "run.json"))
    assert "no table" in said


def test_other_versions_are_remarked_upon(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"versions": {"torch": "0.4.1"}, "batch_size": 10}))
    code, _, err = terminal("evaluate", teacher, pictures, "--config", str(file))
    assert code == 0
    assert "torch was 0.4.1 and is" in err


def test_deit_s_published_values_stand_below_the_file_and_the_words(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('recipe = "deit"\nweight_decay = 0.125\nepochs = 7\n')
    code, out, err = terminal(
        *("train", teacher, pictures, "--config", str(file), "--epochs", "6"),
        *("--out", str(tmp_path / "out"), *QUICK, "--json"),
    )
    assert code == 0, err
    config = json.loads(out)["config"]
    assert (config["recipe"], config["batch_size"]) == ("deit", 10)
    assert (config["weight_decay"], config["epochs"]) == (0.125, 6)
    assert (config["learning_rate"], config["warmup_epochs"]) == (1e-3, 5)
    assert (config["max_grad_norm"], config["ema_decay"]) == (None, 0.99996)
    augment = config["augment"]
    assert (augment["mixup"], augment["cutmix"], augment["erasing"]) == (0.8, 1.0, 0.25)
    assert (augment["rand_magnitude"], augment["repeats"]) == (9, 3)
    assert "stays as built, without drop_path_rate=0.1" in err
    # Tables come back as what they were.
    (tmp_path / "again.json").write_text(json.dumps(config))
    again = terminal.json(
        *("train", "--config", str(tmp_path / "again.json")),
        *("--out", str(tmp_path / "again")),
    )
    assert again["config"]["augment"] == augment
    assert _equal(tmp_path / "out", tmp_path / "again")


def test_a_registered_model_is_built_as_its_recipe_builds_it(
    terminal: Terminal, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    code, _, err = terminal(
        *("train", "vit_tiny_patch16_224", "digits", "--no-pretrained", "--out", out),
        *("--recipe", "deit", "--augment", "light", "--learning-rate", "-1"),
    )
    # Refused for its rate, after the model was built and the recipe read.
    assert code == 2
    assert "learning_rate=-1" in err
    assert "stays as built" not in err


def test_only_the_first_of_two_processes_speaks_and_writes(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    words = ["train", teacher, pictures, "--epochs", "1", *QUICK]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += [
        "--nproc-per-node",
        "2",
        "--no-python",
        *PROGRAM,
        *words,
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    line += ["--run-dir", str(tmp_path / "run")]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    # Torch 2.9 writes of its connections to the output stream, and nothing stops it.
    lines = ended.stdout.splitlines(keepends=True)
    found = json.loads("".join(li for li in lines if not li.startswith("[Gloo]")))
    assert found["result"]["processes"] == 2
    assert ended.stderr.count("Written to") == 1
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept == found["config"]
    assert mh.load(tmp_path / "out").head.out_features == 10


@pytest.mark.parametrize("verb", ["train", "heal", "evaluate"])
def test_unreadable_pictures_are_listed_by_path_at_the_end(
    terminal: Terminal, teacher: str, pictures: str, verb: str, tmp_path: Path
) -> None:
    photos = Path(shutil.copytree(pictures, tmp_path / "photos"))
    (photos / "class3" / "broken.png").write_text("no picture")
    (photos / "class3" / "cut.png").write_bytes(b"\x89PNG\r\n")
    words = [verb, teacher, str(photos), "--max-unreadable", "0.2", *QUICK]
    if verb == "heal":
        student = str(tmp_path / "student")
        terminal("convert", teacher, "--attention", "hydra", "--out", student)
        words[1:2] = [student, teacher]
        words += ["--block-epochs", "0", "--logit-epochs", "1"]
    words += ["--epochs", "1"] if verb == "train" else []
    words += [] if verb == "evaluate" else ["--out", str(tmp_path / "out")]
    code, out, err = terminal(*words)
    assert code == 0, err
    assert "2 skipped" in out
    end = err[err.index("Warning: 2 pictures could not be read") :].splitlines()
    assert [line.strip() for line in end[1:]] == [
        str(Path("class3", "broken.png")),
        str(Path("class3", "cut.png")),
    ]
    words[words.index("0.2")] = "0.05"
    if verb != "evaluate":
        words[-1] += "-not"
    said = terminal.refusal(*words)
    assert "class3" in said
    assert "max_unreadable" in said
    assert not (tmp_path / "out-not").exists()


def test_unreadable_validation_pictures_are_listed_too(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    held_out = Path(shutil.copytree(pictures, tmp_path / "held out"))
    (held_out / "class3" / "broken.png").write_text("no picture")
    (held_out / "class4" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    paths = [str(Path("class3", "broken.png")), str(Path("class4", "lost.png"))]
    words = ["train", teacher, pictures, "--validation", str(held_out), *QUICK]
    words += ["--epochs", "1", "--max-unreadable", "0.2", "--out", str(tmp_path / "o")]
    code, _, err = terminal(*words)
    assert code == 0, err
    told = "Warning: 2 validation pictures could not be read"
    end = err[err.index(told) :].splitlines()
    assert [line.strip() for line in end[1:]] == paths
    assert "Warning: 2 pictures" not in err
    found = terminal.json(*words)["result"]["validation"]
    assert found["skipped"] == paths


@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_a_run_that_is_refused_at_once_leaves_no_trace(
    terminal: Terminal, teacher: str, there: bool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    if there:
        run.mkdir()
    said = terminal.refusal(
        *("train", teacher, str(tmp_path / "nothing"), "--epochs", "1"),
        *("--out", str(tmp_path / "out"), "--run-dir", str(run)),
    )
    assert "no such folder" in said
    assert list(tmp_path.iterdir()) == ([run] if there else [])
    assert not there or list(run.iterdir()) == []


def test_another_run_s_folder_keeps_its_command(
    terminal: Terminal, teacher: str, pictures: str, tmp_path: Path
) -> None:
    words = ("train", teacher, pictures, "--epochs", "1", *QUICK)
    words += ("--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    terminal.json(*words)
    kept = (tmp_path / "run" / "config.json").read_bytes()
    said = terminal.refusal(*words, "--learning-rate", "0.5")
    assert "belongs to another run" in said
    assert (tmp_path / "run" / "config.json").read_bytes() == kept
