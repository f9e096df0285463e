"""Least-squares refits: the last matrices of a converted block, solved, not trained.

What a swap changes lies before a linear layer: the output projection of attention, the
last factor of a compact layer, and behind both the output matrix of the feed-forward
layer. Given some images, the best such matrix is known in closed form. No labels, no
learning rate, no random number: the same images always give the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manyheads.data import ImageSource
from manyheads.errors import ManyheadsError, NonFiniteLoss, NotHealable
from manyheads.ffn import Branches, CompactLinear, Pointwise
from manyheads.hosts import Site, respond
from manyheads.loop.probes import Call, Recorder, first, like
from manyheads.loop.weights import keeping_modes
from manyheads.pairing import Pair

__all__ = ["LeastSquares", "Refit", "refit", "refit_on"]

_RIDGE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Refit:
    """One linear layer that was solved for.

    Attributes:
        path: Module path in the student.
        before: Squared error of what the layer is to give, relative to its square,
            on the images of the refit.
        after: The same after the refit; never more than before.
    """

    path: str
    before: float
    after: float


class LeastSquares:
    """Sums over tokens, from which the best change of one linear layer is solved.

        minimise over W, b    sum_n |W x_n + b - y_n|^2  +  lambda |W - W_0|^2

    W_0 is what the layer holds: directions that the images leave out stay as they were
    inherited. `lambda` is a small share of the mean of |x_f|^2 over features.

    Cost: O(n F^2 + F^3) for n tokens of F features; two [F, F] matrices in float64.
    """

    def __init__(self, layer: Pointwise) -> None:
        self.layer = layer
        self.gram: Tensor = torch.zeros(())
        self.cross: Tensor = torch.zeros(())
        self.missing = self.wanted = 0.0

    def add(self, x: Tensor, missing: Tensor, wanted: Tensor) -> None:
        """Take in a batch of tokens, features last.

        Args:
            x: What the layer reads, [..., F].
            missing: What its output lacks, y - (W_0 x + b), [..., D].
            wanted: What the error is measured against, [..., D].
        """
        rows, lacks = _rows(x), _rows(missing)
        if self.layer.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        self.gram = self.gram.to(rows) + rows.t() @ rows
        self.cross = self.cross.to(rows) + rows.t() @ lacks
        self.missing += float(lacks.square().sum())
        self.wanted += float(_rows(wanted).square().sum())

    @torch.no_grad()
    def solve(self) -> tuple[float, float]:
        """Change the layer to the solution; give its relative error before and after.

        Raises:
            RuntimeError: There is no solution; nothing was changed.
        """
        size = self.layer.weight.shape[1]
        damped, precision = self.gram.clone(), torch.finfo(self.gram.dtype)
        ridge = _RIDGE * self.gram.diagonal()[:size].mean()
        damped.diagonal()[:size].add_(ridge.clamp_min(precision.eps))
        factor = torch.linalg.cholesky(damped)
        change = torch.cholesky_solve(self.cross, factor)  # [F (+ 1), D]
        gained = (change * (2 * self.cross - self.gram @ change)).sum()
        weight = change[:size].t().reshape(self.layer.weight.shape)
        self.layer.weight.add_(weight.to(self.layer.weight))
        if self.layer.bias is not None:
            self.layer.bias.add_(change[size].to(self.layer.bias))
        scale = max(self.wanted, precision.tiny)
        return self.missing / scale, max(self.missing - float(gained), 0.0) / scale


@torch.no_grad()
def refit(
    pair: Pair, images: Tensor, *, unswapped: bool = True, batch_size: int = 32
) -> tuple[Refit, ...]:
    """Solve for the last matrices of every converted block, first block first.

        projection of swapped attention    to give what the teacher's layer gives
        output matrix of feed-forward      to give what the teacher's block gives

    Every block is fed what the student's refitted blocks before it put out, and asked
    for what the teacher's block put out, so that later blocks make good what earlier
    ones lack. Each error is the least that its matrix allows, up to the ridge.

    Cost: both models run on the images up to every converted block, half of
    ``blocks * images`` forward passes of each, and four matrix products a block; one
    block's inputs and outputs are held.

    Args:
        pair: Student, which changes, and teacher.
        images: Preprocessed images [n, C, H, W]; a few hundred.
        unswapped: Whether an output matrix that was not swapped itself is solved for
            where attention before it was.
        batch_size: Images at a time.

    Returns:
        What was solved, in order; empty where no converted block ends in a matrix.

    Raises:
        NonFiniteLoss: A block gives values that are not finite.
    """
    done: list[Refit] = []
    kept: list[tuple[Tensor, Tensor]] = []
    with keeping_modes(pair.student, pair.teacher):
        pair.student.eval()
        pair.teacher.eval()
        try:
            for ours, theirs in zip(
                pair.student_sites, pair.teacher_sites, strict=True
            ):
                if ours.attention == theirs.attention and ours.ffn == theirs.ffn:
                    continue
                block = _Block(pair, ours, images, batch_size, kept)
                if ours.attention != theirs.attention:
                    done += block.fit_attention()
                if unswapped or ours.ffn != theirs.ffn:
                    done += block.fit_output()
        except BaseException:
            for tensor, before in reversed(kept):
                tensor.copy_(before)
            raise
    return tuple(done)


def refit_on(
    pair: Pair, source: ImageSource, count: int, *, unswapped: bool, alone: bool
) -> tuple[Refit, ...]:
    """Refit on some images of a source, on fewer where they are large.

    Args:
        pair: Student, which changes, and teacher.
        source: Where images come from.
        count: How many of 224 x 224 pixels; 0 for no refit.
        unswapped: As in `refit`.
        alone: Whether nothing else follows, so that it has to find something.

    Raises:
        NotHealable: It is all there is, and no matrix was found.
    """
    if not count:
        return ()
    pixels = source.sample(1).images[0, 0].numel()
    # What goes into a block is held for all of them: as much as usual, no more.
    images = source.sample(min(count, _share_of(512, pixels))).images
    batch_size = _share_of(32, pixels)
    found = refit(pair, images, unswapped=unswapped, batch_size=batch_size)
    if alone and not found:
        raise NotHealable(
            asked=f"refit_images={count}",
            found="no converted block of this model ends in a matrix that is known",
            why="without epochs, solving for such matrices is all there is to do",
            fix="Train: leave block_epochs and logit_epochs out.",
        )
    return found


def _share_of(count: int, pixels: int) -> int:
    """How many images hold as many pixels as so many of 224 x 224."""
    return max(1, count * 224**2 // pixels)


class _Block:
    """One block of both models with what goes into it, batch by batch."""

    def __init__(
        self,
        pair: Pair,
        site: Site,
        images: Tensor,
        batch_size: int,
        kept: list[tuple[Tensor, Tensor]],
    ) -> None:
        self.student, self.site, self.kept = pair.student, site, kept
        self.block = pair.student.get_submodule(site.path)
        self.parts = site.attention_parts or (site.attention_path,)
        watched = {site.path, site.attention_path, *_linears(pair.teacher, self.parts)}
        if site.ffn_path is not None:
            watched.add(site.ffn_path)
        self.inputs: list[Call] = []
        self.targets: list[dict[str, Call]] = []
        for batch in torch.split(images, batch_size):
            self.targets.append(_run_until(pair.teacher, site.path, batch, watched))
            reached = _run_until(pair.student, site.path, batch, {site.path})
            self.inputs.append(reached[site.path])

    def fit_attention(self) -> list[Refit]:
        """Solve for the projection behind the mechanism."""
        with Recorder(self.student, _linears(self.student, self.parts)) as calls:
            self._run(self.inputs[0])
        if not calls:
            return []
        # Whatever gates or norms there are, the projection runs last.
        path = next(reversed(calls))
        known = path if path in self.targets[0] else self.site.attention_path
        return self._fit(path, known, None)

    def fit_output(self) -> list[Refit]:
        """Solve for the block's last matrix, against the block's output if it can."""
        path = self.site.ffn_path
        if path is None or not path.startswith(f"{self.site.path}."):
            return []
        gain = self._gain(path)
        return self._fit(path, path if gain is None else self.site.path, gain)

    def _gain(self, path: str) -> Tensor | None:
        """How the block's output follows this layer's, feature by feature.

        One where the layer's output is added, the layer scale where that is applied;
        None where something else comes between, or features stand elsewhere.
        """
        with Recorder(self.student, [path]) as calls:
            plain = self._run(self.inputs[0])
        if calls[path].output.shape != plain.shape:
            return None
        module = self.student.get_submodule(path)
        handle = module.register_forward_hook(lambda _m, _a, output: output + 1)
        try:
            change = self._run(self.inputs[0]) - plain
        finally:
            handle.remove()
        change = _features_last(change, module)
        gain = change.reshape(-1, change.shape[-1]).mean(dim=0)
        same = torch.allclose(change, gain.expand_as(change), rtol=1e-2, atol=0)
        return gain if same and bool((gain != 0).all()) else None

    def _fit(self, path: str, target: str, gain: Tensor | None) -> list[Refit]:
        """Solve for the layer at `path` by what the module at `target` is to give."""
        if target not in self.targets[0]:
            return []
        module = self.student.get_submodule(path)
        layer, inner = _matrix(module, path)
        sums = LeastSquares(layer)
        for call, taught in zip(self.inputs, self.targets, strict=True):
            with Recorder(self.student, [inner, target]) as learned:
                self._run(call)
            x, found, wanted = (
                _features_last(like(value, self.student), module)
                for value in (
                    learned[inner].args[0],
                    learned[target].output,
                    taught[target].output,
                )
            )
            if not (found.isfinite().all() and wanted.isfinite().all()):
                raise _not_finite(path)
            missing = wanted - found
            sums.add(x, missing if gain is None else missing / gain, wanted)
        self.kept += [(p.data, p.detach().clone()) for p in layer.parameters()]
        try:
            before, after = sums.solve()
        except RuntimeError:
            raise _not_finite(path) from None
        return [Refit(path=path, before=before, after=after)]

    def _run(self, call: Call) -> Tensor:
        output: Tensor = first(self.block(*call.args, **call.kwargs))
        return output


class _Reached(Exception):
    """The module of interest has run; the rest of the model need not."""


def _run_until(
    model: nn.Module, path: str, images: Tensor, watched: set[str]
) -> dict[str, Call]:
    """Run a model as far as one module, noting some calls on the way."""

    def stop(*_: object) -> None:
        raise _Reached

    with Recorder(model, [path, *(watched - {path})]) as calls:
        handle = model.get_submodule(path).register_forward_hook(stop)
        try:
            respond(model, like(images, model))
        except _Reached:
            pass
        finally:
            handle.remove()
    return dict(calls)


def _linears(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """List the linear layers inside some modules."""
    return [
        f"{part}.{name}" if name else part
        for part in parts
        for name, module in model.get_submodule(part).named_modules()
        if isinstance(module, nn.Linear)
    ]


def _matrix(module: nn.Module, path: str) -> tuple[Pointwise, str]:
    """Give the last matrix of an output layer, and the module that reads its input."""
    if isinstance(module, CompactLinear):
        outer = module.outer
        return outer.plain if isinstance(outer, Branches) else outer, f"{path}.outer"
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise ManyheadsError(
            asked=f"refitting {path}",
            found=f"it is a {type(module).__name__}, not a matrix",
            fix="Heal with refit_images=0, and please report this.",
        )
    return module, path


def _features_last(x: Tensor, module: nn.Module) -> Tensor:
    """Put the features of a pointwise convolution where a matrix has them."""
    convolution = isinstance(module, nn.Conv2d) or (
        isinstance(module, CompactLinear) and module.convolution
    )
    return x.movedim(1, -1) if convolution else x


def _rows(x: Tensor) -> Tensor:
    """One row per token, in float64; where a device has none, on the processor."""
    flat = x.reshape(-1, x.shape[-1])
    return (flat.cpu() if flat.device.type == "mps" else flat).double()


def _not_finite(path: str) -> NonFiniteLoss:
    return NonFiniteLoss(
        asked="refitting a converted block by least squares",
        found="it gives values that are not finite, or its equations have no solution",
        where=path,
        why="one such matrix would spoil every score",
        fix="The model keeps the weights that it had. Look at the images, or convert "
        "again from good weights.",
    )
