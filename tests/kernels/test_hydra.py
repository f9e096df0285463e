"""The fused Hydra operator against its slow twin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from manyheads.attention.hydra import hydra_attention
from manyheads.kernels import hydra as kernel
from tests.helpers import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOKENS = [1, 2, 63, 197, 257, 2049]


def _qkv(
    batch: int, num_tokens: int, dim: int = 24, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        torch.randn(batch, num_tokens, dim, dtype=torch.float64).to(dtype)
        for _ in range(3)
    )
    return q, k, v


def _gradients(form: object, inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = form(*leaves)  # type: ignore[operator]
    return list(torch.autograd.grad(out, leaves, grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_output_and_gradients_equal_the_twins(
    num_tokens: int, dtype: torch.dtype
) -> None:
    inputs = _qkv(2, num_tokens, dtype=dtype)
    grad = torch.randn_like(inputs[0])
    assert_close(kernel.hydra(*inputs, None), hydra_attention(*inputs))
    ours = _gradients(lambda q, k, v: kernel.hydra(q, k, v, None), inputs, grad)
    twins = _gradients(hydra_attention, inputs, grad)
    for mine, theirs in zip(ours, twins, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize(("num_tokens", "num_keys"), [(9, 4), (3, 8)])
def test_keys_may_be_fewer_or_more_than_queries(num_tokens: int, num_keys: int) -> None:
    q, (_, k, v) = _qkv(2, num_tokens)[0], _qkv(2, num_keys)
    grad = torch.randn_like(q)
    assert_close(kernel.hydra(q, k, v, None), hydra_attention(q, k, v))
    ours = _gradients(lambda *x: kernel.hydra(*x, None), (q, k, v), grad)
    twins = _gradients(hydra_attention, (q, k, v), grad)
    for mine, theirs in zip(ours, twins, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("tile", [1, 2 * 4 * 24, 1 << 20], ids=["one", "two", "all"])
@pytest.mark.parametrize(("batch", "num_tokens"), [(1, 7), (5, 3), (3, 8), (4, 1)])
def test_every_way_of_cutting_tiles_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, batch: int, num_tokens: int, tile: int
) -> None:
    monkeypatch.setattr(kernel, "_TILE_BYTES", tile)
    inputs = _qkv(batch, num_tokens)
    mask = torch.rand(batch, num_tokens) > 0.3
    grad = torch.randn_like(inputs[0])
    assert_close(kernel.hydra(*inputs, mask), hydra_attention(*inputs, key_mask=mask))
    ours = _gradients(lambda q, k, v: kernel.hydra(q, k, v, mask), inputs, grad)
    twins = _gradients(
        lambda q, k, v: hydra_attention(q, k, v, key_mask=mask), inputs, grad
    )
    for mine, theirs in zip(ours, twins, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("batch", "num_tokens", "dim"),
    [(1, 8160, 768), (3, 16384, 768), (8, 197, 384), (3, 1, 7), (2, 0, 4)],
)
def test_tiles_cover_every_token_once_and_stay_in_their_room(
    batch: int, num_tokens: int, dim: int
) -> None:
    x = torch.zeros(batch, num_tokens, 1).expand(-1, -1, dim)
    seen = torch.zeros(batch, num_tokens)
    for tile in kernel.tiles(x):
        seen[tile] += 1
        assert 4 * x[tile].numel() <= 64 * 2**20
    assert (seen == 1).all()


def test_an_odd_width_and_packed_inputs_are_read_in_place() -> None:
    packed = torch.randn(2, 300, 3 * 25)
    q, k, v = packed.split(25, dim=-1)
    assert not q.is_contiguous()
    assert_close(kernel.hydra(q, k, v, None), hydra_attention(q, k, v))
    q, k, v = torch.randn(3, 2, 25, 300).transpose(2, 3).unbind(0)
    assert_close(kernel.hydra(q, k, v, None), hydra_attention(q, k, v))


def test_a_masked_key_may_hold_anything() -> None:
    q, k, v = _qkv(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    expected = kernel.hydra(q, k, v, mask)
    k[1, 6:], v[1, 6:] = torch.inf, torch.nan
    assert torch.equal(kernel.hydra(q, k, v, mask), expected)
    short = hydra_attention(q[1:, :6], k[1:, :6], v[1:, :6])
    assert_close(expected[1:, :6], short)


def test_without_any_key_the_output_is_zero() -> None:
    q, k, v = _qkv(1, 4)
    nobody = torch.zeros(1, 4, dtype=torch.bool)
    assert (kernel.hydra(q, k, v, nobody) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_vectors_give_zero_and_finite_gradients(dtype: torch.dtype) -> None:
    q, k, v = _qkv(2, 5, dtype=dtype)
    q[0, 2], k[1, 3] = 0.0, 0.0
    out = kernel.hydra(q, k, v, None)
    assert (out[0, 2] == 0).all()
    assert_close(out, hydra_attention(q, k, v))
    grads = _gradients(lambda *x: kernel.hydra(*x, None), (q, k, v), torch.ones_like(q))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("size", [6e-8, 1e-4, 6e4], ids=["tiny", "small", "huge"])
def test_half_precision_survives_extreme_lengths(size: float) -> None:
    q, k, v = _qkv(2, 33, dtype=torch.float16)
    q, k = ((x.sign() * size).half() for x in (q, k))
    assert_close(kernel.hydra(q, k, v, None), hydra_attention(q, k, v))


def test_a_million_tokens_are_summed_exactly_enough() -> None:
    inputs = _qkv(1, 1_000_000, dim=3, dtype=torch.float32)
    assert_close(kernel.hydra(*inputs, None), hydra_attention(*inputs))
    exact = hydra_attention(*(x.double() for x in inputs)).float()
    assert_close(kernel.hydra(*inputs, None), exact)


def test_the_gradient_of_the_summary_is_exact() -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(2, 6, dim=5))
    torch.autograd.gradcheck(
        lambda *x: kernel.hydra_and_summary(*x, None), (q, k, v), fast_mode=True
    )


def test_the_form_is_chosen_by_device() -> None:
    assert kernel.choose_form(torch.empty(1, 2, 8)) == "passes"
    assert kernel.choose_form(torch.empty(1, 2, 8, device="meta")) == "passes"


def test_given_memory_is_filled_and_returned() -> None:
    inputs = _qkv(2, 70, dtype=torch.float32)
    out = torch.full_like(inputs[0], torch.nan)
    assert kernel.hydra_into(out, *inputs) is out
    assert torch.equal(out, kernel.hydra(*inputs, None))


# torch's own check looks at the gradient of a copy that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_keeps_the_rules_of_torch_library(masked: bool) -> None:
    inputs = [x.requires_grad_() for x in _qkv(2, 5, 8, torch.float32)]
    mask = torch.rand(2, 5) > 0.5 if masked else None
    torch.library.opcheck(kernel.hydra_and_summary, (*inputs, mask))


def test_work_is_counted_on_the_meta_device() -> None:
    q, k, v = (torch.empty(2, 197, 24, device="meta") for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        kernel.hydra(q, k, v, None)
    assert counter.get_total_flops() == 2 * 2 * 2 * 197 * 24


_EXPORT = """
import torch
from manyheads.attention import Hydra
from manyheads.attention.hydra import hydra_attention
from manyheads.geometry import Geometry

