"""Errors carry facts in a fixed order; each raise site's facts are tested beside it."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from manyheads import errors
from manyheads.errors import InvalidOption, ManyheadsError, nearest

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, ManyheadsError)
]
PARTS = {
    "asked": "rank=900",
    "found": "the matrix has 768",
    "where": "blocks.3.mlp.fc2",
    "why": "no rank exceeds the size",
    "fix": "Use rank=384.",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_has_its_five_parts_in_order(kind: type[ManyheadsError]) -> None:
    text = str(kind(**PARTS))
    assert text == (
        "rank=900, but the matrix has 768 (at blocks.3.mlp.fc2). "
        "No rank exceeds the size. Use rank=384."
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_another_process(kind: type[ManyheadsError]) -> None:
    error = kind(**PARTS)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert again.fix == PARTS["fix"]


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not ManyheadsError])
def test_each_error_is_also_the_builtin_a_caller_expects(
    kind: type[ManyheadsError],
) -> None:
    builtins = (ValueError, TypeError, ArithmeticError, ImportError)
    assert issubclass(kind, builtins)
    assert inspect.getdoc(kind)


def test_where_and_why_may_be_left_out() -> None:
    error = InvalidOption(asked="a=1", found="it is 2", fix="Use 2.")
    assert str(error) == "a=1, but it is 2. Use 2."


def test_problems_of_one_kind_are_told_together() -> None:
    places = ["blocks.0", "blocks.1", "blocks.2"]
    error = InvalidOption.many(
        InvalidOption(asked="x", found="no room", where=place, fix="Try y.")
        for place in places
    )
    assert all(place in str(error) for place in places)
    assert str(error).count("Try y.") == 1


def test_a_close_word_is_offered() -> None:
    assert nearest("kernal", ["kernel", "rank"]) == (
        "Did you mean 'kernel'? Choose from kernel, rank."
    )
    assert nearest("zzz", ["kernel"]) == "Choose from kernel."
