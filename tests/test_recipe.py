"""Recipes: values that check themselves, and JSON that is read strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyheads import Compact, Hydra, Recipe, Softmax, Swap
from manyheads.errors import InvalidOption, InvalidRecipe

EXAMPLE = Recipe(
    Swap(blocks=range(10, 12), attention=Hydra(kernel="mean")),
    Swap(ffn=Compact(rank=0.25)),
)

FROZEN = {
    "format": "manyheads.recipe",
    "version": 1,
    "swaps": [
        {
            "blocks": [10, 11],
            "attention": {"kind": "Hydra", "kernel": "mean", "reference_tokens": None},
            "ffn": None,
        },
        {"blocks": None, "attention": None},
    ],
}


def _changed(**top: object) -> str:
    return json.dumps(EXAMPLE.to_dict() | top)


def test_version_1_of_the_format_is_frozen() -> None:
    written = EXAMPLE.to_dict()
    compact = written["swaps"][1].pop("ffn")
    assert written == FROZEN
    assert compact["kind"] == "Compact"
    assert compact["rank"] == 0.25


def test_a_recipe_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(EXAMPLE.to_json(), encoding="utf-8")
    assert Recipe.read(path) == EXAMPLE


@given(
    blocks=st.none() | st.lists(st.integers(-50, 50), min_size=1, unique=True),
    kernel=st.sampled_from(["cosine", "mean", "aft"]),
    rank=st.none() | st.integers(1, 10**6) | st.floats(1e-6, 1.0),
)
def test_any_recipe_survives_json(
    blocks: list[int] | None, kernel: str, rank: float | None
) -> None:
    ffn = None if rank is None else Compact(rank=rank)
    recipe = Recipe(Swap(blocks=blocks, attention=Hydra(kernel=kernel), ffn=ffn))
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_specs_are_values() -> None:
    assert Hydra() == Hydra(kernel="cosine")
    assert len({Hydra(), Hydra(), Softmax()}) == 2
    assert repr(Hydra()) == "Hydra()"
    assert repr(Hydra(kernel="aft")) == "Hydra(kernel='aft')"


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("{", ("not JSON",)),
        ("[]", ("[] is not a JSON object",)),
        (_changed(version=2), ("version 2", "reads 'manyheads.recipe' version 1")),
        (_changed(format="other"), ("format 'other'",)),
        (_changed(swapz=[]), ("'swapz'", "'swaps'", "does not know it")),
        (_changed(swaps={}), ("{} is not a list of swaps", "swaps")),
        (_changed(swaps=[]), ("one or more Swap",)),
        (_changed(swaps=[{"block": [1]}]), ("'block'", "'blocks'", "swaps[0]")),
        (_changed(swaps=[{"blocks": [1]}]), ("neither attention nor ffn",)),
        (
            _changed(swaps=[{"attention": {"kind": "Hydro"}}]),
            ("'Hydro'", "'Hydra'", "swaps[0].attention"),
        ),
        (
            _changed(swaps=[{"attention": {"kind": "Hydra", "kernal": "aft"}}]),
            ("'kernal'", "'kernel'", "swaps[0].attention"),
        ),
        (
            _changed(swaps=[{"attention": {"kind": "Hydra", "kernel": "x"}}]),
            ("'x'", "cosine, mean, aft"),
        ),
        (
            _changed(swaps=[{"attention": {"kind": "Compact"}}]),
            ("attention=Compact()", "swaps[0]"),
        ),
        (
            _changed(swaps=[{"blocks": "all", "attention": {"kind": "Hydra"}}]),
            ("'all'", "range(10, 12)"),
        ),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_json_of_another_shape_is_refused_with_the_place_and_the_choices(
    text: str, facts: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidRecipe) as error:
        Recipe.from_json(text, where="my.json")
    for fact in facts:
        assert fact in str(error.value)


def test_a_missing_or_binary_recipe_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match="nowhere"):
        Recipe.read(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRecipe, match=r"binary\.json"):
        Recipe.read(tmp_path / "binary.json")


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({}, "neither attention nor ffn"),
        ({"blocks": [], "attention": Hydra()}, "blocks=[]"),
        ({"blocks": [1, 1], "attention": Hydra()}, "blocks=[1, 1]"),
        ({"blocks": 3, "attention": Hydra()}, "blocks=3"),
        ({"blocks": [1.5], "attention": Hydra()}, "blocks=[1.5]"),
        ({"blocks": [True], "attention": Hydra()}, "blocks=[True]"),
        ({"attention": Hydra}, "Hydra()"),
        ({"attention": "hydra"}, "'hydra'"),
        ({"ffn": Hydra()}, "ffn=Hydra()"),
    ],
)
def test_a_swap_checks_itself_where_it_is_written(
    options: dict[str, object], fact: str
) -> None:
    with pytest.raises(InvalidOption) as error:
        Swap(**options)
    assert fact in str(error.value)


@pytest.mark.usefixtures("untyped")
def test_a_recipe_is_made_of_swaps() -> None:
    with pytest.raises(InvalidRecipe, match=r"Hydra\(\)"):
        Recipe(Hydra())
