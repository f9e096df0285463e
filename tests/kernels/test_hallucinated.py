"""The operator holds to what torch expects of operators."""

from __future__ import annotations

import pytest
import torch

from manyheads.kernels.hallucinated import choose_form, wide_attention


# opcheck itself reads .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("masked", [False, True])
def test_torch_accepts_the_operator(masked: bool) -> None:
    q, k = (torch.randn(2, n, 2, 4, requires_grad=True) for n in (9, 7))
    v = torch.randn(2, 7, 2, 12, requires_grad=True)
    mask = torch.rand(2, 7) > 0.3 if masked else None
    torch.library.opcheck(wide_attention, (q, k, v, mask, 0.5))


def test_equal_widths_take_torchs_fused_attention_and_others_blocks_on_cpu() -> None:
    q = torch.empty(1, 5, 2, 4)
    assert choose_form(q, q) == "fused"
    assert choose_form(q, torch.empty(1, 5, 2, 8)) == "chunked"
