"""Every operator under autocast: it sees the type that matrix products give."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from manyheads.attention.hydra import hydra_attention
from manyheads.attention.softmax import masked_softmax
from manyheads.kernels import hallucinated, hydra, interactive
from manyheads.kernels import hallucinated_whole as whole
from manyheads.kernels.interactive import Mixes
from tests.helpers import assert_close

Operator = Callable[..., Tensor]


def _hydra(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hydra.hydra(*(x.flatten(2) for x in (q, k, v)), None)


def _wide_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed: Tensor = hallucinated.wide_attention(q, k, torch.cat([v, v], -1), None, 0.5)
    return mixed


def _interactive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mix = torch.eye(2) + 0.1
    rest = (0.5, None, mix, None, mix, None, None)
    mixed: Tensor = interactive.interactive(q, k, v, q[:, :3], k[:, :3], *rest)
    return mixed


def _by_maps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    maps = masked_softmax(0.5 * torch.einsum("bnhk,bmhk->bhnm", q, k), None)
    return torch.einsum("bhnm,bmhk->bnhk", maps, v)


def _plain_interactive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixes = Mixes(after_queries=torch.eye(2) + 0.1, after_keys=torch.eye(2) + 0.1)
    marks = q[:, :3], k[:, :3]
    return interactive.attend(q, k, v, *marks, scale=0.5, mixes=mixes, form="plain")


SLOW_TWINS = {
    _interactive: _plain_interactive,
    _hydra: lambda q, k, v: hydra_attention(*(x.flatten(2) for x in (q, k, v))),
    _wide_attention: lambda q, k, v: _by_maps(q, k, torch.cat([v, v], -1)),
}
OPERATORS = [
    pytest.param(_interactive, id="interactive"),
    pytest.param(_hydra, id="hydra"),
    pytest.param(_wide_attention, id="wide_attention"),
]


def _qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 9, 2, 4, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_runs_the_operator_in_the_type_it_was_asked_for(
    operator: Operator, dtype: torch.dtype
) -> None:
    inputs = _qkv()
    with torch.autocast("cpu", dtype):
        found = operator(*inputs)
        product = inputs[0] @ inputs[1].mT
    assert found.dtype == product.dtype == dtype
    assert torch.equal(found, operator(*(x.to(dtype) for x in inputs)))
    # Backward runs outside of autocast, as torch advises.
    for grad in torch.autograd.grad(found.float().sum(), inputs):
        assert grad.dtype == torch.float32
        assert grad.isfinite().all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_under_autocast_it_stays_with_its_slow_twin(operator: Operator) -> None:
    inputs = _qkv()
    expected = SLOW_TWINS[operator](*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = operator(*inputs)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected.bfloat16())


def test_the_operator_for_inference_follows_autocast_too() -> None:
    q, k = _qkv()[:2]
    v = torch.randn(2, 9, 4, 4)
    centred = torch.tensor([0.0, 1.0, 0.0]).expand(2, 1, 3)
    rest = (centred, centred, [1, 1], 0, None, 0.5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = whole.hallucinated_attention(q, k, v, *rest)
    assert found.dtype == torch.bfloat16
    # Under a delta a hallucinated map is its partner's.
    twice = _by_maps(torch.cat([q, q], 2), torch.cat([k, k], 2), v)
    assert_close(found, twice.bfloat16())


def test_every_operator_with_a_forward_pass_has_a_rule_for_autocast() -> None:
    names = {name for name in dir(torch.ops.manyheads) if not name.startswith("_")}
    ours = {n for n in names if hasattr(getattr(torch.ops.manyheads, n), "default")}
    forward = {name for name in ours if not name.endswith("_backward")}
    assert forward == {
        "hallucinated_attention",
        "hydra",
        "interactive",
        "two_width_attention",
        "wide_attention",
    }
    for name, key in itertools.product(forward, ("AutocastCPU", "AutocastCUDA")):
        overload = getattr(torch.ops.manyheads, name).default
        assert overload.has_kernel_for_dispatch_key(getattr(torch.DispatchKey, key))


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_leaves_float64_as_torch_does(operator: Operator) -> None:
    inputs = _qkv(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(*inputs).dtype == torch.float64


@pytest.mark.parametrize("operator", OPERATORS)
def test_half_types_beside_each_other_meet_in_autocasts_type(
    operator: Operator,
) -> None:
    q, k, v = _qkv()
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(q, k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_may_be_switched_off_inside(operator: Operator) -> None:
    inputs = _qkv()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert operator(*inputs).dtype == torch.float32
