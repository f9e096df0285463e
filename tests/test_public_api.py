"""The names users import, frozen; growing them is a decision."""

from __future__ import annotations

import inspect

import pytest

import manyheads as mh

# fmt: off
NAMES = [
    "Compact", "Hallucinated", "Hydra", "Interactive", "Recipe", "Softmax", "Swap",
    "attention_maps", "bench", "convert", "cost", "evaluate", "export", "heal", "load",
    "preview", "save", "train",
]
# fmt: on


def test_the_public_names_are_these() -> None:
    assert list(mh.__all__) == NAMES
    assert set(NAMES) < set(dir(mh))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_can_be_imported_and_says_what_it_does(name: str) -> None:
    thing = getattr(mh, name)
    assert inspect.getdoc(thing)
    assert thing.__name__ == name


@pytest.mark.parametrize("name", [n for n in NAMES if n[0].islower()])
def test_verbs_take_no_boolean_by_position_and_swallow_nothing(name: str) -> None:
    for parameter in inspect.signature(getattr(mh, name)).parameters.values():
        assert parameter.kind is not parameter.VAR_KEYWORD
        if isinstance(parameter.default, bool):
            assert parameter.kind is parameter.KEYWORD_ONLY


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'hydra_attention'"):
        mh.hydra_attention  # noqa: B018
