"""Compact feed-forward layers: the output matrix as two thin ones.

Xu, Zhou, He, Li, Wang, "Vision Transformer with Attention Map Hallucination and FFN
Compaction", 2023, arXiv 2306.10875; this file is its second half (cFFN).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InvalidOption, ManyheadsError
from manyheads.specs import Spec

__all__ = [
    "FEED_FORWARDS",
    "Compact",
    "CompactLinear",
    "FeedForwardSpec",
    "OutputMoments",
    "Pointwise",
]

Pointwise = nn.Linear | nn.Conv2d
"""A matrix applied to every token: a linear layer or a 1x1 convolution."""


@dataclass(frozen=True, kw_only=True)
class OutputMoments:
    """What an output matrix put out on calibration images.

    Attributes:
        mean: Mean over tokens [D].
        second: Mean over tokens of the outer product with itself [D, D].
        num_tokens: Tokens that were seen.
    """

    mean: Tensor
    second: Tensor
    num_tokens: int


@dataclass(frozen=True, kw_only=True, repr=False)
class FeedForwardSpec(Spec):
    """What a feed-forward layer's output matrix becomes, by name and options."""

    @abstractmethod
    def problem(self, output: Pointwise) -> str | None:
        """Say in one clause why this matrix cannot be swapped, or None if it can."""

    @abstractmethod
    def build(
        self, output: Pointwise, moments: OutputMoments | None = None
    ) -> nn.Module:
        """Make what stands in the place of the output matrix, started from it."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Compact(FeedForwardSpec):
    """A feed-forward layer whose output matrix has a low rank.

        y = U (V h) + b        V [R, F], U [D, R], no nonlinearity between

    `rank` is a share of the output width D when it is a float and an absolute rank
    when it is an int; the default, half of D, is the only simple rule with which
    DeiT, PVT and Next-ViT all save what the paper reports.

    `branches` above one trains each factor as that many parallel branches, a linear
    one and others with a batch norm over tokens behind. Their sum is a linear layer in
    evaluation: `fuse` on the layer, or `timm.utils.reparameterize_model` on the model,
    folds them exactly and leaves what ``branches=1`` builds.

    Note:
        The paper does not fix the rank, the start or the number of branches. Without
        calibration images ours starts from the best rank-R approximation of the
        trained matrix; with them, from the one whose outputs on those images are
        closest. Further branches start at zero, so that they change nothing.

    Raises:
        InvalidOption: The rank is not a positive share or count, or there is not at
            least one branch.
    """

    rank: float | int = 0.5
    branches: int = 1

    def __post_init__(self) -> None:
        share = isinstance(self.rank, float) and 0 < self.rank <= 1
        count = type(self.rank) is int and self.rank > 0
        if not share and not count:
            raise InvalidOption(
                asked=f"Compact(rank={self.rank!r})",
                found="it is neither a share of the width in (0, 1] nor a positive int",
                fix="Use Compact(rank=0.5) for half of the width or Compact(rank=192).",
            )
        if type(self.branches) is not int or self.branches < 1:
            raise InvalidOption(
                asked=f"Compact(branches={self.branches!r})",
                found="it is not a positive number of branches",
                fix="Use branches=1, or branches=2 for one more with a batch norm.",
            )

    def rank_for(self, width: int) -> int:
        """Give the absolute rank for an output of `width` features, at least 1."""
        if isinstance(self.rank, int):
            return self.rank
        return max(1, round(self.rank * width))

    def problem(self, output: Pointwise) -> str | None:
        """Refuse ranks above what the matrix has, and what cannot fold back."""
        if isinstance(output, nn.Conv2d) and (
            output.kernel_size != (1, 1) or output.stride != (1, 1) or output.groups > 1
        ):
            return "it is a convolution over neighbours, not a matrix"
        weight = output.weight
        rank, full = self.rank_for(weight.shape[0]), min(weight.shape[:2])
        if rank > full:
            return f"rank {rank} exceeds the {full} that the matrix has"
        if self.branches > 1 and output.bias is None:
            return (
                "it has no bias into which a batch norm could fold; use "
                f"Compact(rank={self.rank})"
            )
        return None

    def build(
        self, output: Pointwise, moments: OutputMoments | None = None
    ) -> CompactLinear:
        """Factorise the output matrix."""
        return CompactLinear.from_linear(
            self, output, self.rank_for(output.weight.shape[0]), moments
        )


FEED_FORWARDS: tuple[type[FeedForwardSpec], ...] = (Compact,)


class CompactLinear(nn.Module):
    """A linear layer of rank R, as two factors that are never merged.

    Where the output matrix was a 1x1 convolution the factors are, too.

    Cost: ``R (F + D)`` multiply-adds a token in place of ``F D``; with branches, as
    many times that until they are folded.
    """

    inner: nn.Linear | nn.Conv2d | Branches
    outer: nn.Linear | nn.Conv2d | Branches

    def __init__(
        self,
        spec: Compact,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        convolution: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.convolution = rank, convolution
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = _pointwise(convolution, in_features, rank, bias=False, **place)
        outer = _pointwise(convolution, rank, out_features, bias=bias, **place)
        if spec.branches == 1:
            self.inner, self.outer = inner, outer
        else:
            self.inner = Branches(inner, spec.branches - 1)
            self.outer = Branches(outer, spec.branches - 1)

    @classmethod
    def from_linear(
        cls,
        spec: Compact,
        linear: Pointwise,
        rank: int,
        moments: OutputMoments | None = None,
    ) -> CompactLinear:
        """Start from the best approximation of that rank of a trained matrix.

        Every approximation here has the form ``U U^T W`` with R orthonormal columns in
        U. The eigenvectors of ``W W^T`` give the truncated singular value
        decomposition of W; those of the outputs' covariance give the least error of
        the outputs, and the bias takes over the mean of what is cut off.
        """
        weight = linear.weight
        made = cls(
            spec,
            weight.shape[1],
            weight.shape[0],
            rank,
            bias=linear.bias is not None,
            convolution=isinstance(linear, nn.Conv2d),
            device=weight.device,
            dtype=weight.dtype,
        ).train(linear.training)
        if weight.device.type == "meta":
            return made
        with torch.no_grad():
            matrix = weight.detach().flatten(1).double()
            bias = None if linear.bias is None else linear.bias.detach().double()
            basis = _basis(matrix, bias, rank, moments)
            projected = basis.t() @ matrix  # [R, F]
            length = projected.norm(dim=1)
            root = torch.where(length > 0, length, 1.0).sqrt()
            _plain(made.inner).weight.copy_(_shaped(projected / root[:, None], made))
            _plain(made.outer).weight.copy_(_shaped(basis * root, made))
            if bias is not None:
                if moments is not None:
                    mean = moments.mean.to(bias) - bias
                    bias = bias + mean - basis @ (basis.t() @ mean)
                _bias_of(_plain(made.outer)).copy_(bias)
        return made

    def fuse(self) -> CompactLinear:
        """Fold the branches of each factor into one layer, exactly, for evaluation.

        timm's `reparameterize_model` finds this method and puts the result in place.
        """
        if not isinstance(self.inner, Branches) or not isinstance(self.outer, Branches):
            return self
        weight = self.outer.plain.weight
        folded = CompactLinear(
            replace(self.spec, branches=1),
            self.in_features,
            self.out_features,
            self.rank,
            convolution=self.convolution,
            device=weight.device,
            dtype=weight.dtype,
        ).train(self.training)
        with torch.no_grad():
            (inner, shift), (outer, bias) = self.inner.folded(), self.outer.folded()
            _plain(folded.inner).weight.copy_(_shaped(inner, folded))
            _plain(folded.outer).weight.copy_(_shaped(outer, folded))
            _bias_of(_plain(folded.outer)).copy_(outer @ shift + bias)
        return folded

    def forward(self, x: Float[Tensor, "*F"]) -> Float[Tensor, "*D"]:
        """Apply both factors."""
        y: Tensor = self.outer(self.inner(x))
        return y


class Branches(nn.Module):
    """One factor in training: a plain layer plus others with a batch norm behind.

        y = W x + b + sum_i norm_i(W_i x)

    The norms' gains start at zero, so that a fresh sum is its plain layer.
    """

    plain: nn.Linear | nn.Conv2d

    def __init__(self, plain: Pointwise, count: int) -> None:
        super().__init__()
        self.plain = plain
        self.others = nn.ModuleList(NormedBranch(plain, i) for i in range(count))

    def forward(self, x: Float[Tensor, "*F"]) -> Float[Tensor, "*R"]:
        """Sum the branches."""
        y: Tensor = self.plain(x)
        for other in self.others:
            y = y + other(x)
        return y

    def folded(self) -> tuple[Float[Tensor, "D F"], Float[Tensor, " D"]]:
        """Give the one matrix and bias that the sum is in evaluation, in float64."""
        weight = self.plain.weight.detach().flatten(1).double()
        bias = weight.new_zeros(weight.shape[0])
        if self.plain.bias is not None:
            bias = bias + self.plain.bias.detach().double()
        for other in self.others:
            more, shift = cast("NormedBranch", other).folded()
            weight, bias = weight + more, bias + shift
        return weight, bias


class NormedBranch(nn.Module):
    """A linear layer and a batch norm over all tokens of the batch."""

    linear: nn.Linear | nn.Conv2d
    norm: nn.BatchNorm1d | nn.BatchNorm2d

    def __init__(self, plain: Pointwise, seed: int) -> None:
        super().__init__()
        outputs, inputs = plain.weight.shape[:2]
        place: dict[str, Any] = {
            "device": plain.weight.device,
            "dtype": plain.weight.dtype,
        }
        convolution = isinstance(plain, nn.Conv2d)
        self.linear = _pointwise(convolution, inputs, outputs, bias=False, **place)
        self.norm = (nn.BatchNorm2d if convolution else nn.BatchNorm1d)(
            outputs, **place
        )
        # The same start every time, whatever else drew random numbers before.
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(self.linear.weight.shape, generator=generator)
        with torch.no_grad():
            self.linear.weight.copy_(start * inputs**-0.5)
            self.norm.weight.zero_()

    def forward(self, x: Float[Tensor, "*F"]) -> Float[Tensor, "*R"]:
        """Normalise what the linear layer gives."""
        y: Tensor = self.linear(x)
        if isinstance(self.norm, nn.BatchNorm2d):
            return cast("Tensor", self.norm(y))
        return cast("Tensor", self.norm(y.flatten(0, -2))).view_as(y)

    def folded(self) -> tuple[Float[Tensor, "D F"], Float[Tensor, " D"]]:
        """Give matrix and bias from the running statistics, in float64."""
        weight = self.linear.weight.detach().flatten(1).double()
        mean, variance = self.norm.running_mean, self.norm.running_var
        if mean is None or variance is None:
            raise ManyheadsError(
                asked="folding a branch",
                found="its batch norm keeps no running statistics",
                fix="Build it with Compact(branches=...) and leave its norms as built.",
            )
        gain = self.norm.weight.detach().double()
        gain = gain / (variance.double() + self.norm.eps).sqrt()
        return gain[:, None] * weight, self.norm.bias.detach().double() - gain * mean


_RIDGE = 1e-3


def _basis(
    matrix: Float[Tensor, "D F"],
    bias: Float[Tensor, " D"] | None,
    rank: int,
    moments: OutputMoments | None,
) -> Float[Tensor, "D R"]:
    """Find the R output directions worth keeping."""
    spread = matrix @ matrix.t()
    if moments is not None:
        seen = moments.second.to(spread)
        if bias is not None:
            mean = moments.mean.to(spread)
            seen = seen - torch.outer(mean, mean)
        # Directions that few images left out still count a little, as if inputs had
        # no preferred direction. A matrix of zeros has none to add.
        if (total := spread.trace()) > 0:
            seen = seen + _RIDGE * seen.trace() / total * spread
        spread = seen
    _, vectors = torch.linalg.eigh(spread)
    kept: Tensor = vectors[:, -rank:].flip(1)
    return kept


def _pointwise(
    convolution: bool,
    inputs: int,
    outputs: int,
    *,
    bias: bool,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Pointwise:
    """Make an empty layer: its start is known, no random number is drawn for it."""
    kind = partial(nn.Conv2d, kernel_size=1) if convolution else nn.Linear
    made: Pointwise = kind(inputs, outputs, bias=bias, device="meta", dtype=dtype)
    empty: Pointwise = made.to_empty(device=device or torch.get_default_device())
    return empty


def _plain(factor: nn.Linear | nn.Conv2d | Branches) -> Pointwise:
    return factor.plain if isinstance(factor, Branches) else factor


def _bias_of(layer: Pointwise) -> Tensor:
    """Narrow the type: only called where the layer was built with a bias."""
    return layer.weight.new_empty(0) if layer.bias is None else layer.bias


def _shaped(matrix: Tensor, layer: CompactLinear) -> Tensor:
    shaped: Tensor = matrix[:, :, None, None] if layer.convolution else matrix
    return shaped
