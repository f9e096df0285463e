"""Compact layers: the best start, exact folding, every kind of output matrix."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import ConvMlp, GluMlp, Mlp, SwiGLU, SwiGLUPacked
from timm.models import reparameterize_model
from torch import Tensor, nn

import manyheads as mh
from manyheads.errors import InvalidOption, SwapRefused
from manyheads.ffn import CompactLinear, OutputMoments
from tests.helpers import assert_close, tiny_vit


def _matrix(*, convolution: bool = False, bias: bool = True) -> nn.Module:
    if convolution:
        return nn.Conv2d(40, 16, 1, bias=bias).double().eval()
    return nn.Linear(40, 16, bias=bias).double().eval()


def _input(*, convolution: bool = False) -> Tensor:
    shape = (3, 40, 5, 4) if convolution else (3, 20, 40)
    return torch.randn(shape, dtype=torch.float64)


def _dense(layer: CompactLinear) -> Tensor:
    return layer.outer.weight.flatten(1) @ layer.inner.weight.flatten(1)


def _stirred(layer: CompactLinear) -> CompactLinear:
    """Train a little, so that gains and running statistics are no longer fresh."""
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(3):
        layer(2 + _input(convolution=layer.convolution)).square().mean().backward()
        optimizer.step()
    return layer.eval()


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 0.5, 16])
def test_the_start_is_the_truncated_singular_value_decomposition(
    rank: float, convolution: bool
) -> None:
    output = _matrix(convolution=convolution)
    layer = mh.Compact(rank=rank).build(output)
    u, s, vh = torch.linalg.svd(output.weight.flatten(1))
    kept = layer.rank
    assert_close(_dense(layer), u[:, :kept] * s[:kept] @ vh[:kept], slack=100)
    assert torch.equal(layer.outer.bias, output.bias)


def test_both_factors_carry_equal_weight() -> None:
    layer = mh.Compact(rank=5).build(_matrix())
    assert_close(layer.outer.weight.norm(dim=0), layer.inner.weight.norm(dim=1))


def test_full_rank_changes_no_output() -> None:
    output, x = _matrix(), _input()
    assert_close(mh.Compact(rank=16).build(output)(x), output(x), slack=10)


@pytest.mark.parametrize("bias", [False, True])
def test_the_calibrated_start_has_the_least_error_of_all(bias: bool) -> None:
    output = _matrix(bias=bias)
    x = 1 + torch.randn(4000, 40, dtype=torch.float64) * torch.linspace(0, 2, 40)
    y = output(x)
    moments = OutputMoments(
        mean=y.mean(0), second=y.t() @ y / len(y), num_tokens=len(y)
    )
    plain = mh.Compact(rank=5).build(output)
    seen = mh.Compact(rank=5).build(output, moments)
    error = (seen(x) - y).square().sum(1).mean()
    assert error < 0.9 * (plain(x) - y).square().sum(1).mean()
    # The least any affine map of that rank can do: what its outputs' last principal
    # directions hold.
    spread = moments.second - torch.outer(y.mean(0), y.mean(0)) * bias
    least = torch.linalg.eigvalsh(spread)[:-5].sum()
    assert least * (1 - 1e-9) <= error < least * 1.001


@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("convolution", [False, True])
def test_7_fold_changes_nothing_in_evaluation(branches: int, convolution: bool) -> None:
    spec = mh.Compact(rank=5, branches=branches)
    layer = _stirred(spec.build(_matrix(convolution=convolution)))
    x = _input(convolution=convolution)
    folded = layer.fuse()
    assert_close(folded(x), layer(x), slack=10)
    assert folded.spec == mh.Compact(rank=5)
    kind = nn.Conv2d if convolution else nn.Linear
    assert type(folded.inner) is type(folded.outer) is kind
    assert folded.fuse() is folded


@pytest.mark.parametrize("convolution", [False, True])
def test_fresh_branches_change_nothing_and_all_learn(convolution: bool) -> None:
    output, x = _matrix(convolution=convolution), _input(convolution=convolution)
    layer = mh.Compact(rank=5, branches=3).build(output)
    assert_close(layer(x), mh.Compact(rank=5).build(output)(x))
    assert_close(layer.train()(x), mh.Compact(rank=5).build(output)(x))
    before = [p.detach().clone() for p in layer.parameters()]
    _stirred(layer)
    for old, new in zip(before, layer.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_building_is_the_same_every_time_and_draws_no_random_number() -> None:
    output = _matrix()
    state = torch.get_rng_state()
    first = mh.Compact(branches=2).build(output).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    for name, tensor in mh.Compact(branches=2).build(output).state_dict().items():
        assert torch.equal(tensor, first[name])


def test_timm_folds_a_whole_model_and_the_result_saves(tmp_path: object) -> None:
    recipe = mh.Recipe(mh.Swap(ffn=mh.Compact(branches=2)))
    student = mh.convert(tiny_vit(), recipe).train()
    for _ in range(2):
        student(torch.randn(4, 3, 32, 32))
    student.eval()
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.weight.uniform_(-1, 1)
    image = torch.randn(2, 3, 32, 32)
    folded = reparameterize_model(student)
    assert_close(folded(image), student(image))
    assert sum(p.numel() for p in folded.parameters()) == sum(
        p.numel()
        for p in mh.convert(
            tiny_vit(), mh.Recipe(mh.Swap(ffn=mh.Compact()))
        ).parameters()
    )
    for model, name in ((student, "open"), (folded, "folded")):
        again = mh.load(mh.save(model, f"{tmp_path}/{name}"))
        assert torch.equal(again(image), model(image))


@pytest.mark.parametrize(
    "layer", [Mlp, GluMlp, SwiGLU, SwiGLUPacked], ids=lambda kind: str(kind)[-30:]
)
def test_every_feed_forward_layer_of_timm_is_matched_by_class(layer: type) -> None:
    model = tiny_vit(mlp_layer=layer)
    student = mh.convert(model, mh.Recipe(mh.Swap(ffn=mh.Compact(rank=48))))
    assert isinstance(student.blocks[0].mlp.fc2, CompactLinear)
    image = torch.randn(2, 3, 32, 32)
    assert_close(student(image), model(image), slack=5)


def test_a_layer_that_merely_has_an_fc2_is_left_alone() -> None:
    class Other(nn.Module):
        def __init__(self, in_features: int, **_: object) -> None:
            super().__init__()
            self.fc2 = nn.Linear(in_features, in_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(x)

    row = mh.preview(
        tiny_vit(mlp_layer=Other),
        mh.Recipe(mh.Swap(attention=mh.Hydra()), mh.Swap(ffn=mh.Compact())),
    ).rows[0]
    assert "no feed-forward layer" in row.left_alone


def test_convolutional_mlps_stay_convolutional() -> None:
    mlp = ConvMlp(8, 24).eval()
    x = torch.randn(2, 8, 5, 3)
    expected = mlp(x)
    mlp.fc2 = mh.Compact(rank=8).build(mlp.fc2)
    assert isinstance(mlp.fc2.inner, nn.Conv2d)
    assert_close(mlp(x), expected, slack=5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_stay_half(dtype: torch.dtype) -> None:
    model = tiny_vit().to(dtype)
    student = mh.convert(model, mh.Recipe(mh.Swap(ffn=mh.Compact(branches=2))))
    assert {p.dtype for p in student.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("output", "spec", "fact"),
    [
        (nn.Linear(8, 16), mh.Compact(rank=9), "exceeds the 8"),
        (nn.Linear(8, 16, bias=False), mh.Compact(branches=2, rank=4), "no bias"),
        (nn.Conv2d(8, 16, 3), mh.Compact(rank=4), "convolution over neighbours"),
    ],
)
def test_matrices_it_cannot_serve_are_refused_by_name(
    output: nn.Module, spec: mh.Compact, fact: str
) -> None:
    assert fact in (spec.problem(output) or "")


def test_a_rank_too_large_is_refused_with_the_block() -> None:
    with pytest.raises(SwapRefused, match=r"blocks\.0\.mlp\.fc2"):
        mh.convert(tiny_vit(), mh.Recipe(mh.Swap(ffn=mh.Compact(rank=49))))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"rank": 1.5}, {"rank": True}, {"branches": 0}, {"branches": 1.0}],
    ids=str,
)
def test_bad_options_are_refused_where_written(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOption, match=r"Compact\("):
        mh.Compact(**options)


def test_the_half_of_the_width_is_the_rank() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, device="meta")
    student = mh.convert(model, mh.Recipe(mh.Swap(ffn=mh.Compact())))
    assert student.blocks[0].mlp.fc2.rank == 96
