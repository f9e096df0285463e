"""The operator holds to what torch expects of operators."""

from __future__ import annotations

import pytest
import torch

from manyheads.kernels.hallucinated import (
    blend_tokens,
    choose_form,
    wide_attention,
)
from manyheads.kernels.tracing import tracing_for_onnx
from tests.helpers import assert_close


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


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("cells", "taps"), [(None, 3), (None, 5), ((3, 4), 9)])
def test_the_form_that_is_exported_blends_the_same(
    monkeypatch: pytest.MonkeyPatch,
    cells: tuple[int, int] | None,
    taps: int,
    prefix: int,
    terms: int,
) -> None:
    x = torch.randn(2, 12 + prefix, 3, 1, 4, dtype=torch.float64)
    kernel = torch.randn(3, terms, taps, dtype=torch.float64)
    expected = blend_tokens(x, kernel, prefix, cells)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert_close(blend_tokens(x, kernel, prefix, cells), expected)
    lanes = x.expand(-1, -1, -1, terms, -1)
    assert_close(blend_tokens(lanes, kernel, prefix, cells), expected)


def test_exported_programs_pad_and_onnx_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow, wide = torch.empty(1, 5, 2, 4), torch.empty(1, 5, 2, 8)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert choose_form(narrow, narrow) == "fused"
    assert choose_form(narrow, wide) == choose_form(wide, narrow) == "padded"
    with tracing_for_onnx():
        assert choose_form(narrow, wide) == "fused"
    assert choose_form(narrow, wide) == "padded"
