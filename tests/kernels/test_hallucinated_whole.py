"""The operator for inference is the pieces and the maps, and serves when it may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import manyheads as mh
from manyheads.attention.hallucinated import HallucinatedAttention
from manyheads.geometry import Geometry
from manyheads.kernels.hallucinated_whole import hallucinated_attention, takes_whole
from tests.helpers import assert_close

_OPERATOR = "manyheads::hallucinated_attention"


def _module(
    options: dict[str, object], num_heads: int, dtype: torch.dtype = torch.float64
) -> HallucinatedAttention:
    geometry = Geometry(
        dim=4 * num_heads,
        num_heads=num_heads,
        head_dim=4,
        num_prefix_tokens=1,
        grid=(14, 14),
        scale=0.5,
    )
    module = mh.Hallucinated(**options).build(geometry).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def _tokens(num_heads: int, n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    real = -(-num_heads // 2)
    return [
        torch.randn(2, n, heads, 4, dtype=dtype) for heads in (real, real, num_heads)
    ]


def _operators(module: HallucinatedAttention, inputs: list[Any]) -> set[str]:
    with torch.profiler.profile() as profile:
        module(*inputs)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("served", [[1, 1], [2, 0], [0, 2]])
@pytest.mark.parametrize("cells", [None, [3, 2]])
def test_torch_accepts_the_operator(served: list[int], cells: list[int] | None) -> None:
    q, k, v = _tokens(4, 7)
    kernels = torch.randn(2, 2, 2, 9 if cells else 3, dtype=torch.float64)
    arguments = (q, k, v, *kernels, served, 1, cells, 0.5)
    torch.library.opcheck(hallucinated_attention, arguments)


def test_it_serves_on_cpu_where_no_gradient_is_asked_for() -> None:
    module, inputs = _module({}, 4), _tokens(4, 7)
    assert _OPERATOR not in _operators(module, inputs)
    with torch.inference_mode():
        assert _OPERATOR in _operators(module, inputs)
    module.requires_grad_(False)
    assert _OPERATOR in _operators(module, inputs)
    inputs[2].requires_grad_()
    assert not takes_whole(*inputs)
    assert not takes_whole(torch.empty(1, device="meta"))


@pytest.mark.parametrize("options", [{"cross_map": True}, {"stage": "logits"}])
def test_the_pieces_serve_what_it_cannot(options: dict[str, object]) -> None:
    with torch.no_grad():
        assert _OPERATOR not in _operators(_module(options, 4), _tokens(4, 7))


def test_heads_out_of_order_and_masks_are_left_to_the_pieces() -> None:
    module, inputs = _module({}, 4), _tokens(4, 7)
    mask = torch.rand(2, 7) > 0.3
    with torch.no_grad():
        assert_close(module(*inputs, mask), module.reference(*inputs, mask))
        module.pair((1, 0))
        assert _OPERATOR not in _operators(module, inputs)
        module.pair((1, 1))
        assert _OPERATOR in _operators(module, inputs)


@pytest.mark.parametrize("n", [1, 2, 197, 577, 801])
def test_maps_of_many_heads_of_one_and_of_some_rows_give_the_same(n: int) -> None:
    module, inputs = _module({"rank": 2}, 7), _tokens(7, n)
    module.pair((0, 0, 1))
    with torch.no_grad():
        assert _OPERATOR in _operators(module, inputs)
        assert_close(module(*inputs), module.reference(*inputs))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", ["sequence", "grid"])
@pytest.mark.parametrize("partners", [(0, 1, 2), (0, 0, 1)])
def test_lots_of_images_and_lots_of_heads_give_the_same(
    layout: str, partners: tuple[int, ...], threads: int
) -> None:
    before = torch.get_num_threads()
    module = _module({"rank": 2, "layout": layout}, 6)
    module.pair(partners)
    images = 5
    real = torch.randn(2, images, 197, 3, 4, dtype=torch.float64)
    values = torch.randn(images, 197, 6, 4, dtype=torch.float64)
    inputs: list[Any] = [*real, values, None, (14, 14)]
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            assert _OPERATOR in _operators(module, inputs)
            assert_close(module(*inputs), module.reference(*inputs))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_types_and_autocast_stay_within_their_table(dtype: torch.dtype) -> None:
    module, inputs = _module({}, 4, torch.float32), _tokens(4, 63, torch.float32)
    with torch.no_grad():
        expected = module.reference(*inputs).to(dtype)
        enabled = dtype is not torch.float32
        half = torch.bfloat16 if dtype is torch.float32 else dtype
        with torch.autocast("cpu", half, enabled=enabled):
            found = module(*inputs)
        assert found.dtype is dtype
        assert_close(found, expected, slack=2)
        halves = [x.to(dtype) for x in inputs]
        assert_close(module.to(dtype)(*halves), expected, slack=2)


def test_its_flops_are_the_closed_form() -> None:
    module, inputs = _module({"rank": 2}, 5), _tokens(5, 21)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    core = module.spec.core_cost(module.geometry, 21)
    assert counter.get_total_flops() == 2 * 2 * core.attention


def test_it_reads_a_packed_projection_in_place() -> None:
    module = _module({}, 4)
    packed = torch.randn(2, 9, 32, dtype=torch.float64)
    inputs = [x.unflatten(2, (-1, 4)) for x in packed.split([8, 8, 16], dim=2)]
    with torch.no_grad():
        assert_close(module(*inputs), module.reference(*inputs))


@pytest.mark.skipif(
    torch.__version__.startswith("2.9."),
    reason="torch 2.9 cannot trace the hook that checks types under test",
)
def test_a_compiled_call_keeps_it_as_one_node() -> None:
    q, k, v = _tokens(4, 9)
    kernels = torch.randn(2, 2, 1, 3, dtype=torch.float64)

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert takes_whole(q, k, v)
        mixed: Tensor = hallucinated_attention(q, k, v, *kernels, (1, 1), 1, None, 0.5)
        return mixed

    with torch.no_grad():
        compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
        assert_close(compiled(q, k, v), mix(q, k, v))
