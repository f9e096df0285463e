"""Hydra: the twin law over kernels, types and masks, and the classic mistakes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.attention import Hydra
from manyheads.attention.hydra import hydra_attention, hydra_maps
from manyheads.errors import InvalidOption
from manyheads.geometry import Geometry
from tests.helpers import assert_close

KERNELS = ("cosine", "mean", "aft")


def _qkv(B: int, N: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(B, N, D, dtype=dtype) for _ in range(3)]


def test_cosine_divides_by_the_length_over_all_features_not_by_the_sign() -> None:
    q, k, v = _qkv(1, 5, 8)
    unit_q = q / q.norm(dim=-1, keepdim=True)
    unit_k = k / k.norm(dim=-1, keepdim=True)
    expected = unit_q * (unit_k * v).sum(dim=1, keepdim=True)
    assert_close(hydra_attention(q, k, v), expected)
    per_head = q.sign() * (k.sign() * v).sum(dim=1, keepdim=True)
    assert not torch.allclose(hydra_attention(q, k, v), per_head)


def test_it_equals_linear_attention_with_as_many_heads_as_features() -> None:
    q, k, v = _qkv(2, 7, 6)
    heads = (q / q.norm(dim=-1, keepdim=True)).unsqueeze(-1)  # [B, N, D heads, 1]
    keys = (k / k.norm(dim=-1, keepdim=True)).unsqueeze(-1)
    scores = torch.einsum("bnhd,bmhd->bhnm", heads, keys)
    expected = torch.einsum("bhnm,bmh->bnh", scores, v)
    assert_close(hydra_attention(q, k, v), expected)


def test_mean_divides_twice_by_the_root_of_the_token_count() -> None:
    q, k, v = _qkv(2, 9, 4)
    expected = q * (k * v).mean(dim=1, keepdim=True)
    assert_close(hydra_attention(q, k, v, kernel="mean"), expected)


def test_aft_takes_a_softmax_of_keys_over_tokens() -> None:
    q, k, v = _qkv(2, 9, 4)
    expected = q.sigmoid() * (k.softmax(dim=1) * v).sum(dim=1, keepdim=True)
    assert_close(hydra_attention(q, k, v, kernel="aft"), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_masked_key_is_as_if_the_token_were_not_there(kernel: str) -> None:
    q, k, v = _qkv(1, 12, 6)
    kept = torch.rand(1, 12) > 0.4
    masked = hydra_attention(q, k, v, kernel=kernel, key_mask=kept)
    dropped = hydra_attention(*(x[:, kept[0]] for x in (q, k, v)), kernel=kernel)
    assert_close(masked[:, kept[0]], dropped)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_image_without_any_kept_key_gives_zero_and_finite_gradients(
    kernel: str,
) -> None:
    tensors = [x.requires_grad_() for x in _qkv(2, 5, 4, torch.float32)]
    kept = torch.tensor([[False] * 5, [True] * 5])
    out = hydra_attention(*tensors, kernel=kernel, key_mask=kept)
    assert out[0].abs().max() == 0
    for gradient in torch.autograd.grad(out.sum(), tensors):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_zero_vector_gives_zero_not_nan(dtype: torch.dtype) -> None:
    core = Hydra().build(_geometry(8))
    q, k, v = (x.reshape(1, 5, 2, 4).to(dtype) for x in _qkv(1, 5, 8))
    q[0, 1] = 0
    k[0, 2] = 0
    for form in (core, core.reference):
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        out = form(*tensors)
        assert out.isfinite().all()
        assert out[0, 1].abs().max() == 0
        for gradient in torch.autograd.grad(out.float().sum(), tensors):
            assert gradient.isfinite().all()


def test_half_types_sum_over_tokens_in_float32() -> None:
    N = 4096
    k = torch.ones(1, N, 1, dtype=torch.float16)
    v = torch.full((1, N, 1), 0.25, dtype=torch.float16)
    core = Hydra().build(_geometry(1, heads=1))
    for form in (core, core.reference):
        out = form(*(x[..., None] for x in (k, k, v)))
        assert (out == N * 0.25).all()


def test_reference_tokens_keep_the_scale_when_the_resolution_grows() -> None:
    q, k, v = _qkv(1, 10, 6)
    often = [x.repeat(1, 4, 1) for x in (q, k, v)]
    plain = hydra_attention(*often)[:, :10]
    kept = hydra_attention(*often, reference_tokens=10)[:, :10]
    assert_close(plain, 4 * hydra_attention(q, k, v))
    assert_close(kept, hydra_attention(q, k, v, reference_tokens=10))
    assert_close(kept, hydra_attention(q, k, v))


def test_reference_tokens_count_only_unmasked_tokens() -> None:
    q, k, v = _qkv(1, 10, 6)
    kept = torch.arange(10)[None] < 5
    out = hydra_attention(q, k, v, key_mask=kept, reference_tokens=20)
    assert_close(out, 4 * hydra_attention(q, k, v, key_mask=kept))


def test_maps_are_one_of_rank_one_per_feature() -> None:
    q, k, _ = _qkv(1, 6, 5)
    maps = hydra_maps(q, k)
    assert maps.shape == (1, 5, 6, 6)
    assert torch.linalg.matrix_rank(maps[0]).tolist() == [1] * 5


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"kernel": "cosin"}, ("'cosin'", "'cosine'", "cosine, mean, aft")),
        ({"reference_tokens": 0}, ("reference_tokens=0", "reference_tokens=197")),
        ({"reference_tokens": 1.5}, ("reference_tokens=1.5",)),
        ({"kernel": "mean", "reference_tokens": 197}, ("'mean'", "does not grow")),
    ],
)
def test_bad_options_are_refused_where_they_are_written(
    options: dict[str, object], facts: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidOption) as error:
        Hydra(**options)
    for fact in facts:
        assert fact in str(error.value)


def _geometry(dim: int, heads: int = 2) -> Geometry:
    return Geometry(
        dim=dim,
        num_heads=heads,
        head_dim=dim // heads,
        num_prefix_tokens=1,
        grid=None,
        scale=1.0,
    )
