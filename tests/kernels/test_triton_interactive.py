"""Interactive attention's Triton kernels against the plain form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.attention.interactive import interactive_attention, interactive_maps
from manyheads.kernels import interactive as kernel
from manyheads.kernels.interactive import Mixes
from tests.helpers import assert_close
from tests.kernels.devices import DEVICES

triton_gather = pytest.importorskip("manyheads.kernels.triton_gather")
pytestmark = pytest.mark.parametrize("device", DEVICES)

PLACES = [(0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 1, 0), (1, 1, 1, 1), (0, 1, 1, 0)]


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "choose_form", lambda *_, **__: "triton")


def _inputs(
    device: str,
    num_tokens: int,
    *,
    landmarks: int = 5,
    num_heads: int = 3,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    counts = (num_tokens, num_tokens, num_tokens, landmarks, landmarks)
    return tuple(
        torch.randn(2, n, num_heads, head_dim).to(device, dtype) for n in counts
    )


def _mixes(places: tuple[int, ...], num_heads: int, device: str) -> Mixes:
    eye = torch.eye(num_heads)
    return Mixes(
        *(
            (eye + 0.3 * torch.randn(num_heads, num_heads)).to(device)
            if place
            else None
            for place in places
        )
    )


def _both(
    inputs: tuple[Tensor, ...],
    mixes: Mixes,
    kept: Tensor | None = None,
    marked: Tensor | None = None,
    scale: float = 0.35,
) -> list[list[Tensor]]:
    """Give output and gradients of both forms, the plain one in float32 at least."""
    results = []
    for form in ("triton", "plain"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        wanted = [mix.detach().requires_grad_() for mix in mixes if mix is not None]
        left = iter(wanted)
        given = Mixes(*(None if mix is None else next(left) for mix in mixes))
        read = leaves if form == "triton" else [_at_least_float(x) for x in leaves]
        out = kernel.attend(
            *read,
            scale=scale,
            mixes=given,
            kept=kept,
            marked=marked,
            form=form,  # type: ignore[arg-type]
        )
        torch.manual_seed(1)
        grad = torch.randn(out.shape).to(out)
        grads = torch.autograd.grad(out, [*leaves, *wanted], grad)
        results.append([out.to(inputs[0].dtype), *grads])
    return results


def _at_least_float(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize == 2 else x


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_output_and_gradients_equal_the_plain_forms(
    device: str, places: tuple[int, ...], masked: bool
) -> None:
    inputs = _inputs(device, 37)
    kept = torch.rand(2, 37) > 0.4 if masked else None
    marked = torch.tensor([[True] * 3 + [False] * 2, [True] * 5]) if masked else None
    masks = [None if mask is None else mask.to(device) for mask in (kept, marked)]
    for mine, theirs in zip(
        *_both(inputs, _mixes(places, 3, device), *masks), strict=True
    ):
        assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_summed_in_float32(device: str, dtype: torch.dtype) -> None:
    if device == "cpu" and dtype is torch.bfloat16:
        return  # The interpreter multiplies matrices of bfloat16 as if integers.
    inputs = _inputs(device, 70, dtype=dtype)
    pairs = zip(*_both(inputs, _mixes((0, 1, 0, 1), 3, device)), strict=True)
    for mine, theirs in pairs:
        assert_close(mine.to(dtype), theirs.to(dtype))


@pytest.mark.parametrize(
    ("num_tokens", "landmarks", "num_heads", "head_dim"),
    [(1, 1, 1, 1), (2, 2, 16, 4), (63, 49, 2, 16), (5, 64, 3, 20), (20, 17, 5, 128)],
)
def test_odd_sizes(
    device: str, num_tokens: int, landmarks: int, num_heads: int, head_dim: int
) -> None:
    inputs = _inputs(
        device,
        num_tokens,
        landmarks=landmarks,
        num_heads=num_heads,
        head_dim=head_dim,
    )
    mixes = _mixes((1, 1, 1, 1), num_heads, device)
    ours, plain = _both(inputs, mixes, scale=head_dim**-0.5)
    assert_close(ours[0], plain[0])


@pytest.mark.parametrize("programs", [1, 1 << 20])
def test_every_way_of_sharing_out_tokens_gives_the_same(
    device: str, monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    monkeypatch.setattr(triton_gather, "_LEAST_RUN", 16)
    monkeypatch.setattr(triton_gather, "_PROGRAMS", programs)
    ours, plain = _both(_inputs(device, 51), _mixes((0, 1, 0, 1), 3, device))
    assert_close(ours[0], plain[0])


def test_a_packed_projection_is_read_in_place(device: str) -> None:
    packed = torch.randn(2, 40, 3, 3, 8, device=device)
    marks = _inputs(device, 40)[3:]
    transposed = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in marks)
    inputs = (*packed.unbind(2), *transposed)
    for mine, theirs in zip(
        *_both(inputs, _mixes((0, 1, 0, 1), 3, device)), strict=True
    ):
        assert_close(mine, theirs)


def test_without_any_key_output_and_gradients_are_zero(device: str) -> None:
    inputs = [x.requires_grad_() for x in _inputs(device, 9)]
    nobody = torch.zeros(2, 9, dtype=torch.bool, device=device)
    out = kernel.attend(
        *inputs, scale=0.3, mixes=_mixes((0, 1, 0, 1), 3, device), kept=nobody
    )
    assert (out == 0).all()
    assert all((x == 0).all() for x in torch.autograd.grad(out.sum(), inputs))


def test_the_same_call_repeats_bit_for_bit(device: str) -> None:
    inputs, mixes = _inputs(device, 50), _mixes((0, 1, 0, 1), 3, device)
    first, second = (kernel.attend(*inputs, scale=0.3, mixes=mixes) for _ in range(2))
    assert torch.equal(first, second)


def test_the_mechanism_as_a_whole_equals_its_maps(device: str) -> None:
    q, k, v = (torch.randn(2, 26, 2, 8, device=device) for _ in range(3))
    mixes = _mixes((0, 1, 0, 1), 2, device)
    kept = torch.rand(2, 26, device=device) > 0.2
    sizes = {"grid": (5, 5), "landmarks": (2, 3), "scale": 0.35, "mixes": mixes}
    for mask in (None, kept):
        maps = interactive_maps(q, k, key_mask=mask, **sizes)  # type: ignore[arg-type]
        expected = torch.einsum("bhnm,bmhk->bnhk", maps, v)
        found = interactive_attention(q, k, v, key_mask=mask, **sizes)  # type: ignore[arg-type]
        assert_close(found, expected)
