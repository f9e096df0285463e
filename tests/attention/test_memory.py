"""No fused form builds a map: what a call allocates and keeps grows with N, not N^2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import manyheads as mh
from manyheads.attention import AttentionSpec
from manyheads.attention.base import Mechanism
from manyheads.gauges.memory import Memory, measure_memory
from manyheads.geometry import Geometry, Grid
from manyheads.kernels.hallucinated import wide_attention
from manyheads.kernels.hydra import hydra
from manyheads.kernels.interactive import interactive
from tests.allocations import allocations, saved_bytes

HEADS, WIDTH = 8, 4
# Blocks of maps are bounded by constants: 2**21 elements a thread in the operator for
# inference, 2**20 in the pieces, whose backward holds four such blocks in float32.
BLOCK = 4 * 2**21
# Widened tokens, in bytes of q, k and v: two lanes for each of four maps across heads.
WIDENED = 16
HALLUCINATED = [
    {"stage": stage, "cross_map": cross, "rank": rank, "layout": layout}
    for stage in ("probabilities", "logits")
    for cross, rank, layout in (
        (False, 1, "sequence"),
        (False, "full", "sequence"),
        (False, 2, "grid"),
        (True, 1, "sequence"),
        (True, 2, "grid"),
    )
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _name(options: dict[str, object]) -> str:
    return "-".join(map(str, options.values()))


def _module(spec: AttentionSpec, grid: Grid) -> Mechanism:
    geometry = Geometry(
        dim=HEADS * WIDTH,
        num_heads=HEADS,
        head_dim=WIDTH,
        num_prefix_tokens=0,
        grid=grid,
        scale=0.5,
    )
    module = spec.build(geometry)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def _tokens(spec: AttentionSpec, rows: int) -> tuple[list[Tensor], Grid]:
    grid = (rows, 32)
    geometry = _module(spec, grid).geometry
    real = spec.num_query_heads(geometry)
    shapes = [(1, 32 * rows, heads, WIDTH) for heads in (real, real, HEADS)]
    return [torch.randn(shape) for shape in shapes], grid


def _size(tensors: list[Tensor]) -> int:
    return sum(4 * tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("options", HALLUCINATED, ids=_name)
def test_inference_holds_a_block_of_maps_and_no_more(
    options: dict[str, object],
) -> None:
    spec = mh.Hallucinated(**options)
    peaks, sizes = [], []
    for rows in (64, 128):
        inputs, grid = _tokens(spec, rows)
        module = _module(spec, grid)
        with torch.no_grad():
            found = allocations(partial(module, *inputs, None, grid))
        # One map of 4,096 tokens has 64 MiB.
        assert found.largest <= BLOCK
        assert found.peak <= BLOCK + WIDENED * _size(inputs)
        peaks.append(found.peak)
        sizes.append(_size(inputs))
    assert peaks[1] - peaks[0] <= WIDENED * (sizes[1] - sizes[0])


@pytest.mark.parametrize(
    ("options", "masked"),
    [(options, False) for options in HALLUCINATED]
    + [(options, True) for options in HALLUCINATED[::4]],
    ids=lambda value: _name(value) if isinstance(value, dict) else f"masked={value}",
)
def test_training_holds_blocks_of_maps_and_keeps_none(
    options: dict[str, object], masked: bool
) -> None:
    spec = mh.Hallucinated(**options)
    peaks, kept, sizes = [], [], []
    for rows in (32, 64):
        inputs, grid = _tokens(spec, rows)
        module = _module(spec, grid)
        leaves = [x.requires_grad_() for x in inputs]
        mask = torch.rand(1, 32 * rows) > 0.3 if masked else None
        run = partial(module, *leaves, mask, grid)
        kept.append(saved_bytes(run, leaves))
        peaks.append(allocations(partial(_learn, run)).peak)
        sizes.append(_size(inputs))
    # One head's map of 2,048 tokens has 16 MiB, all heads' 128.
    assert peaks[1] <= 5 * BLOCK // 2 + 3 * WIDENED * sizes[1]
    assert peaks[1] - peaks[0] <= 3 * WIDENED * (sizes[1] - sizes[0])
    assert kept[1] <= WIDENED * sizes[1]
    assert kept[1] <= 2.01 * kept[0]


def _learn(run: Callable[[], Tensor]) -> None:
    run().sum().backward()


@pytest.mark.parametrize("with_maps", [False, True], ids=["fused", "maps"])
def test_the_slow_twin_would_be_caught(with_maps: bool) -> None:
    spec = mh.Hallucinated()
    inputs, grid = _tokens(spec, 32)
    module = _module(spec, grid)
    form: Callable[..., Tensor] = module.reference if with_maps else module
    with torch.no_grad():
        found = allocations(lambda: form(*inputs, None, grid))
    assert (found.peak > BLOCK + WIDENED * _size(inputs)) == with_maps
    leaves = [x.requires_grad_() for x in inputs]
    kept = saved_bytes(lambda: form(*leaves, None, grid), leaves)
    assert (kept > WIDENED * _size(inputs)) == with_maps


# What autograd keeps besides q, k and v, as a share of them.
HYDRA = {
    mh.Hydra(): 0.01,
    mh.Hydra(kernel="mean"): 0.67,
    mh.Hydra(kernel="mean", reference_tokens=None): 0.67,
    mh.Hydra(kernel="aft"): 1.01,
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("spec", HYDRA, ids=repr)
def test_hydra_keeps_a_summary_or_one_tensor_of_features(
    spec: mh.Hydra, masked: bool
) -> None:
    inputs, grid = _tokens(spec, 64)
    leaves = [x.requires_grad_() for x in inputs]
    mask = torch.rand(1, inputs[0].shape[1]) > 0.3 if masked else None
    kept = saved_bytes(partial(_module(spec, grid), *leaves, mask, grid), leaves)
    assert kept <= HYDRA[spec] * _size(inputs)
    with torch.no_grad():
        held = allocations(partial(_module(spec, grid), *inputs, mask, grid)).peak
    assert held <= 1.4 * _size(inputs)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    ("mix", "stacks"), [("none", 0), ("after", 4), ("before", 4), ("both", 6)]
)
def test_interactive_attention_keeps_thin_stacks_or_landmarks_alone(
    mix: str, stacks: int, masked: bool
) -> None:
    spec = mh.Interactive(mix=mix)
    inputs, grid = _tokens(spec, 64)
    leaves = [x.requires_grad_() for x in inputs]
    N = inputs[0].shape[1]
    mask = torch.rand(1, N) > 0.3 if masked else None
    kept = saved_bytes(partial(_module(spec, grid), *leaves, mask, grid), leaves)
    # Without mixes a mask is what takes the plain form, whose stacks are then kept.
    stacks += (2 if mix != "none" else 4) if masked else 0
    stack = 4 * HEADS * 49 * N
    assert kept <= 1.01 * stacks * stack + 0.5 * _size(inputs)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_the_operators_keep_their_inputs_and_sums_alone(masked: bool) -> None:
    q, k, v = (torch.randn(2, 40, 3, 4, requires_grad=True) for _ in range(3))
    marks = [torch.randn(2, 5, 3, 4, requires_grad=True) for _ in range(2)]
    mixes = [torch.randn(3, 3, requires_grad=True) for _ in range(4)]
    kept = torch.rand(2, 40) > 0.3 if masked else None
    marked = torch.rand(2, 5) > 0.3 if masked else None
    masks = [mask for mask in (kept, marked) if mask is not None]
    call = partial(interactive, q, k, v, *marks, 0.5, *mixes, kept, marked)
    assert saved_bytes(call, [q, k, v, *marks, *mixes, *masks]) == 0
    call = partial(wide_attention, q, k, torch.cat([v, v], -1), kept, 0.5)
    assert saved_bytes(call, [q, k, *masks]) == 2 * 4 * v.numel()
    features = [x.flatten(2) for x in (q, k, v)]
    call = partial(hydra, *features, kept)
    assert saved_bytes(call, [*features, *masks]) == 4 * 2 * 12


def _run_all(layers: nn.Module, x: Tensor) -> None:
    for layer in layers.children():
        layer(x)


class _Packed(nn.Module):
    """A mechanism that takes q, k and v as one tensor, as other processes need it."""

    def __init__(self, core: Mechanism, real: int, grid: Grid) -> None:
        super().__init__()
        self.core, self.real, self.grid = core, real, grid

    def forward(self, packed: Tensor) -> Tensor:
        """Mix the values."""
        q, k, v = packed
        q, k = q[:, :, : self.real], k[:, :, : self.real]
        mixed: Tensor = self.core(q, k, v, None, self.grid)
        return mixed


def test_a_process_that_runs_several_forms_stays_below_one_map() -> None:
    """The system's own count, which includes what maths libraries ask for."""
    grid = (128, 32)
    layers = nn.ModuleList()
    for options in HALLUCINATED[::3]:
        spec = mh.Hallucinated(**options)
        core = _module(spec, grid)
        real = spec.num_query_heads(core.geometry)
        layers.append(_Packed(core, real, grid))
    found = measure_memory(layers, torch.randn(3, 1, 4096, HEADS, WIDTH), _run_all)
    assert isinstance(found, Memory), found
    assert found.extra_mib < 4096**2 * 4 / 2**20
