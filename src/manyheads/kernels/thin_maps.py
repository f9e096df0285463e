"""Thin maps: tokens over landmarks and landmarks over tokens, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["APART", "Mixes", "mix_heads", "thin_gradients", "weights_of"]


class Mixes(NamedTuple):
    """Head-by-head matrices [H, H], row = new head; None leaves the heads apart.

    Attributes:
        before_queries: On the scores of queries against landmarks.
        after_queries: On the weights of queries over landmarks.
        before_keys: On the scores of landmarks against keys.
        after_keys: On the weights of landmarks over keys.
    """

    before_queries: Tensor | None = None
    after_queries: Tensor | None = None
    before_keys: Tensor | None = None
    after_keys: Tensor | None = None


APART = Mixes()
"""No head hears of another."""


def thin_gradients(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    scale: float,
    mixes: Mixes,
    kept: Tensor | None,
    marked: Tensor | None,
) -> list[Tensor]:
    """Pull a gradient back through both thin maps, which are made again here.

    With W_q, W_k the mixed maps and g = grad, everything per head:

        summary = W_k v     dsummary = W_q^T g     dW_q = g summary^T
        dv = W_k^T dsummary                        dW_k = dsummary v^T

    and each map's own gradient goes through its mixes and its softmax.

    Cost: memory of four stacks [B, H, L, N] in float32 while it runs, none before.

    Args:
        grad: Gradient of the output [B, N, H, K].
        inputs: Queries, keys, values, landmarks of queries, landmarks of keys.
        scale: Factor on query-key products.
        mixes: How the heads talk.
        kept: True for keys that count.
        marked: True for landmarks that count.

    Returns:
        Gradients of `inputs`, then of the mixes that are not None, contiguous.
    """
    q, k, v, q_marks, k_marks = (x.transpose(1, 2) for x in inputs)
    g = grad.transpose(1, 2)
    over_tokens = _ThinMap(q_marks, k, scale, mixes.before_keys, mixes.after_keys, kept)
    summary = over_tokens.weights.to(v.dtype) @ v
    over_marks = _ThinMap(
        q, k_marks, scale, mixes.before_queries, mixes.after_queries, marked
    )
    dsummary = over_marks.weights.to(v.dtype).mT @ g
    dq, dk_marks, *query_mixes = over_marks.pull(g @ summary.mT)
    del over_marks
    dv = over_tokens.weights.to(v.dtype).mT @ dsummary
    dq_marks, dk, *key_mixes = over_tokens.pull(dsummary @ v.mT)
    found = (dq, dk, dv, dq_marks, dk_marks)
    return [
        *(x.transpose(1, 2).contiguous() for x in found),
        *(mix for mix in (*query_mixes, *key_mixes) if mix is not None),
    ]


class _ThinMap:
    """One map with what its backward needs."""

    def __init__(
        self,
        rows: Tensor,
        columns: Tensor,
        scale: float,
        before: Tensor | None,
        after: Tensor | None,
        kept: Tensor | None,
    ) -> None:
        self.rows, self.columns, self.scale = rows, columns, scale
        self.before, self.after = before, after
        over = None if kept is None else kept[:, None, None]
        # Only the mix before the softmax asks for the scores again.
        self.scores = None if before is None else _wide(rows @ columns.mT) * scale
        self.softmax = weights_of(rows * scale, columns, before, over)
        self.weights = mix_heads(after, self.softmax)

    def pull(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Give the gradients of rows, columns and the two mixes."""
        dweights = grad.to(self.softmax.dtype)
        dafter = _pairs(dweights, self.softmax, self.after)
        dsoftmax = (
            dweights if self.after is None else mix_heads(self.after.mT, dweights)
        )
        inner = (self.softmax * dsoftmax).sum(dim=-1, keepdim=True)
        dscores = self.softmax * (dsoftmax - inner)
        dbefore = None
        if self.before is not None and self.scores is not None:
            dbefore = _pairs(dscores, self.scores, self.before)
            dscores = mix_heads(self.before.mT, dscores)
        dscores = (dscores * self.scale).to(self.rows.dtype)
        return dscores @ self.columns, dscores.mT @ self.rows, dbefore, dafter


def _pairs(new: Tensor, old: Tensor, matrix: Tensor | None) -> Tensor | None:
    """Give the gradient of a mix: every new head meets every old one."""
    if matrix is None:
        return None
    return torch.einsum("bgij,bhij->gh", new, old).to(matrix.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def weights_of(
    rows: Float[Tensor, "B H I K"],
    columns: Float[Tensor, "B H J K"],
    before: Tensor | None,
    kept: Bool[Tensor, "B 1 1 J"] | None,
) -> Float[Tensor, "B H I J"]:
    """Softmax over columns; a row without any is zero.

    Half types leave here as float32, so that mixing heads rounds nothing.
    """
    scores = rows @ columns.mT
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    scores = mix_heads(before, scores)
    if kept is None:
        return _softmax(scores)
    scores = scores.masked_fill(~kept, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).masked_fill(~kept, 0.0)


def _softmax(scores: Float[Tensor, "B H I J"]) -> Float[Tensor, "B H I J"]:
    """Take the softmax in place where nobody needs the scores again."""
    free = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if free and scores.device.type == "cpu":
        return torch.softmax(scores, dim=-1, out=scores)
    return scores.softmax(dim=-1)


def mix_heads(
    matrix: Float[Tensor, "H H"] | None, x: Float[Tensor, "B H I J"]
) -> Float[Tensor, "B H I J"]:
    """Make every head a weighted sum of all heads, entry by entry."""
    if matrix is None:
        return x
    B, H, I, J = x.shape
    wide = matrix.to(x.dtype).expand(B, H, H)
    return torch.bmm(wide, x.reshape(B, H, I * J)).reshape(B, H, I, J)