geometry = Geometry(
    dim=24, num_heads=4, head_dim=6, num_prefix_tokens=1, grid=None, scale=6**-0.5
)
core = Hydra().build(geometry)
q, k, v = (torch.randn(2, 17, 4, 6) for _ in range(3))
tokens = torch.export.Dim("tokens", min=2, max=4096)
program = torch.export.export(
    core, (q, k, v), dynamic_shapes=({1: tokens}, {1: tokens}, {1: tokens})
)
assert "manyheads" not in program.graph_module.code, program.graph_module.code
longer = tuple(torch.randn(2, 300, 4, 6) for _ in range(3))
expected = hydra_attention(*(x.flatten(2) for x in longer)).reshape(2, 300, 4, 6)
torch.testing.assert_close(program.module()(*longer), expected)
"""

_COMPILE = """
import torch
from manyheads.kernels.hydra import hydra

def both(q, k, v):
    return hydra(q * 2, k, v, None) + 1

inputs = [torch.randn(2, 19, 8, requires_grad=True) for _ in range(3)]
compiled = torch.compile(both, fullgraph=True)(*inputs)
torch.testing.assert_close(compiled, both(*inputs))
ours = torch.autograd.grad(compiled.sum(), inputs)
eager = torch.autograd.grad(both(*inputs).sum(), inputs)
torch.testing.assert_close(ours, eager)

with torch.autocast("cpu", torch.bfloat16):
    compiled = torch.compile(both, fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, both(*inputs))
assert torch.compile(hydra, fullgraph=True)(*inputs, None).dtype == torch.float32
"""


def _run_plain(script: str) -> None:
    """Run in a process of its own, without the tests' type-checking import hook."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_export_gives_plain_operators_that_run_at_another_token_count() -> None:
    _run_plain(_EXPORT)


@pytest.mark.slow
def test_compiled_in_one_graph_it_gives_the_same() -> None:
    _run_plain(_COMPILE)
