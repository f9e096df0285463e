"""Hydra's Triton kernels against the slow twin, interpreted or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.attention.hydra import hydra_attention
from manyheads.kernels import hydra as kernel
from tests.helpers import assert_close
from tests.kernels.devices import DEVICES

triton_hydra = pytest.importorskip("manyheads.kernels.triton_hydra")
launching = pytest.importorskip("manyheads.kernels.launching")
pytestmark = pytest.mark.parametrize("device", DEVICES)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes tensors on the CPU, where `choose_form` knows better."""
    monkeypatch.setattr(kernel, "choose_form", lambda q: "triton")


def _qkv(
    device: str,
    num_tokens: int,
    num_keys: int | None = None,
    *,
    batch: int = 2,
    dim: int = 24,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    counts = (num_tokens, num_keys or num_tokens, num_keys or num_tokens)
    return tuple(
        torch.randn(batch, n, dim, dtype=torch.float64).to(device, dtype)
        for n in counts
    )


def _compare(inputs: tuple[Tensor, ...], mask: Tensor | None = None) -> None:
    """Hold output and gradients against the twin's."""
    grad = torch.randn_like(inputs[0])
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = kernel.hydra(*leaves, mask)
    assert out.is_contiguous()
    twins_leaves = [x.detach().requires_grad_() for x in inputs]
    twins_out = hydra_attention(*twins_leaves, key_mask=mask)
    assert_close(out, twins_out)
    ours = torch.autograd.grad(out, leaves, grad)
    twins = torch.autograd.grad(twins_out, twins_leaves, grad)
    for mine, theirs in zip(ours, twins, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 197, 257])
def test_output_and_gradients_equal_the_twins(
    device: str, num_tokens: int, dtype: torch.dtype
) -> None:
    _compare(_qkv(device, num_tokens, dtype=dtype))


@pytest.mark.parametrize("dim", [1, 7, 33, 768, 1000, 4096])
def test_any_width_will_do(device: str, dim: int) -> None:
    _compare(_qkv(device, 19, dim=dim, batch=1))


@pytest.mark.parametrize(("num_tokens", "num_keys"), [(9, 4), (3, 70)])
def test_keys_may_be_fewer_or_more_than_queries(
    device: str, num_tokens: int, num_keys: int
) -> None:
    _compare(_qkv(device, num_tokens, num_keys))


@pytest.mark.parametrize("programs", [1, 3, 1 << 20])
@pytest.mark.parametrize("tile", [32, 256])
def test_every_way_of_sharing_out_tokens_gives_the_same(
    device: str, monkeypatch: pytest.MonkeyPatch, programs: int, tile: int
) -> None:
    monkeypatch.setattr(launching, "_PROGRAMS", programs)
    monkeypatch.setattr(launching, "_TILE", tile)
    monkeypatch.setattr(launching, "_LEAST_TILES", 1)
    monkeypatch.setattr(triton_hydra, "_SPLITS", 4)
    inputs = _qkv(device, 35)
    _compare(inputs, (torch.rand(2, 35) > 0.3).to(device))


def test_packed_and_transposed_inputs_are_read_in_place(device: str) -> None:
    packed = torch.randn(2, 70, 3 * 25, device=device)
    _compare(packed.split(25, dim=-1))
    _compare(torch.randn(3, 2, 25, 70, device=device).transpose(2, 3).unbind(0))
    inputs = _qkv(device, 5)
    leaves = [x.requires_grad_() for x in inputs]
    # The gradient of a sum has no strides at all.
    ours = torch.autograd.grad(kernel.hydra(*leaves, None).sum(), leaves)
    twins = torch.autograd.grad(hydra_attention(*leaves).sum(), leaves)
    for mine, theirs in zip(ours, twins, strict=True):
        assert_close(mine, theirs)


def test_a_masked_key_may_hold_anything(device: str) -> None:
    q, k, v = _qkv(device, 9)
    mask = torch.ones(1, 9, dtype=torch.bool, device=device)
    mask[0, 6:] = False
    mask = mask.expand(2, 9)
    _compare((q, k, v), mask)
    expected = kernel.hydra(q, k, v, mask)
    k[:, 6:], v[:, 6:] = torch.inf, torch.nan
    assert torch.equal(kernel.hydra(q, k, v, mask), expected)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(kernel.hydra(*leaves, mask).sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[1][:, 6:] == 0).all()
    assert (grads[2][:, 6:] == 0).all()


def test_without_any_key_output_and_gradients_are_zero(device: str) -> None:
    leaves = [x.requires_grad_() for x in _qkv(device, 4)]
    nobody = torch.zeros(2, 4, dtype=torch.bool, device=device)
    out = kernel.hydra(*leaves, nobody)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all((x == 0).all() for x in (out, *grads))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_nothing_gives_nothing(device: str, shape: tuple[int, ...]) -> None:
    leaves = [torch.zeros(shape, device=device, requires_grad=True) for _ in range(3)]
    out = kernel.hydra(*leaves, None)
    assert out.shape == shape
    assert torch.autograd.grad(out.sum(), leaves)[1].shape == shape


def test_no_keys_at_all_give_zeros(device: str) -> None:
    q = torch.randn(2, 3, 8, device=device)
    none = torch.zeros(2, 0, 8, device=device)
    assert (kernel.hydra(q, none, none, None) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_vectors_give_zero_and_finite_gradients(
    device: str, dtype: torch.dtype
) -> None:
    q, k, v = _qkv(device, 5, dtype=dtype)
    q[0, 2], k[1, 3] = 0.0, 0.0
    _compare((q, k, v))


@pytest.mark.parametrize("size", [6e-8, 1e-4, 6e4], ids=["tiny", "small", "huge"])
def test_half_precision_survives_extreme_lengths(device: str, size: float) -> None:
    q, k, v = _qkv(device, 33, dtype=torch.float16)
    q, k = ((x.sign() * size).half() for x in (q, k))
    assert_close(kernel.hydra(q, k, v, None), hydra_attention(q, k, v))


def test_nan_is_not_hidden(device: str) -> None:
    q, k, v = _qkv(device, 5)
    q[0, 1, 0] = torch.nan
    out = kernel.hydra(q, k, v, None)
    assert out[0, 1].isnan().all()
    assert out[0, 0].isfinite().all()


def test_the_same_call_repeats_bit_for_bit(device: str) -> None:
    leaves = [x.requires_grad_() for x in _qkv(device, 300, dtype=torch.float32)]
    runs = []
    for _ in range(2):
        out = kernel.hydra(*leaves, None)
        runs.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_given_memory_is_filled_and_returned(device: str) -> None:
    inputs = _qkv(device, 70, dtype=torch.float32)
    out = torch.full_like(inputs[0], torch.nan)
    assert kernel.hydra_into(out, *inputs) is out
    assert torch.equal(out, kernel.hydra(*inputs, None))


def test_the_gradient_of_the_summary_is_exact(device: str) -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(device, 6, dim=5))
    torch.autograd.gradcheck(
        lambda *x: kernel.hydra_and_summary(*x, None), (q, k, v), fast_mode=True
    )


def test_a_long_sequence_is_shared_out(device: str) -> None:
    num_tokens = 1_000_000 if device == "cuda" else 20_000
    _compare(_qkv(device, num_tokens, batch=1, dim=5, dtype=torch.float32))
