"""What only a GPU shows: which form serves, compiled graphs, and very long inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manyheads import Hydra, Interactive, Recipe, Swap, convert
from manyheads.attention import AttentionSpec, Hallucinated
from manyheads.attention.hydra import hydra_attention
from manyheads.kernels import hallucinated, hydra, interactive
from manyheads.kernels.interactive import APART, Mixes
from tests.helpers import assert_close, tiny_vit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
HALVES = [torch.bfloat16, torch.float16]
SPECS = [Hydra(), Interactive(landmarks=(2, 2)), Hallucinated()]


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def test_triton_serves_where_it_can() -> None:
    mixes = Mixes(None, torch.eye(12), None, torch.eye(12))
    q = _randn(1, 5, 12, 64)
    assert hydra.choose_form(q.flatten(2)) == "triton"
    assert hydra.choose_form(_randn(1, 1, 8193)) == "passes"
    assert interactive.choose_form(q, 50, mixes, masked=False) == "triton"
    assert interactive.choose_form(q, 65, mixes, masked=False) == "plain"
    assert interactive.choose_form(q.double(), 50, mixes, masked=False) == "plain"
    assert interactive.choose_form(q, 50, APART, masked=False) == "calls"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", ["fused", "padded", "calls", "triton"])
def test_every_way_to_mix_wide_values_gives_the_same(
    form: hallucinated.Form, dtype: torch.dtype
) -> None:
    shapes = ((2, 197, 3, 64), (2, 197, 3, 64), (2, 197, 3, 128))
    leaves = [_randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]
    found = hallucinated.attend(*leaves, None, 0.125, form=form)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    expected = hallucinated.attend(*wide, None, 0.125, form="chunked")
    assert_close(found, expected.to(dtype))
    grad = _randn(*found.shape, dtype=dtype)
    pairs = zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(expected, wide, grad.float()),
        strict=True,
    )
    for mine, theirs in pairs:
        assert_close(mine, theirs.to(dtype))


@pytest.mark.parametrize(("num_tokens", "dim"), [(1_000_000, 4096), (65_537, 768)])
def test_offsets_beyond_two_billion_elements(num_tokens: int, dim: int) -> None:
    try:
        packed = torch.empty(
            1, num_tokens, 3 * dim, device="cuda", dtype=torch.bfloat16
        )
        out = torch.empty(1, num_tokens, dim, device="cuda", dtype=torch.bfloat16)
    except torch.cuda.OutOfMemoryError:
        pytest.skip("needs 33 GB")
    packed.normal_()
    q, k, v = packed.split(dim, dim=-1)
    hydra.hydra_into(out, q, k, v)
    summary = torch.zeros(dim, device="cuda", dtype=torch.float64)
    for keys, values in zip(k[0].split(1 << 16), v[0].split(1 << 16), strict=True):
        units = torch.nn.functional.normalize(keys.double(), dim=-1)
        summary += (units * values.double()).sum(dim=0)
    last = torch.nn.functional.normalize(q[0, -1].double(), dim=-1) * summary
    assert_close(out[0, -1], last.to(out.dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_runs_the_kernels_in_its_type(dtype: torch.dtype) -> None:
    q, k, v = (_randn(2, 33, 24) for _ in range(3))
    with torch.autocast("cuda", dtype):
        found = hydra.hydra(q, k, v, None)
    assert found.dtype == dtype
    assert_close(found, hydra_attention(*(x.to(dtype) for x in (q, k, v))))


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_models_give_the_same_on_both_devices(spec: AttentionSpec) -> None:
    model = convert(tiny_vit(), Recipe(Swap(attention=spec)))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(images)
        found = model.cuda()(images.cuda())
    assert_close(found.cpu(), expected, slack=10.0)


_COMPILED = """
import sys
import torch
from manyheads import Hallucinated, Hydra, Interactive, Recipe, Swap, convert
from manyheads.kernels.hallucinated import attend
from tests.helpers import assert_close, tiny_vit

device = sys.argv[1]
images = torch.randn(2, 3, 32, 32, device=device)
for spec in (Hydra(), Interactive(landmarks=(2, 2)), Hallucinated()):
    model = convert(tiny_vit(), Recipe(Swap(attention=spec))).to(device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        assert_close(compiled(images), model(images), slack=10.0)
    results = []
    for call in (model, compiled):
        with torch.autocast(device, torch.bfloat16):
            loss = call(images).float().square().mean()
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    for eager, other in zip(*results, strict=True):
        assert_close(other.bfloat16(), eager.bfloat16())
q, k, v = (torch.randn(2, 197, 3, width, device=device) for width in (64, 64, 128))
mask = torch.rand(2, 197, device=device) > 0.3
with torch.inference_mode():
    for given in (None, mask):
        expected = attend(q, k, v, given, 0.125, form="chunked").half()
        halves = (x.half() for x in (q, k, v))
        assert_close(attend(*halves, given, 0.125, form="flex"), expected)
"""


def test_compiled_in_one_graph_everything_gives_the_same() -> None:
    """In a process of its own: the tests' type-checking hook is in compilers' way."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED, "cuda"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
