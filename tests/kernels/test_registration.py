"""Every operator under autocast: it sees the type that matrix products give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from manyheads.kernels import hallucinated, hydra, interactive

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
