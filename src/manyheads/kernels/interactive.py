"""Interactive attention's core: landmarks first, so that no pair of tokens meets.

The slow twin is `manyheads.attention.interactive.interactive_maps`.

Kang, Yang, Ryu, "Interactive Multi-Head Self-Attention with Linear Complexity", 2024,
arXiv 2402.17507.

Values are gathered at the landmarks before any query is looked at. `choose_form` is
the one place where the way is picked: plain operators, which `torch.compile`,
`torch.export`, autocast and the FLOP counter see through, or one operator of our own
around Triton kernels that hold no map, see `manyheads.kernels.triton_interactive`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from manyheads.kernels.landmarks import cell_means, find_landmarks
from manyheads.kernels.registration import has_triton, register_autocast
from manyheads.kernels.thin_maps import (
    APART,
    Mixes,
    mix_heads,
    thin_gradients,
    weights_of,
)

__all__ = [
    "APART",
    "Form",
    "Mixes",
    "attend",
    "cell_means",
    "choose_form",
    "find_landmarks",
    "interactive",
    "tokens_at_once",
]

Form = Literal["calls", "triton", "plain"]

# What one program of the Triton kernels can hold: all heads' weights of 16 tokens.
_MOST_HEADS, _MOST_LANDMARKS, _WIDEST_HEAD = 16, 64, 128


def tokens_at_once(weights_per_token: int, like: Tensor) -> int | None:
    """Say how many tokens are served at a time; None for all of them.

    A portion's weights, a megabyte, fit a CPU's caches and are a small share of the
    memory elsewhere. With gradients
    everything is kept anyway, and a traced program must not depend on the count.

    Args:
        weights_per_token: Images times heads times landmarks.
        like: A tensor on the device in question.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    portion = 2**18 if like.device.type in ("cpu", "meta") else 2**26
    return max(16, portion // weights_per_token)


def choose_form(q: Tensor, num_landmarks: int, mixes: Mixes, *, masked: bool) -> Form:
    """Pick how to attend, by mixes, mask, device, type and sizes.

    - "calls", two calls of torch's fused attention, which hold no weights: without
      mixes and mask, anywhere.
    - "triton", one program for all heads of 16 tokens: on CUDA in float32 and half
      types, for up to 16 heads of width 128 and 64 landmarks; not in exported
      programs, which must run where this package is not installed.
    - "plain", matrix products and softmax: everywhere else.
    """
    if all(mix is None for mix in mixes) and not masked:
        return "calls"
    fits = (
        q.shape[2] <= _MOST_HEADS
        and q.shape[3] <= _WIDEST_HEAD
        and num_landmarks <= _MOST_LANDMARKS
        and q.dtype is not torch.float64
    )
    on_gpu = q.device.type == "cuda" and has_triton()
    if on_gpu and fits and not torch.compiler.is_exporting():
        return "triton"
    return "plain"


def attend(
    q: Float[Tensor, "B N H K"],
    k: Float[Tensor, "B N H K"],
    v: Float[Tensor, "B N H K"],
    q_marks: Float[Tensor, "B L H K"],
    k_marks: Float[Tensor, "B L H K"],
    *,
    scale: float,
    mixes: Mixes,
    kept: Bool[Tensor, "B N"] | None = None,
    marked: Bool[Tensor, "B L"] | None = None,
    form: Form | None = None,
) -> Float[Tensor, "B N H K"]:
    """Gather values at the landmarks, then let every query read the landmarks.

        summary = mix(softmax_n(q_marks k^T * scale)) v          [B, H, L, K]
        out     = mix(softmax_l(q k_marks^T * scale)) summary

    Cost: O(N L H (K + H)) time. "calls" and "triton" hold no weights at all; backward
    of "triton" makes them again. "plain" holds one stack [B, H, L, N] without gradients
    (two while heads are mixed before the softmax), plus a portion; with gradients
    autograd keeps four, two more with a mask, and two more where heads are mixed both
    before and after the softmax.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        q_marks: Landmarks of the queries.
        k_marks: Landmarks of the keys, in the same order.
        scale: Factor on query-key products.
        mixes: How the heads talk.
        kept: True for keys that count.
        marked: True for landmarks that stand for at least one such token.
        form: See `choose_form`, which decides if this is None.
    """
    form = form or choose_form(q, q_marks.shape[1], mixes, masked=kept is not None)
    if form == "triton":
        served: Tensor = interactive(
            q, k, v, q_marks, k_marks, scale, *mixes, kept, marked
        )
        return served
    if form == "calls":
        heads_q, heads_k, heads_v, from_marks, to_marks = (
            x.transpose(1, 2) for x in (q, k, v, q_marks, k_marks)
        )
        summary = F.scaled_dot_product_attention(
            from_marks, heads_k, heads_v, scale=scale
        )
        mixed = F.scaled_dot_product_attention(heads_q, to_marks, summary, scale=scale)
        return mixed.transpose(1, 2)
    return _attend(q, k, v, q_marks, k_marks, scale, mixes, kept, marked)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_marks: Tensor,
    k_marks: Tensor,
    scale: float,
    mixes: Mixes,
    kept: Tensor | None,
    marked: Tensor | None,
) -> Tensor:
    """Do it in plain operators; without gradients in portions that stay in caches."""
    heads_q, heads_k, heads_v = (x.transpose(1, 2) for x in (q, k, v))
    from_marks, to_marks = (x.transpose(1, 2) for x in (q_marks, k_marks))
    step = tokens_at_once(q.shape[0] * q_marks.shape[1] * q.shape[2], q)
    over_tokens = weights_of(
        from_marks * scale, heads_k, mixes.before_keys, _over_rows(kept)
    )
    gathered = [
        mix_heads(mixes.after_keys, weights).to(v.dtype) @ values
        for weights, values in zip(
            _split(over_tokens, step, dim=3), _split(heads_v, step, dim=2), strict=True
        )
    ]
    summary = torch.stack(gathered).sum(dim=0) if len(gathered) > 1 else gathered[0]
    del over_tokens, gathered
    to_marks = to_marks * scale

    def read(queries: Tensor) -> Tensor:
        weights = weights_of(
            queries, to_marks, mixes.before_queries, _over_rows(marked)
        )
        read = mix_heads(mixes.after_queries, weights).to(v.dtype) @ summary
        return read.transpose(1, 2)

    if step is None:
        return read(heads_q)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    parts = zip(_split(heads_q, step, dim=2), _split(out, step, dim=1), strict=True)
    for queries, place in parts:
        place.copy_(read(queries))
    return out


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor q_marks, Tensor k_marks, float scale, "
    "Tensor? before_queries, Tensor? after_queries, Tensor? before_keys, "
    "Tensor? after_keys, Tensor? kept, Tensor? marked"
)


