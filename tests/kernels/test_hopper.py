"""The kernels as an H200's compiler sees them: they fit, and registers suffice."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from manyheads.kernels.thin_maps import Mixes
from tests.kernels.devices import INTERPRETED

pytest.importorskip("triton")
from manyheads.kernels import (
    triton_attention,
    triton_gather,
    triton_hydra,
    triton_interactive,
)
from tests.kernels.hopper import SHARED_BYTES, Kernel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled"),
]
HALF = torch.bfloat16


def _watch(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Kernel]:
    """Let every launch of the module compile instead."""
    kernels = []
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        kernel = Kernel(kernel=getattr(module, name))
        monkeypatch.setattr(module, name, kernel)
        kernels.append(kernel)
    return kernels


def _hold(kernels: list[Kernel], *, stack: int = 0) -> None:
    """Hold what all took against what there is; a stack is memory, not registers."""
    for kernel in kernels:
        name = kernel.kernel.__name__
        assert kernel.registers, f"{name} was not launched"
        assert max(kernel.stack) <= stack, f"{name} takes {kernel.stack} of stack"
        assert max(kernel.shared) <= SHARED_BYTES, name


@pytest.mark.parametrize("dim", [384, 768, 1000, 4096, 8192])
@pytest.mark.parametrize("masked", [False, True])
def test_hydra(monkeypatch: pytest.MonkeyPatch, dim: int, masked: bool) -> None:
    kernels = _watch(monkeypatch, triton_hydra)
    q, k, v = torch.zeros(1, 1024, 3 * dim, dtype=HALF).split(dim, dim=-1)
    mask = torch.ones(1, 1024, dtype=torch.bool) if masked else None
    out = torch.empty(1, 1024, dim, dtype=HALF)
    summary = triton_hydra.forward(out, q, k, v, mask)
    triton_hydra.backward(out, q, k, v, mask, summary, summary)
    _hold(kernels, stack=16)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(6, 64), (12, 64), (16, 128)])
@pytest.mark.parametrize("before", [False, True])
def test_interactive(
    monkeypatch: pytest.MonkeyPatch, num_heads: int, head_dim: int, before: bool
) -> None:
    kernels = _watch(monkeypatch, triton_gather) + _watch(
        monkeypatch, triton_interactive
    )
    qkv = torch.zeros(1, 1024, 3, num_heads, head_dim, dtype=HALF).unbind(2)
    marks = torch.zeros(2, 1, 50, num_heads, head_dim, dtype=HALF).unbind(0)
    eye = torch.eye(num_heads)
    mixes = Mixes(*((eye, eye) if before else (None, eye)) * 2)
    triton_interactive.forward(*qkv, *marks, 0.1, mixes, None, None)
    _hold(kernels, stack=1024 if head_dim > 64 or before else 128)


@pytest.mark.parametrize("widths", [(64, 128), (64, 64), (64, 192)])
def test_two_widths(monkeypatch: pytest.MonkeyPatch, widths: tuple[int, int]) -> None:
    kernels = _watch(monkeypatch, triton_attention)
    q, v = (torch.zeros(1, 1024, 6, width, dtype=HALF) for width in widths)
    out, log = triton_attention.forward(q, q, v, None, 0.1)
    triton_attention.backward(out, q, q, v, None, out, log, 0.1)
    _hold(kernels, stack=16)
