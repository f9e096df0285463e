"""The operator around interactive attention's kernels, in its plain form."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from manyheads.kernels.interactive import APART, Mixes, attend, choose_form, interactive
from tests.helpers import assert_close

PLACES = list(itertools.product((False, True), repeat=4))


def _inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    counts = (7, 7, 7, 4, 4)
    return [torch.randn(2, n, 3, 5, dtype=dtype, requires_grad=True) for n in counts]


def _mixes(places: tuple[bool, ...], dtype: torch.dtype = torch.float64) -> Mixes:
    return Mixes(
        *(
            torch.randn(3, 3, dtype=dtype, requires_grad=True) if place else None
            for place in places
        )
    )


def _masks(masked: bool) -> tuple[Tensor | None, Tensor | None]:
    if not masked:
        return None, None
    kept, marked = torch.rand(2, 7) > 0.4, torch.rand(2, 4) > 0.3
    kept[0] = False
    return kept, marked


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("places", PLACES, ids=lambda p: "".join("-x"[x] for x in p))
def test_output_and_gradients_equal_what_autograd_gives(
    places: tuple[bool, ...], masked: bool
) -> None:
    inputs, mixes, masks = _inputs(), _mixes(places), _masks(masked)
    ours = interactive(*inputs, 0.3, *mixes, *masks)
    kept, marked = masks
    plain = attend(
        *inputs, scale=0.3, mixes=mixes, kept=kept, marked=marked, form="plain"
    )
    assert_close(ours, plain)
    leaves = [*inputs, *(mix for mix in mixes if mix is not None)]
    grad = torch.randn_like(plain)
    pairs = zip(
        torch.autograd.grad(ours, leaves, grad),
        torch.autograd.grad(plain, leaves, grad),
        strict=True,
    )
    for mine, theirs in pairs:
        assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_half_types_stay_near(dtype: torch.dtype) -> None:
    exact = [x.detach().to(dtype) for x in _inputs()]
    mixes = _mixes((False, True, False, True), torch.float32)
    halves, wholes = (
        [x.to(t).requires_grad_() for x in exact] for t in (dtype, torch.float32)
    )
    ours = interactive(*halves, 0.3, *mixes, None, None)
    plain = attend(*wholes, scale=0.3, mixes=mixes, form="plain")
    assert_close(ours, plain.to(dtype))
    grad = torch.randn_like(ours)
    pairs = zip(
        torch.autograd.grad(ours, halves, grad),
        torch.autograd.grad(plain, wholes, grad.float()),
        strict=True,
    )
    for mine, theirs in pairs:
        assert_close(mine, theirs.to(dtype))


# torch's own check looks at the gradient of a copy that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "places", [(False,) * 4, (True,) * 4, (False, True, False, True)]
)
def test_the_operator_keeps_the_rules_of_torch_library(
    places: tuple[bool, ...], masked: bool
) -> None:
    mixes = _mixes(places, torch.float32)
    inputs = (*_inputs(torch.float32), 0.3, *mixes, *_masks(masked))
    torch.library.opcheck(interactive, inputs)


@pytest.mark.parametrize("places", [PLACES[0], PLACES[5], PLACES[15]])
def test_work_is_counted_like_the_plain_forms(places: tuple[bool, ...]) -> None:
    inputs, mixes = _inputs(torch.float32), _mixes(places, torch.float32)
    counts = []
    for call in (
        lambda: interactive(*inputs, 0.3, *mixes, None, None),
        lambda: attend(*inputs, scale=0.3, mixes=mixes, form="plain"),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_the_form_follows_mixes_mask_and_device() -> None:
    q, mixes = torch.empty(1, 5, 3, 8), _mixes((False, True, False, True))
    assert choose_form(q, 4, APART, masked=False) == "calls"
    assert choose_form(q, 4, APART, masked=True) == "plain"
    assert choose_form(q, 4, mixes, masked=False) == "plain"
