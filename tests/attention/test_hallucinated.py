"""The fused forms are the maps, for every option; the options mean what they say."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import manyheads as mh
from manyheads.attention.hallucinated import HallucinatedAttention
from manyheads.attention.softmax import softmax_maps
from manyheads.errors import GeometryMismatch, InvalidOption, MaskRefused
from manyheads.geometry import Geometry
from manyheads.kernels.hallucinated import attend
from tests.helpers import assert_close

SEQUENCE = [
    {"stage": stage, "rank": rank, "cross_map": cross, "exempt_prefix": exempt}
    for stage, rank, cross, exempt in itertools.product(
        ("probabilities", "logits"), (1, 2, 3, "full"), (False, True), (True, False)
    )
]
GRID = [
    {"stage": stage, "rank": rank, "cross_map": cross, "layout": "grid"}
    for stage, rank, cross in itertools.product(
        ("probabilities", "logits"), (1, 2, "full"), (False, True)
    )
]
LARGER = [
    {"kernel_size": 5, "rank": 5},
    {"kernel_size": 1},
    {"kernel_size": 5, "layout": "grid", "stage": "logits"},
]
OPTIONS = SEQUENCE + GRID + LARGER


def _name(options: dict[str, object]) -> str:
    return "-".join(str(value) for value in options.values())


def _geometry(num_heads: int = 4, **changes: object) -> Geometry:
    sizes: dict[str, object] = {
        "dim": 4 * num_heads,
        "num_heads": num_heads,
        "head_dim": 4,
        "num_prefix_tokens": 1,
        "grid": (14, 14),
        "scale": 0.5,
    }
    return Geometry(**(sizes | changes))


def _module(
    spec: mh.Hallucinated, geometry: Geometry, dtype: torch.dtype = torch.float64
) -> HallucinatedAttention:
    """Build a module whose kernels are no deltas any more."""
    module = spec.build(geometry).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def _tokens(
    geometry: Geometry, n: int, dtype: torch.dtype = torch.float64, s: int | None = None
) -> list[Tensor]:
    real = -(-geometry.num_heads // 2)
    sizes = ((n, real), (s or n, real), (s or n, geometry.num_heads))
    return [
        torch.randn(2, tokens, heads, geometry.head_dim).to(dtype).requires_grad_()
        for tokens, heads in sizes
    ]


def _agree(
    module: HallucinatedAttention,
    inputs: list[Tensor],
    mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> None:
    """Compare outputs and every gradient, parameters included."""
    fast = module(*inputs, mask, grid)
    slow = module.reference(*inputs, mask, grid)
    assert_close(fast, slow)
    with torch.no_grad():
        # Without gradients another operator may serve the same call.
        assert_close(module(*inputs, mask, grid), slow)
    upstream = torch.randn_like(fast)
    sources = [*inputs, *module.parameters()]
    fast_grads = torch.autograd.grad(fast, sources, upstream, materialize_grads=True)
    slow_grads = torch.autograd.grad(slow, sources, upstream, materialize_grads=True)
    for ours, theirs in zip(fast_grads, slow_grads, strict=True):
        assert_close(ours, theirs, slack=5)


@pytest.mark.parametrize("options", OPTIONS, ids=_name)
@pytest.mark.parametrize("num_heads", [5])
def test_the_fused_form_is_the_maps_with_every_gradient(
    options: dict[str, object], num_heads: int
) -> None:
    spec = mh.Hallucinated(**options)
    geometry = _geometry(num_heads)
    _agree(_module(spec, geometry), _tokens(geometry, 13), None, (3, 4))


@pytest.mark.parametrize("stage", ["probabilities", "logits"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 63, 197])
def test_twins_agree_at_any_length(stage: str, n: int) -> None:
    geometry = _geometry(2)
    spec = mh.Hallucinated(stage=stage, rank=2)
    _agree(_module(spec, geometry), _tokens(geometry, n))


@pytest.mark.parametrize("n", [2, 7, 197])
def test_twins_agree_on_grids_that_are_not_square(n: int) -> None:
    geometry = _geometry(2)
    grid = {2: (1, 1), 7: (2, 3), 197: (7, 28)}[n]
    spec = mh.Hallucinated(layout="grid")
    _agree(_module(spec, geometry), _tokens(geometry, n), None, grid)


@pytest.mark.parametrize("options", OPTIONS[::5], ids=_name)
@pytest.mark.parametrize("partner", [(1, 0, 2), (2, 2, 0), (1, 1, 1)])
def test_any_pairing_of_heads_is_exact(
    options: dict[str, object], partner: tuple[int, ...]
) -> None:
    geometry = _geometry(6)
    module = _module(mh.Hallucinated(**options), geometry)
    module.pair(partner)
    _agree(module, _tokens(geometry, 13), None, (4, 3))


@pytest.mark.parametrize("stage", ["probabilities", "logits"])
@pytest.mark.parametrize("s", [1, 5])
def test_keys_may_be_fewer_than_queries(stage: str, s: int) -> None:
    geometry = _geometry(num_prefix_tokens=0, reduced_keys=s)
    spec = mh.Hallucinated(stage=stage, rank=2, cross_map=True)
    _agree(_module(spec, geometry), _tokens(geometry, 20, s=s))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stage", ["probabilities", "logits"])
def test_half_types_stay_within_their_table(stage: str, dtype: torch.dtype) -> None:
    geometry = _geometry()
    module = _module(mh.Hallucinated(stage=stage), geometry)
    inputs = _tokens(geometry, 63)
    expected = module.reference(*inputs).to(dtype)
    module = module.to(dtype)
    assert_close(module(*(x.detach().to(dtype) for x in inputs)), expected, slack=2)


@pytest.mark.parametrize("options", OPTIONS[::3], ids=_name)
def test_masked_keys_weigh_nothing_in_both_forms(options: dict[str, object]) -> None:
    geometry = _geometry()
    module = _module(mh.Hallucinated(**options), geometry)
    q, k, v = _tokens(geometry, 13)
    mask = torch.rand(2, 13) > 0.4
    mask[:, 0] = True
    _agree(module, [q, k, v], mask, (3, 4))
    assert (
        module.maps(q, k, mask, (3, 4)).mT[~mask[:, None].expand(2, 4, 13)] == 0
    ).all()
    other = torch.where(mask[..., None, None], v, torch.full_like(v, 9.0))
    assert torch.equal(module(q, k, v, mask, (3, 4)), module(q, k, other, mask, (3, 4)))


@pytest.mark.parametrize("stage", ["probabilities", "logits"])
def test_a_padded_sequence_is_the_shorter_one(stage: str) -> None:
    geometry = _geometry()
    module = _module(mh.Hallucinated(stage=stage, rank=2), geometry)
    inputs = _tokens(geometry, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 9:] = False
    padded = module(*inputs, mask)[:, :9]
    assert_close(padded, module(*(x[:, :9] for x in inputs)))


def test_masks_that_tell_queries_apart_are_refused() -> None:
    geometry = _geometry()
    module = mh.Hallucinated().build(geometry).double()
    causal = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    with pytest.raises(MaskRefused, match="Hallucinated"):
        module(*_tokens(geometry, 7), causal)


@pytest.mark.parametrize("options", OPTIONS[::4], ids=_name)
def test_a_fresh_hallucinated_map_is_its_partners(options: dict[str, object]) -> None:
    geometry = _geometry(6)
    module = mh.Hallucinated(**options).build(geometry).double()
    module.pair((2, 0, 0))
    q, k, _ = _tokens(geometry, 13)
    maps = module.maps(q, k, None, (3, 4))
    real = softmax_maps(q, k, geometry.scale)
    assert_close(maps, torch.cat([real, real[:, [2, 0, 0]]], dim=1))


@pytest.mark.parametrize("rank", [2, 3])
def test_gradients_reach_every_term_and_no_two_are_alike(rank: int) -> None:
    geometry = _geometry()
    module = mh.Hallucinated(rank=rank).build(geometry).double()
    module(*_tokens(geometry, 13)).square().sum().backward()
    grads = module.query_kernel.grad[0]
    assert (grads.abs().amax(dim=-1) > 0).all()
    assert not torch.allclose(grads[0], grads[1])


def test_prefix_tokens_never_blend_unless_asked() -> None:
    q, k, _ = _tokens(_geometry(2), 13)
    for exempt in (True, False):
        spec = mh.Hallucinated(exempt_prefix=exempt)
        module = _module(spec, _geometry(2))
        real, derived = module.maps(q, k)[0]
        assert torch.equal(real[0, 0], derived[0, 0]) is exempt


def test_rows_sum_to_one_on_logits() -> None:
    geometry = _geometry()
    module = _module(mh.Hallucinated(stage="logits"), geometry)
    q, k, _ = _tokens(geometry, 13)
    sums = module.maps(q, k).sum(dim=-1)
    assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("num_heads", [2, 3, 12])
def test_real_heads_are_half_rounded_up(num_heads: int) -> None:
    spec = mh.Hallucinated()
    assert spec.num_query_heads(_geometry(num_heads)) == -(-num_heads // 2)


def test_a_single_head_is_exempt_by_rule() -> None:
    assert "single head" in (mh.Hallucinated().exempt(_geometry(1)) or "")
    assert mh.Hallucinated().exempt(_geometry(2)) is None


@pytest.mark.parametrize("options", OPTIONS, ids=_name)
@pytest.mark.parametrize("num_heads", [5])
def test_the_closed_form_is_what_torch_counts(
    options: dict[str, object], num_heads: int
) -> None:
    spec, geometry = mh.Hallucinated(**options), _geometry(num_heads)
    module = spec.build(geometry).to("meta")
    inputs = [x.detach()[:1].to("meta") for x in _tokens(geometry, 197, torch.float32)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, None, (14, 14))
    assert counter.get_total_flops() // 2 == spec.core_cost(geometry, 197).attention


def test_the_core_costs_three_quarters_on_probabilities() -> None:
    geometry = _geometry(4)
    whole = mh.Softmax().core_cost(geometry, 197).attention
    assert mh.Hallucinated().core_cost(geometry, 197).attention == 0.75 * whole
    logits = mh.Hallucinated(stage="logits").core_cost(geometry, 197)
    assert logits.attention == whole


@pytest.mark.parametrize("form", ["fused", "chunked", "padded", "calls"])
@pytest.mark.parametrize("width", [4, 8, 12])
def test_every_form_of_the_kernel_gives_the_same(form: str, width: int) -> None:
    q, k = (torch.randn(2, 300, 3, 4, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 300, 3, width, dtype=torch.float64)
    mask = torch.rand(2, 300) > 0.2
    expected = torch.einsum("bhnm,bmhv->bnhv", softmax_maps(q, k, 0.5, mask), v)
    assert_close(attend(q, k, v, mask, 0.5, form=form), expected)


def test_no_map_is_held_for_the_backward_pass() -> None:
    geometry = _geometry(2)
    module = mh.Hallucinated().build(geometry)
    n = 1500
    inputs = _tokens(geometry, n, torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        module(*inputs)
    assert max(kept) < n * n


@pytest.mark.usefixtures("untyped")
def test_torch_compile_sees_one_graph() -> None:
    geometry = _geometry()
    module = _module(mh.Hallucinated(), geometry, torch.float32)
    inputs = [x.detach() for x in _tokens(geometry, 13, torch.float32)]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*inputs), module(*inputs))


@pytest.mark.parametrize("options", [{}, {"stage": "logits"}, {"rank": 2}], ids=str)
def test_exported_programs_hold_torchs_operators_only(
    options: dict[str, object],
) -> None:
    geometry = _geometry(3)
    module = _module(mh.Hallucinated(**options), geometry, torch.float32).eval()
    inputs = tuple(x.detach() for x in _tokens(geometry, 13, torch.float32))
    program = torch.export.export(module, inputs)
    assert "manyheads" not in str(program.graph)
    assert_close(program.module()(*inputs), module(*inputs))


def test_partners_travel_with_the_weights() -> None:
    module = _module(mh.Hallucinated(), _geometry(6))
    module.pair((2, 0, 0))
    again = mh.Hallucinated().build(_geometry(6)).double()
    again.load_state_dict(module.state_dict())
    assert again.pairing == (2, 0, 0)
    inputs = _tokens(_geometry(6), 7)
    assert torch.equal(again(*inputs), module(*inputs))


@pytest.mark.parametrize("partner", [(0,), (0, 1, 3), (-1, 0, 0)])
def test_pairings_that_name_no_real_head_are_refused(partner: tuple[int, ...]) -> None:
    with pytest.raises(GeometryMismatch, match="0-2"):
        mh.Hallucinated().build(_geometry(6)).pair(partner)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"stage": "logit"}, "logits"),
        ({"layout": "ring"}, "grid"),
        ({"kernel_size": 2}, "odd"),
        ({"kernel_size": 3.0}, "odd"),
        ({"rank": 4}, "between 1 and 3"),
        ({"rank": 0}, "between 1 and 3"),
        ({"rank": "all"}, "full"),
        ({"rank": True}, "between 1 and 3"),
        ({"rank": 10, "layout": "grid"}, "between 1 and 9"),
        ({"cross_map": 1}, "True"),
        ({"layout": "grid", "exempt_prefix": False}, "no place on the grid"),
    ],
)
def test_options_no_layer_could_use_are_refused_where_written(
    options: dict[str, object], fact: str
) -> None:
    with pytest.raises(InvalidOption, match=fact):
        mh.Hallucinated(**options)


@pytest.mark.parametrize(
    ("options", "changes", "fact"),
    [
        ({}, {"attention_dropout": 0.1}, "attn_drop_rate=0"),
        ({"layout": "grid"}, {"grid": None}, "not known"),
        ({"layout": "grid"}, {"reduced_keys": 49}, "coarser grid"),
    ],
)
def test_layers_it_cannot_serve_are_refused_by_name(
    options: dict[str, object], changes: dict[str, object], fact: str
) -> None:
    geometry = dataclasses.replace(_geometry(), **changes)
    assert fact in (mh.Hallucinated(**options).problem(geometry) or "")
    assert mh.Hallucinated(**options).problem(_geometry()) is None
