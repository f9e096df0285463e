"""Hydra attention: one head per feature, one summary per image.

Bolya, Fu, Dai, Zhang, Hoffman, "Hydra Attention: Efficient Attention with Many
Heads", 2022, arXiv 2209.07484.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.attention.base import (
    AttentionSpec,
    CoreCost,
    Mechanism,
    in_parts,
    key_mask_of,
    row_bytes,
)
from manyheads.errors import InvalidOption, nearest
from manyheads.geometry import Geometry, Grid
from manyheads.kernels import hydra as kernel_hydra

__all__ = ["Hydra", "HydraAttention", "Kernel", "hydra_attention", "hydra_maps"]

Kernel = Literal["cosine", "mean", "aft"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Hydra(AttentionSpec):
    """Attention that is linear in tokens and in features.

    With as many heads as features the score of a token pair is a plain product, so
    the sum over keys can be taken first and shared by all queries:

        summary = sum_m  phi_k(k_m) * v_m        one D-vector per image
        out_n   = phi_q(q_n) * summary           no pair of tokens ever meets

    The `kernel` chooses phi: "cosine" divides by the length of the vector over all D
    features (the paper's choice), "mean" divides by the square root of the number of
    tokens (PolyNL), "aft" takes a sigmoid of the query and a softmax over tokens of
    the key (AFT-Simple).

    The output of "cosine" is a sum, so it grows with the number of tokens: a model
    trained at one resolution meets a larger scale at another. `reference_tokens`
    multiplies the output by ``reference_tokens / N`` (N counts unmasked tokens); set it
    to the token count of training to keep the scale. Off by default.

    Note:
        Softmax weights do not carry over: a pretrained block swapped to Hydra is wrong
        until it is healed.
        Differs from the paper: `reference_tokens` is ours. The paper does not fix the
        precision of the token sum; ours is float32 for half types.

    Raises:
        InvalidOption: The kernel is unknown; or `reference_tokens` is not a positive
            number, or is given to a kernel whose output does not grow.
    """

    takes_reduced_keys: ClassVar[bool] = True

    kernel: Kernel = "cosine"
    reference_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.kernel not in get_args(Kernel):
            raise InvalidOption(
                asked=f"Hydra(kernel={self.kernel!r})",
                found="there is no such kernel",
                fix=nearest(str(self.kernel), get_args(Kernel)),
            )
        if self.reference_tokens is None:
            return
        if not isinstance(self.reference_tokens, int) or self.reference_tokens < 1:
            raise InvalidOption(
                asked=f"Hydra(reference_tokens={self.reference_tokens!r})",
                found="it is not a positive whole number of tokens",
                fix="Use the token count of training, e.g. reference_tokens=197.",
            )
        if self.kernel != "cosine":
            raise InvalidOption(
                asked=f"Hydra(kernel={self.kernel!r}, "
                f"reference_tokens={self.reference_tokens})",
                found=f"the output of {self.kernel!r} does not grow with tokens",
                why="the correction would shrink what needs no correction",
                fix=f"Use Hydra(kernel={self.kernel!r}).",
            )

    def problem(self, geometry: Geometry) -> str | None:
        """Refuse layers that drop map entries: there is no map to drop them from."""
        if geometry.attention_dropout > 0:
            return (
                f"the layer drops attention entries (p={geometry.attention_dropout}) "
                "and Hydra has no map to drop them from; build the model with "
                "attn_drop_rate=0"
            )
        return None

    def build(self, geometry: Geometry) -> HydraAttention:
        """Make the module; it has no parameters, the host's projections serve it."""
        return HydraAttention(self, geometry)

    def core_cost(self, geometry: Geometry, num_tokens: int) -> CoreCost:
        """Count ``(N + S) D`` for summary and gate, as much again for the two phi."""
        num_keys = geometry.reduced_keys or num_tokens
        work = (num_tokens + num_keys) * geometry.attention_dim
        return CoreCost(attention=work, elementwise=work)


class HydraAttention(Mechanism):
    """Hydra as a module without parameters.

    Cost: O(N D) time; the largest temporary has the size of the output.
    """

    spec: Hydra

    def forward(
        self,
        q: Float[Tensor, "B N H K"],
        k: Float[Tensor, "B S H K"],
        v: Float[Tensor, "B S H K"],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B N H K"]:
        """Mix the values; a masked key enters neither the sum nor the token count."""
        B, S = v.shape[:2]
        kept = key_mask_of(mask, B, S, "Hydra")
        # Normalised queries arrive in float32 under autocast, values do not.
        flat = (q.to(v.dtype).flatten(2), k.to(v.dtype).flatten(2), v.flatten(2))
        if self.spec.kernel == "cosine" and kernel_hydra.use_operator():
            mixed = kernel_hydra.hydra(*flat, kept)
            mixed = _corrected(mixed, self.spec.reference_tokens, S, kept)
        else:
            mixed = hydra_attention(
                *flat,
                kernel=self.spec.kernel,
                key_mask=kept,
                reference_tokens=self.spec.reference_tokens,
            )
        return mixed.reshape(q.shape)

    def maps(
        self,
        q: Float[Tensor, "B N H K"],
        k: Float[Tensor, "B S H K"],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B D N S"]:
        """Build one rank-1 map per feature: O(D N^2) memory, for small N only."""
        return hydra_maps(
            q.flatten(2),
            k.flatten(2),
            kernel=self.spec.kernel,
            key_mask=key_mask_of(mask, k.shape[0], k.shape[1], "Hydra"),
            reference_tokens=self.spec.reference_tokens,
        )

    @property
    def num_maps(self) -> int:
        """One map per feature."""
        return self.geometry.attention_dim

    def rows(
        self,
        q: Float[Tensor, "B N H K"],
        k: Float[Tensor, "B S H K"],
        *,
        queries: Sequence[int],
        heads: Sequence[int],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B Mr Nr S"]:
        """Build some rows of some features' maps; `heads` are features here."""
        kept = key_mask_of(mask, k.shape[0], k.shape[1], "Hydra")
        phi_q, phi_k = _features(q.flatten(2), k.flatten(2), self.spec.kernel, kept)
        features = list(heads)
        chosen = phi_q[:, list(queries)][..., features]
        rows = torch.einsum("bnd,bmd->bdnm", chosen, phi_k[..., features])
        return _corrected(rows, self.spec.reference_tokens, k.shape[1], kept)

    def influence(
        self,
        q: Float[Tensor, "B N H K"],
        k: Float[Tensor, "B S H K"],
        v: Float[Tensor, "B S H K"],
        *,
        queries: Sequence[int],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B Nr S"]:
        """Measure what each token adds to some queries' outputs, as a length.

            given[n, m]     = phi_q(q_n) * phi_k(k_m) * v_m       one D-vector
            influence[n, m] = | given[n, m] |

        The maps alone do not tell: a feature whose value is zero mixes nothing.
        """
        kept = key_mask_of(mask, k.shape[0], k.shape[1], "Hydra")
        phi_q, phi_k = _features(q.flatten(2), k.flatten(2), self.spec.kernel, kept)
        gate = phi_q[:, list(queries)].square()
        given = (phi_k * _wide(v.flatten(2))).square()

        def lengths(part: Sequence[int]) -> Tensor:
            length = torch.einsum("bnd,bmd->bnm", gate[:, list(part)], given).sqrt()
            return _corrected(length, self.spec.reference_tokens, k.shape[1], kept)

        return in_parts(lengths, range(len(queries)), row_bytes(q, k))

    def contributions(
        self,
        k: Float[Tensor, "B S H K"],
        v: Float[Tensor, "B S H K"],
        mask: Bool[Tensor, "B S"] | Tensor | None = None,
    ) -> Float[Tensor, "B S"]:
        """Give each token's share of the summary vector; the shares sum to one.

            given_m = phi_k(k_m) * v_m        summary = sum_m given_m
            share_m = <given_m, summary> / |summary|^2

        A negative share pulls the summary back.
        """
        kept = key_mask_of(mask, k.shape[0], k.shape[1], "Hydra")
        _, phi_k = _features(k.flatten(2), k.flatten(2), self.spec.kernel, kept)
        given = phi_k * _wide(v.flatten(2))
        summary = given.sum(dim=1, keepdim=True)
        square = summary.square().sum(dim=-1).clamp_min(torch.finfo(summary.dtype).tiny)
        return (given * summary).sum(dim=-1) / square


def hydra_attention(
    q: Float[Tensor, "B N D"],
    k: Float[Tensor, "B S D"],
    v: Float[Tensor, "B S D"],
    *,
    kernel: Kernel = "cosine",
    key_mask: Bool[Tensor, "B S"] | None = None,
    reference_tokens: int | None = None,
) -> Float[Tensor, "B N D"]:
    """Let every token read one summary of the image, gated feature by feature.

        summary = sum_m phi_k(k_m) * v_m       out_n = phi_q(q_n) * summary

    The readable linear form in plain operators: what `torch.export` and ONNX trace.
    Half types are summed in float32.

    Cost: O(N D) time, a few temporaries of the inputs' size.

    Args:
        q: Projected queries, prefix tokens included.
        k: Projected keys, in the same token order.
        v: Projected values, in the same token order.
        kernel: What phi is; see `Hydra`.
        key_mask: True for tokens that count; the others enter no sum.
        reference_tokens: Token count whose scale the output keeps; see `Hydra`.

    Returns:
        Mixed tokens, before the output projection.
    """
    phi_q, phi_k = _features(q, k, kernel, key_mask)
    summary = (phi_k * _wide(v)).sum(dim=1, keepdim=True)  # [B, 1, D]
    mixed = _corrected(phi_q * summary, reference_tokens, k.shape[1], key_mask)
    return mixed.to(v.dtype)


def hydra_maps(
    q: Float[Tensor, "B N D"],
    k: Float[Tensor, "B S D"],
    *,
    kernel: Kernel = "cosine",
    key_mask: Bool[Tensor, "B S"] | None = None,
    reference_tokens: int | None = None,
) -> Float[Tensor, "B D N S"]:
    """Build the map of every feature, the ones `hydra_attention` never forms.

        maps[d, n, m] = phi_q(q_n)[d] * phi_k(k_m)[d]      rank 1, one per feature

    Cost: O(D N^2) time and memory: for tests and pictures.
    """
    phi_q, phi_k = _features(q, k, kernel, key_mask)
    maps = torch.einsum("bnd,bmd->bdnm", phi_q, phi_k)
    return _corrected(maps, reference_tokens, k.shape[1], key_mask)


def _features(
    q: Float[Tensor, "B N D"],
    k: Float[Tensor, "B S D"],
    kernel: Kernel,
    key_mask: Bool[Tensor, "B S"] | None,
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B S D"]]:
    """Apply phi to both sides; masked keys become zero and so leave every sum."""
    q, k = _wide(q), _wide(k)
    if kernel == "cosine":
        phi_q, phi_k = _unit(q), _unit(k)
    elif kernel == "mean":
        root = _num_kept(k.shape[1], key_mask, q).sqrt()
        phi_q, phi_k = q / root, k / root
    else:
        if key_mask is not None:
            k = k.masked_fill(~key_mask[..., None], torch.finfo(k.dtype).min)
        phi_q, phi_k = q.sigmoid(), k.softmax(dim=1)
    if key_mask is not None:
        phi_k = phi_k.masked_fill(~key_mask[..., None], 0.0)
    return phi_q, phi_k


def _unit(x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """Divide by the length over all D features; a zero vector stays zero.

    Per head of width one this would be sign(x): the length belongs to the full vector.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # The inner `where` keeps infinity, and thus NaN, out of the gradient.
    inverse = 1.0 / torch.where(length > 0, length, math.inf)
    return x * inverse


def _num_kept(
    num_tokens: int, key_mask: Bool[Tensor, "B S"] | None, like: Tensor
) -> Float[Tensor, "#B 1 1"]:
    """Count the tokens that enter the sum, at least one."""
    if key_mask is None:
        return like.new_full((1, 1, 1), num_tokens)
    return key_mask.sum(dim=1).clamp_min(1).to(like.dtype)[:, None, None]


def _corrected(
    mixed: Tensor,
    reference_tokens: int | None,
    num_tokens: int,
    key_mask: Bool[Tensor, "B S"] | None,
) -> Tensor:
    """Scale by reference over actual token count; the identity where not asked for."""
    if reference_tokens is None:
        return mixed
    factor = reference_tokens / _num_kept(num_tokens, key_mask, mixed)
    return mixed * (factor if mixed.ndim == 3 else factor[:, None])


def _wide(x: Tensor) -> Tensor:
    """Lift half types to float32 so that a sum over many tokens keeps its digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
