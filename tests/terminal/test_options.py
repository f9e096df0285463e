"""Options made from a signature: every kind of annotation, from text and from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import Tensor, nn

from manyheads.errors import InvalidOption, ManyheadsError
from manyheads.terminal.options import Word, option_value, plain_value, words_of

Images = str | Path | Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Jitter:
    flip: float | int = 0.5
    area: tuple[float | int, float | int] | None = None
    times: int = 1

    @classmethod
    def strong(cls) -> Jitter:
        return cls(times=3)

    @classmethod
    def read(cls, text: str) -> Jitter:
        return cls(flip=float(text))


def verb(
    model: nn.Module,
    images: Images,
    *,
    epochs: int,
    rate: float | int = 1e-3,
    limit: float | int | None = 1.0,
    teacher: nn.Module | None = None,
    augment: bool | Jitter = True,
    mode: Literal["soft", "hard"] = "soft",
    held_out: Images | None = None,
    stages: Sequence[int] = (1, 2),
    run_dir: str | Path | None = None,
    progress: bool = True,
) -> None:
    """Do something.

    Args:
        model: A model.
        images: Where images are,
            on two lines.
        epochs: How often.

    Raises:
        InvalidOption: never: this is no argument.
    """


WORDS = {word.name: word for word in words_of(verb)}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("images", "photos", "photos"),
        ("images", "12", "12"),
        ("limit", "2", 2),
        ("limit", "none", None),
        ("augment", "false", False),
        ("augment", "flip=0.25,times=2", Jitter(flip=0.25, times=2)),
        ("augment", "area=0.5,1.0,times=2", Jitter(area=(0.5, 1.0), times=2)),
        ("augment", "strong", Jitter(times=3)),
        ("mode", "hard", "hard"),
        ("stages", "3,4,5", (3, 4, 5)),
        ("teacher", "deit_tiny_patch16_224", "deit_tiny_patch16_224"),
        ("run_dir", "none", None),
    ],
)
def test_text_becomes_what_the_annotation_says(
    name: str, text: str, value: Any
) -> None:
    word = WORDS[name]
    assert (
        option_value(word, text, word.flag if not word.positional else "--x") == value
    )


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("rate", 1, 1),
        ("augment", {"area": [0.3, 1], "flip": 0}, Jitter(area=(0.3, 1), flip=0)),
        ("stages", [7], (7,)),
        ("held_out", "photos", "photos"),
        ("limit", "none", None),
        ("run_dir", "none", None),
        ("progress", False, False),
    ],
)
def test_values_of_a_file_are_taken_as_they_are(
    name: str, given: Any, value: Any
) -> None:
    read = option_value(WORDS[name], given, "run.toml")
    assert read == value
    assert option_value(WORDS[name], plain_value(read), "run.json") == value


@pytest.mark.parametrize(
    ("name", "given", "facts"),
    [
        ("epochs", True, ["epochs = True", "a whole number", "run.toml"]),
        ("epochs", 1.5, ["1.5"]),
        ("rate", "none", ["'none'", "a number"]),
        ("rate", "fast", ["'fast'", "a number", "0.001"]),
        ("mode", "sotf", ["'sotf'", "'soft', 'hard'"]),
        ("augment", {"flp": 1}, ["'flp'", "Did you mean 'flip'"]),
        ("augment", {"flip": "x"}, ["flip = 'x'"]),
        ("augment", 3, ["'strong'", "a table of flip, area, times"]),
        ("augment", "read", ["'read'"]),
        ("stages", ["x"], ["a list"]),
        ("progress", "yes", ["true or false"]),
    ],
)
def test_other_values_are_refused_with_what_is_taken(
    name: str, given: Any, facts: list[str]
) -> None:
    with pytest.raises(InvalidOption) as refused:
        option_value(WORDS[name], given, "run.toml")
    assert all(fact in str(refused.value) for fact in facts), refused.value


def test_the_words_of_the_docstring_are_the_help() -> None:
    assert WORDS["images"].told == "Where images are, on two lines."
    assert WORDS["epochs"].told == "How often."
    assert WORDS["rate"].told == ""
    assert WORDS["teacher"].is_model
    assert [word.name for word in WORDS.values() if word.positional] == [
        "model",
        "images",
    ]
    assert WORDS["run_dir"].flag == "--run-dir"


def test_a_parameter_that_no_text_can_give_is_a_mistake_of_ours() -> None:
    def strange(*, hook: Tensor) -> None:
        """Do nothing."""

    with pytest.raises(ManyheadsError, match="hook of strange"):
        words_of(strange)


def test_a_word_s_type_is_what_typer_can_check() -> None:
    def kind(word: Word) -> Any:
        return word.parameter().annotation.__origin__

    assert kind(WORDS["epochs"]) == int | None
    assert kind(WORDS["rate"]) == float | None
    assert kind(WORDS["limit"]) == str | None
    assert kind(WORDS["progress"]) == bool | None
    assert kind(WORDS["augment"]) == str | None