@torch.library.custom_op(
    "manyheads::interactive", mutates_args=(), schema=f"({_INPUTS}) -> Tensor"
)
def interactive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_marks: Tensor,
    k_marks: Tensor,
    scale: float,
    before_queries: Tensor | None,
    after_queries: Tensor | None,
    before_keys: Tensor | None,
    after_keys: Tensor | None,
    kept: Tensor | None,
    marked: Tensor | None,
) -> Tensor:
    """Do what `attend` does as one operator; backward makes the maps again."""
    mixes = Mixes(before_queries, after_queries, before_keys, after_keys)
    rest = (q, k, v, q_marks, k_marks, scale, mixes, kept, marked)
    if choose_form(q, q_marks.shape[1], mixes, masked=True) == "triton":
        from manyheads.kernels import triton_interactive

        return triton_interactive.forward(*rest)
    # What the operator says of its strides must be true in every form.
    with torch.no_grad():
        return _attend(*rest).contiguous()


@interactive.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


@torch.library.custom_op(
    "manyheads::interactive_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}) -> Tensor[]",
)
def interactive_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_marks: Tensor,
    k_marks: Tensor,
    scale: float,
    before_queries: Tensor | None,
    after_queries: Tensor | None,
    before_keys: Tensor | None,
    after_keys: Tensor | None,
    kept: Tensor | None,
    marked: Tensor | None,
) -> list[Tensor]:
    """Give the gradients of the five projections, then of the mixes that are there.

    See `manyheads.kernels.thin_maps.thin_gradients`.
    """
    mixes = Mixes(before_queries, after_queries, before_keys, after_keys)
    return thin_gradients(grad, (q, k, v, q_marks, k_marks), scale, mixes, kept, marked)


@interactive_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> list[Tensor]:
    wanted = (*inputs[:5], *(mix for mix in inputs[6:10] if mix is not None))
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.scale = inputs[5]
    ctx.save_for_backward(*inputs[:5], *inputs[6:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    found = interactive_backward(grad, *saved[:5], ctx.scale, *saved[5:])
    left = iter(found[5:])
    mixes = (None if mix is None else next(left) for mix in saved[5:9])
    return (*found[:5], None, *mixes, None, None)


interactive.register_autograd(_backward, setup_context=_setup_context)
register_autocast("interactive", projected=5)


def _split(x: Tensor, step: int | None, *, dim: int) -> tuple[Tensor, ...]:
    if step is None:
        return (x,)
    parts: tuple[Tensor, ...] = torch.split(x, step, dim)
    return parts


def _over_rows(kept: Bool[Tensor, "B J"] | None) -> Bool[Tensor, "B 1 1 J"] | None:
    return None if kept is None else kept[:, None, None]


def _work(q: Any, marks: Any, mixes: Any) -> tuple[int, int]:
    """Count multiply-adds of the products, and of the mixes."""
    B, N, H, K = q
    pairs = int(B) * int(N) * int(marks[1]) * int(H)
    return 4 * pairs * int(K), pairs * int(H) * sum(mix is not None for mix in mixes)


@register_flop_formula([torch.ops.manyheads.interactive])
def _flops(q: Any, k: Any, v: Any, q_marks: Any, *rest: Any, **_: Any) -> int:
    """Two products make the maps and two apply them, as in the plain form."""
    return 2 * sum(_work(q, q_marks, rest[2:6]))


@register_flop_formula([torch.ops.manyheads.interactive_backward])
def _backward_flops(
    grad: Any, q: Any, k: Any, v: Any, q_marks: Any, *rest: Any, **_: Any
) -> int:
    """Maps and summary again, two products for each of the four, three for each mix.

    A mix before the softmax asks for the scores once more.
    """
    products, mixes = _work(q, q_marks, rest[2:6])
    scores = sum(mix is not None for mix in (rest[2], rest[4]))
    return 2 * (products // 4 * (3 + 8 + scores) + 3 * mixes)
