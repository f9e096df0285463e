"""The laws over one real architecture of every supported family, at two sizes each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from torch import nn

import manyheads as mh
from manyheads.attention import AttentionSpec
from manyheads.hosts import find_host
from tests.hosts import laws
from tests.hosts.families import FAMILIES, at

Which = Literal["native", "other"]
EACH_FAMILY = pytest.mark.parametrize("name", FAMILIES)
EACH_MECHANISM = pytest.mark.parametrize("spec", laws.SPECS, ids=repr)
EACH_SIZE = pytest.mark.parametrize("which", ["native", "other"])


def shown(name: str, which: Which) -> tuple[nn.Module, laws.Size]:
    size = getattr(FAMILIES[name], which)
    return at(name, size), size


def test_every_second_size_is_no_square_where_the_library_allows_that() -> None:
    squares = {name for name, f in FAMILIES.items() if f.other[0] == f.other[1]}
    assert squares == {"torchvision/vit"}


@EACH_SIZE
@EACH_FAMILY
def test_identity_leaves_the_answer(name: str, which: Which) -> None:
    laws.identity_law(*shown(name, which))


@EACH_SIZE
@EACH_MECHANISM
@EACH_FAMILY
def test_twin_and_map(name: str, spec: AttentionSpec, which: Which) -> None:
    model, size = shown(name, which)
    if not laws.refused(model, spec):
        laws.mechanism_law(model, spec, size)


@EACH_SIZE
@EACH_FAMILY
def test_cost(name: str, which: Which) -> None:
    model, size = shown(name, which)
    carried = [spec for spec in laws.SPECS if not laws.refused(model, spec)]
    laws.cost_law(model, *carried, size=size)


@EACH_FAMILY
def test_resolution(name: str) -> None:
    family = FAMILIES[name]
    model, resized = at(name, family.native), at(name, family.other)
    if family.rebuilt:
        pytest.skip("its library ties it to the size it was built for")
    for spec in laws.SPECS:
        if not laws.refused(model, spec):
            laws.resolution_law(model, spec, family.other, resized)


@EACH_SIZE
@EACH_FAMILY
def test_untouched(name: str, which: Which) -> None:
    model, size = shown(name, which)
    for spec in laws.SPECS:
        if not laws.refused(model, spec):
            laws.untouched_law(model, spec, size)


@EACH_FAMILY
def test_round_trip(name: str, tmp_path: Path) -> None:
    """One student with all mechanisms that the family carries, block by block."""
    model = at(name, FAMILIES[name].native)
    carried = [spec for spec in laws.SPECS[::-1] if not laws.refused(model, spec)]
    swaps = []
    for site in find_host(model)[1]:
        spec = carried[site.index % len(carried)]
        if not site.fixed and not spec.exempt(site.geometry):
            swaps.append(mh.Swap(blocks=[site.index], attention=spec))
    laws.round_trip_law(model, mh.Recipe(*swaps), tmp_path / "student")


@EACH_FAMILY
def test_compact_takes_the_output_matrix(name: str) -> None:
    model = at(name, FAMILIES[name].native)
    if all(site.ffn_path is None for site in find_host(model)[1]):
        with pytest.raises(mh.errors.NothingToConvert, match="no feed-forward layer"):
            mh.convert(model, laws.COMPACT)
        return
    laws.compact_law(model)
