"""Ordinary attention: the maps are those of torch's fused form, masks included."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from manyheads.attention import Softmax
from manyheads.attention.softmax import softmax_maps
from manyheads.geometry import Geometry
from tests.helpers import assert_close

GEOMETRY = Geometry(
    dim=8, num_heads=2, head_dim=4, num_prefix_tokens=0, grid=None, scale=0.3
)


def _qkv() -> list[Tensor]:
    return [torch.randn(2, 6, 2, 4, dtype=torch.float64) for _ in range(3)]


def test_rows_of_the_maps_sum_to_one() -> None:
    q, k, _ = _qkv()
    maps = softmax_maps(q, k, 0.3)
    assert_close(maps.sum(dim=-1), torch.ones_like(maps[..., 0]))


@pytest.mark.parametrize("shape", [(2, 6), (2, 1, 1, 6), (1, 1, 6, 6), (2, 2, 6, 6)])
def test_every_shape_of_mask_means_the_same_fast_and_slow(
    shape: tuple[int, ...],
) -> None:
    core, (q, k, v) = Softmax().build(GEOMETRY), _qkv()
    for mask in (torch.rand(shape) > 0.4, torch.randn(shape, dtype=torch.float64)):
        assert_close(core(q, k, v, mask), core.reference(q, k, v, mask))


def test_a_query_without_any_key_attends_to_nothing() -> None:
    core, (q, k, v) = Softmax().build(GEOMETRY), _qkv()
    mask = torch.tensor([[False] * 6, [True] * 6])
    for form in (core, core.reference):
        assert form(q, k, v, mask)[0].abs().max() == 0


def test_the_scale_of_the_host_is_used() -> None:
    core, (q, k, v) = Softmax().build(GEOMETRY), _qkv()
    scores = 0.3 * torch.einsum("bnhk,bmhk->bhnm", q, k)
    expected = torch.einsum("bhnm,bmhk->bnhk", scores.softmax(-1), v)
    assert_close(core(q, k, v), expected)


def test_map_entries_are_dropped_in_training_as_the_host_does() -> None:
    dropping = dataclasses.replace(GEOMETRY, attention_dropout=0.5)
    core, (q, k, v) = Softmax().build(dropping), _qkv()
    assert not torch.equal(core.train()(q, k, v), core.train()(q, k, v))
    assert torch.equal(core.eval()(q, k, v), core(q, k, v))
