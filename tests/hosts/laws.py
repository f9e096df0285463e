"""The laws every host is held to, written once: each takes a real model.

A host's test file calls them for each of its families, so that a law added here is
tested on all of them, and a new mechanism is covered by being in `MECHANISMS`.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyheads as mh
from manyheads.attention import MECHANISMS, AttentionSpec, Mechanism
from manyheads.errors import SwapRefused
from manyheads.hosts import Site, find_host, mechanism_of
from tests.helpers import assert_close

Size = tuple[int, int]
# Tiny grids hold few landmarks.
_OPTIONS: dict[str, dict[str, Any]] = {"Interactive": {"landmarks": (2, 2)}}
SPECS: tuple[AttentionSpec, ...] = tuple(
    kind(**_OPTIONS.get(kind.__name__, {})) for kind in MECHANISMS
)
COMPACT = mh.Recipe(mh.Swap(ffn=mh.Compact(rank=0.5)))


def everywhere(spec: AttentionSpec) -> mh.Recipe:
    return mh.Recipe(mh.Swap(attention=spec))


def randomise(model: nn.Module) -> nn.Module:
    """Move every parameter off its start, so that no zero hides a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def pictures(model: nn.Module, size: Size | None = None) -> Tensor:
    host, _ = find_host(model)
    wanted = host.image_input(model)
    return torch.randn(2, wanted.channels, *(size or wanted.size))


def resize(model: nn.Module, size: Size) -> None:
    host, _ = find_host(model)
    assert host.resize(model, size) == size, "choose sizes of whole patches"


def answer(model: nn.Module, images: Tensor) -> Tensor:
    host, _ = find_host(model)
    with torch.no_grad():
        return host.output(host.feed(model, images))


def identity_law(model: nn.Module, size: Size | None = None) -> None:
    images = pictures(model, size)
    before = answer(model, images)
    assert before.abs().max() > 1e-3, "the model says nothing, so nothing is tested"
    after = answer(mh.convert(model, everywhere(mh.Softmax())), images)
    difference = (after - before).abs().max() / before.abs().max()
    assert difference <= 1e-5, f"logits moved by {difference:.1e}"


def refused(model: nn.Module, spec: AttentionSpec) -> bool:
    """Say whether the mechanism cannot serve this model; then it must say so."""
    _, sites = find_host(model)
    named = [
        site.attention_path
        for site in sites
        if not site.fixed and not spec.exempt(site.geometry) and _refuses(site, spec)
    ]
    if not named:
        return False
    with pytest.raises(SwapRefused, match=re.escape(named[0])):
        mh.convert(model, everywhere(spec))
    return True


def _refuses(site: Site, spec: AttentionSpec) -> bool:
    fewer = spec.num_query_heads(site.geometry) < site.geometry.num_heads
    reduced = site.geometry.reduced_keys is not None and not spec.takes_reduced_keys
    refused = spec.problem(site.geometry) or (fewer and site.fixed_query_heads)
    return bool(refused or reduced)


def mechanism_law(
    model: nn.Module, spec: AttentionSpec, size: Size | None = None
) -> nn.Module:
    """Twin and map: what runs inside the real model equals its slow form."""
    student = randomise(_converted(model, spec))
    met: list[tuple[Mechanism, tuple[Any, ...], Tensor]] = []

    def note(module: Mechanism, args: tuple[Any, ...], out: Tensor) -> None:
        met.append((module, args, out))

    cores = [m for m in student.modules() if isinstance(m, Mechanism)]
    for core in cores:
        core.register_forward_hook(note)
    result = answer(student, pictures(student, size))
    assert result.isfinite().all()
    assert len(met) >= len(cores) > 0
    for core, (q, k, v, *rest), out in met:
        assert_close(out, core.reference(q, k, v, *rest), slack=10)
    return student


def untouched_law(
    model: nn.Module, spec: AttentionSpec, size: Size | None = None
) -> None:
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    images = pictures(model, size)
    said = answer(model, images)
    _converted(model, spec)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(answer(model, images), said)


def cost_law(model: nn.Module, *specs: AttentionSpec, size: Size | None = None) -> None:
    """What torch counts less the closed forms is the rest, which no swap changes."""
    plain = mh.cost(model, image_size=size)
    _, sites = find_host(model)
    for spec in specs:
        student = _converted(model, spec)
        swapped = mh.cost(student, image_size=size)
        assert plain.ledger.rest == swapped.ledger.rest >= 0
        assert swapped.num_parameters == sum(p.numel() for p in student.parameters())
        for site, block in zip(sites, swapped.blocks, strict=True):
            assert block.projections > 0 or site.fixed
            assert block.attention_matrices > 0 or site.fixed


def resolution_law(
    model: nn.Module, spec: AttentionSpec, size: Size, resized: nn.Module
) -> None:
    """A student that is resized says what the student of the resized teacher says."""
    student = _converted(model, spec)
    resize(student, size)
    images = pictures(student, size)
    assert_close(answer(student, images), answer(_converted(resized, spec), images))
    assert mh.cost(student, image_size=size).ledger.fed_size == size


def compact_law(model: nn.Module) -> nn.Module:
    student = mh.convert(model, COMPACT)
    assert answer(student, pictures(student)).isfinite().all()
    was, now = (sum(p.numel() for p in m.parameters()) for m in (model, student))
    assert now < was
    _, sites = find_host(student)
    assert all(site.ffn == mh.Compact(rank=0.5) for site in sites)
    return student


def round_trip_law(model: nn.Module, recipe: mh.Recipe, folder: Any) -> nn.Module:
    student = mh.convert(model, recipe).eval()
    again = mh.load(mh.save(student, folder))
    images = pictures(student)
    assert torch.equal(answer(again, images), answer(student, images))
    assert find_host(again)[1] == find_host(student)[1]
    return again


def grids_seen(student: nn.Module) -> list[Any]:
    """The token grids that the converted layers read after the last image."""
    layers = [m for m in student.modules() if mechanism_of(m) is not None]
    return [m.token_grid() for m in layers if m.token_grid is not None]


def _converted(model: nn.Module, spec: AttentionSpec) -> nn.Module:
    return mh.convert(model, everywhere(spec)).eval()
