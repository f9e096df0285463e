"""The Triton kernel with two widths against the maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.attention.softmax import masked_softmax
from manyheads.kernels.hallucinated import attend
from manyheads.kernels.two_widths import two_width_attention
from tests.helpers import assert_close
from tests.kernels.devices import DEVICES

pytest.importorskip("triton")
pytestmark = pytest.mark.parametrize("device", DEVICES)


def _qkv(
    device: str,
    num_tokens: int,
    num_keys: int,
    widths: tuple[int, int] = (16, 32),
    *,
    num_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    shapes = ((num_tokens, widths[0]), (num_keys, widths[0]), (num_keys, widths[1]))
    return tuple(
        torch.randn(2, n, num_heads, width).to(device, dtype) for n, width in shapes
    )


def _twin(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    maps = masked_softmax(scale * torch.einsum("bnhk,bmhk->bhnm", q, k), mask)
    if mask is not None:
        maps = maps * mask[:, None, None]
    return torch.einsum("bhnm,bmhk->bnhk", maps, v)


def _compare(
    inputs: tuple[Tensor, ...], mask: Tensor | None = None, slack: float = 1.0
) -> None:
    dtype, scale = inputs[0].dtype, inputs[0].shape[-1] ** -0.5
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves, mask, scale, form="triton")
    twins = [x.detach().float().requires_grad_() for x in inputs]
    expected = _twin(*twins, mask, scale)
    assert_close(out, expected.to(dtype), slack=slack)
    grad = torch.randn_like(out)
    pairs = zip(
        torch.autograd.grad(out, leaves, grad),
        torch.autograd.grad(expected, twins, grad.float()),
        strict=True,
    )
    for mine, theirs in pairs:
        assert_close(mine, theirs.to(dtype), slack=slack)


@pytest.mark.parametrize("widths", [(16, 32), (8, 16), (20, 60), (33, 7), (64, 128)])
@pytest.mark.parametrize(("num_tokens", "num_keys"), [(1, 1), (63, 63), (5, 130)])
def test_output_and_gradients_equal_the_twins(
    device: str, num_tokens: int, num_keys: int, widths: tuple[int, int]
) -> None:
    # With a single key the gradient of the scores is zero: the rest is rounding.
    slack = 10.0 if num_keys == 1 else 1.0
    _compare(_qkv(device, num_tokens, num_keys, widths), slack=slack)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_summed_in_float32(device: str, dtype: torch.dtype) -> None:
    if device == "cpu" and dtype is torch.bfloat16:
        return  # The interpreter multiplies matrices of bfloat16 as if integers.
    _compare(_qkv(device, 197, 197, dtype=dtype))


def test_autocast_runs_it_in_the_type_it_was_asked_for(device: str) -> None:
    inputs = [x.requires_grad_() for x in _qkv(device, 33, 33)]
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    with torch.autocast(device, dtype):
        found = attend(*inputs, None, 0.25, form="triton")
    assert found.dtype is dtype
    assert_close(found, _twin(*inputs, None, 0.25).to(dtype))
    for grad in torch.autograd.grad(found.float().sum(), inputs):
        assert grad.dtype is torch.float32
        assert grad.isfinite().all()
    doubles = [x.detach().double() for x in inputs]
    with torch.autocast(device, dtype):
        assert attend(*doubles, None, 0.25, form="triton").dtype is torch.float64


def test_masked_keys_have_no_weight_and_no_gradient(device: str) -> None:
    inputs = _qkv(device, 9, 70)
    mask = torch.rand(2, 70) > 0.5
    mask[1] = False
    _compare(inputs, mask.to(device))


def test_packed_and_transposed_inputs_are_read_in_place(device: str) -> None:
    packed = torch.randn(2, 40, 2, 64, device=device)
    _compare(packed.split((16, 16, 32), dim=-1))
    heads_first = torch.randn(3, 2, 2, 40, 16, device=device).transpose(2, 3)
    _compare(heads_first.unbind(0))


def test_the_same_call_repeats_bit_for_bit(device: str) -> None:
    leaves = [x.requires_grad_() for x in _qkv(device, 70, 70)]
    runs = []
    for _ in range(2):
        out = attend(*leaves, None, 0.3, form="triton")
        runs.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


# torch's own check looks at the gradient of a copy that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_keeps_the_rules_of_torch_library(
    device: str, masked: bool
) -> None:
    inputs = [x.requires_grad_() for x in _qkv(device, 9, 7, (4, 12))]
    mask = torch.rand(2, 7, device=device) > 0.3 if masked else None
    torch.library.opcheck(two_width_attention, (*inputs, mask, 0.5))
