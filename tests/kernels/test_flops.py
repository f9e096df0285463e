"""What operators report of their backward passes, beside what these do."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from manyheads.attention.softmax import masked_softmax
from manyheads.kernels.hallucinated import wide_attention
from manyheads.kernels.hydra import hydra
from manyheads.kernels.interactive import Mixes, interactive_backward
from manyheads.kernels.thin_maps import thin_gradients
from manyheads.kernels.two_widths import two_width_attention

B, N, S, H, E, V = 2, 7, 5, 3, 4, 10
MIXES = list(itertools.product((False, True), repeat=4))


def _multiply_adds(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def _backward(call: Callable[..., Tensor], *leaves: Tensor) -> int:
    out = call(*leaves)
    return _multiply_adds(
        lambda: torch.autograd.grad(out, leaves, torch.empty_like(out))
    )


def _leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]


def _wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed: Tensor = wide_attention(q, k, v, None, 0.5)
    return mixed


def _two_widths(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed: Tensor = two_width_attention(q, k, v, None, 0.5)[0]
    return mixed


def _by_maps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    maps = masked_softmax(torch.einsum("bnhk,bmhk->bhnm", q, k), None)
    return torch.einsum("bhnm,bmhk->bnhk", maps, v)


@pytest.mark.parametrize("operator", [_wide, _two_widths])
def test_attention_pays_for_four_products_and_for_the_maps_again(
    operator: Callable[..., Tensor],
) -> None:
    leaves = _leaves((B, N, H, E), (B, S, H, E), (B, S, H, V))
    maps_again = B * H * N * S * E
    found = _backward(operator, *leaves)
    assert found == _backward(_by_maps, *leaves) + maps_again
    # By hand: dq, dk and the maps are E wide, dv and the maps' gradient V wide.
    assert found == 2 * 3 * 7 * 5 * (3 * 4 + 2 * 10)


def test_hydra_pays_for_a_sum_over_queries_and_three_gates() -> None:
    q, k, v = _leaves((B, N, 8), (B, S, 8), (B, S, 8))
    sum_over_queries, gate_of_dq = B * 7 * 8, B * 7 * 8
    gates_of_dk_and_dv = 2 * B * 5 * 8
    expected = sum_over_queries + gate_of_dq + gates_of_dk_and_dv
    assert _backward(lambda *x: hydra(*x, None), q, k, v) == expected


@pytest.mark.parametrize("places", MIXES, ids=lambda p: "".join("-x"[x] for x in p))
def test_interactive_attention_pays_for_what_it_multiplies(
    places: tuple[bool, ...],
) -> None:
    counts = (7, 7, 7, 4, 4)
    inputs = [torch.randn(B, n, H, E) for n in counts]
    grad = torch.randn(B, 7, H, E)
    mixes = Mixes(*(torch.randn(H, H) if place else None for place in places))
    found = _multiply_adds(
        lambda: interactive_backward(grad, *inputs, 0.3, *mixes, None, None)
    )
    done = _multiply_adds(
        lambda: thin_gradients(grad, (*inputs,), 0.3, mixes, None, None)
    )
    assert found == done
    # By hand: both maps and the summary again, two products for each of the four of
    # forward, the scores again for a mix before them, three products of each mix.
    pairs = 2 * 7 * 4 * 3
    scores = places[0] + places[2]
    assert found == pairs * (4 * (3 + 8 + scores) + 3 * 3 * sum(places))
