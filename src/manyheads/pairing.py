"""Student and teacher side by side: which blocks differ, and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import Batch
from manyheads.errors import InvalidOption, NotHealable
from manyheads.hosts import Site, find_host, host_of, is_random, respond
from manyheads.loop.probes import Recorder, broken_block, first, like, try_one
from manyheads.loop.weights import keeping_modes

__all__ = ["Pair"]


class Pair:
    """A student and its teacher, block by block.

    Attributes:
        student_sites: The student's blocks.
        teacher_sites: The teacher's, in the same order.
        paths: Paths of all blocks; they are the same in both models.
        differing: Paths of the modules that hold what was converted.
        scored: Whether the models give scores of classes; else they give features,
            compared by relative squared error. Known after `require_accepted`.

    Raises:
        NotHealable: The models do not pair up, nothing was converted, they share
            weights, or the student's weights are of a half type.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float | int,
        feature_weight: float | int,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.temperature, self.feature_weight = temperature, feature_weight
        self.student_sites, self.teacher_sites = _matching_sites(student, teacher)
        self.paths = tuple(site.path for site in self.teacher_sites)
        self.differing = _differing(self.student_sites, self.teacher_sites)
        self.scored = True
        self._sizes: Mapping[str, float] = {}
        self._shown: torch.Size | None = None

    def set_student_mode(self) -> None:
        """Train, with everything random at rest."""
        self.student.train()
        for module in self.student.modules():
            if is_random(module):
                module.training = False

    def require_accepted(self, images: Tensor, where: str) -> None:
        """See that both models take such images and answer alike.

        Raises:
            DataError: One of them refuses an image.
            NotHealable: They give different numbers of scores, or other features.
        """
        both = (self.student, self.teacher)
        ours, theirs = (try_one(model, images, where) for model in both)
        self.scored = host_of(self.student).gives_scores(self.student, ours)
        if ours.shape == theirs.shape:
            return
        if self.scored:
            found = (
                f"it gives {ours.shape[-1]} scores and the teacher {theirs.shape[-1]}"
            )
        else:
            found = (
                f"it gives features {list(ours.shape[1:])} and the teacher "
                f"{list(theirs.shape[1:])}"
            )
        raise _not_healable(found)

    def block_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compare every converted block with the teacher's, on the teacher's input."""
        with torch.no_grad(), Recorder(self.teacher, self.differing) as calls:
            respond(self.teacher, like(batch.images, self.teacher))
        self._show_grid(batch.images)
        losses = {}
        for path in self.differing:
            args = [like(value, self.student) for value in calls[path].args]
            kwargs = {k: like(v, self.student) for k, v in calls[path].kwargs.items()}
            output = first(self.student.get_submodule(path)(*args, **kwargs))
            losses[path] = self._error(path, output, calls[path].output)
        return losses

    def logit_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compare the answers, and the last block's outputs if they have a weight."""
        last = self.paths[-1:]
        with torch.no_grad(), Recorder(self.teacher, last) as taught:
            target = respond(self.teacher, like(batch.images, self.teacher))
        with Recorder(self.student, last) as learned:
            answer = respond(self.student, like(batch.images, self.student))
        if self.scored:
            losses = {"logits": _divergence(answer, target, self.temperature)}
        else:
            losses = {"answer": self._error("answer", answer, target)}
        if self.feature_weight:
            outputs = learned[last[0]].output, taught[last[0]].output
            losses["features"] = self.feature_weight * self._error("features", *outputs)
        return losses

    @torch.no_grad()
    def block_sizes(self, batch: Batch) -> dict[str, float]:
        """Give what the losses of blocks are divided by, for these images alone."""
        with Recorder(self.teacher, self.differing) as calls:
            respond(self.teacher, like(batch.images, self.teacher))
        return {path: float(_size(calls[path].output)) for path in self.differing}

    @torch.no_grad()
    def logit_sizes(self, batch: Batch) -> dict[str, float]:
        """Give what relative errors are divided by at the end; scores have none."""
        if self.scored and not self.feature_weight:
            return {}
        with Recorder(self.teacher, self.paths[-1:]) as calls:
            answer = respond(self.teacher, like(batch.images, self.teacher))
        sizes = {} if self.scored else {"answer": float(_size(answer))}
        if self.feature_weight:
            sizes["features"] = float(_size(calls[self.paths[-1]].output))
        return sizes

    def take_sizes(self, sizes: Mapping[str, float]) -> None:
        """Divide losses by these from now on: sizes of a whole batch."""
        self._sizes = sizes

    def rate_factors(self, factor: float | int) -> dict[str, float | int]:
        """Give a factor to every parameter that the teacher has too, in the same shape.

        Raises:
            InvalidOption: It is 0, and no other parameter is there to move.
        """
        if factor == 1:
            return {}
        theirs = {name: p.shape for name, p in self.teacher.named_parameters()}
        ours = {name: p.shape for name, p in self.student.named_parameters()}
        inherited = [name for name in ours if ours[name] == theirs.get(name)]
        for name in inherited:
            del theirs[name]
        inherited += self._renamed(
            {name: ours[name] for name in ours if name not in set(inherited)}, theirs
        )
        if factor == 0 and len(inherited) == len(ours):
            raise InvalidOption(
                asked="inherited_rate_factor=0",
                found="the teacher has every parameter of this student, in its shape",
                why="then none is left to move: Hydra, for one, brings no new ones",
                fix="Leave it out, or take a lower learning_rate.",
            )
        return dict.fromkeys(inherited, factor)

    @torch.no_grad()
    def blame_block(self, batch: Batch) -> str:
        """Name the block whose loss is not finite."""
        broken = broken_block(self.teacher, batch.images, self.paths)
        if broken:
            return f"the teacher's {broken}"
        for path, loss in self.block_losses(batch).items():
            if not loss.isfinite():
                number = self.paths.index(path) if path in self.paths else path
                return f"{path} (block {number})"
        return "the sum over blocks"

    def blame_logits(self, batch: Batch) -> str:
        """Name the first block whose output is not finite."""
        broken = broken_block(self.teacher, batch.images, self.paths)
        if broken:
            return f"the teacher's {broken}"
        broken = broken_block(self.student, batch.images, self.paths)
        return broken or "the comparison of scores"

    @torch.no_grad()
    def measure(self, images: Tensor) -> dict[str, Any]:
        """Give block errors and how far the answers are, both models in evaluation.

        The answers' distance is divergence and agreement of scores, or the relative
        squared error of features; what does not apply is None.
        """
        errors = dict.fromkeys(self.differing, 0.0)
        distance, agreement = 0.0, 0
        with keeping_modes(self.student):
            self.student.eval()
            for part in torch.split(images, 64):
                share = len(part) / len(images)
                self.take_sizes({})
                for path, loss in self.block_losses(Batch(part, part)).items():
                    errors[path] += share * float(loss)
                answer = respond(self.student, like(part, self.student))
                target = respond(self.teacher, like(part, self.teacher))
                if self.scored:
                    distance += share * float(_divergence(answer, target, 1.0))
                    same = answer.argmax(-1) == target.argmax(-1).to(answer.device)
                    agreement += int(same.sum())
                else:
                    distance += share * float(_relative_error(answer, target))
        return {
            "blocks": errors,
            "divergence": distance if self.scored else None,
            "agreement": agreement / len(images) if self.scored else None,
            "feature_error": None if self.scored else distance,
        }

    def _renamed(
        self, ours: Mapping[str, torch.Size], theirs: Mapping[str, torch.Size]
    ) -> Iterator[str]:
        """Name attention's projections that a swap calls otherwise than the teacher."""
        for site in self.student_sites:
            inside = f"{site.attention_path}."
            left = [theirs[name] for name in theirs if name.startswith(inside)]
            for name in ours:
                if name.startswith(inside) and ours[name] in left:
                    left.remove(ours[name])
                    yield name

    def _error(self, name: str, output: Tensor, target: Tensor) -> Tensor:
        return _relative_error(output, target, self._sizes.get(name))

    def _show_grid(self, images: Tensor) -> None:
        """Run the whole student once where images have a new size.

        Mechanisms that ask for the token grid hear of it from the patch embedding,
        which stage one does not run.
        """
        if images.shape[1:] != self._shown:
            try_one(self.student, images, "the source")
            self._shown = images.shape[1:]


def _matching_sites(
    student: nn.Module, teacher: nn.Module
) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    if student is teacher:
        raise _not_healable("student and teacher are one and the same model")
    (host, ours), (other, theirs) = find_host(student), find_host(teacher)
    if host is not other or [s.path for s in ours] != [s.path for s in theirs]:
        raise _not_healable(
            f"its {len(ours)} blocks of {host.name} do not pair up with the teacher's "
            f"{len(theirs)} of {other.name}"
        )
    if all(
        (a.attention, a.ffn) == (b.attention, b.ffn)
        for a, b in zip(ours, theirs, strict=True)
    ):
        raise _not_healable("no block differs from the teacher's")
    # Empty parameters have no place in memory: all of them seem to be at the same.
    weights = {p.data_ptr() for p in teacher.parameters() if p.numel()}
    shared = [n for n, p in student.named_parameters() if p.data_ptr() in weights]
    if shared:
        raise _not_healable(f"it shares weights with the teacher: {shared[0]!r}")
    dtypes = {p.dtype for p in student.parameters() if p.is_floating_point()}
    half = dtypes & {torch.float16, torch.bfloat16}
    if half:
        raise _not_healable(
            f"its weights are {half.pop()}, in which small updates are lost",
            "Heal student.float() and make it half afterwards.",
        )
    return ours, theirs


def _differing(ours: tuple[Site, ...], theirs: tuple[Site, ...]) -> tuple[str, ...]:
    """Give the modules that hold what differs; the block, as a rule."""
    paths: dict[str, None] = {}
    for a, b in zip(ours, theirs, strict=True):
        output = a.ffn_path or ""
        inside = output.startswith(f"{a.path}.")
        if a.attention != b.attention or (a.ffn != b.ffn and inside):
            paths[a.path] = None
        if a.ffn != b.ffn and not inside:
            # A parallel branch keeps its feed-forward layer in a module beside.
            paths[output.rpartition(".")[0].rpartition(".")[0]] = None
    return tuple(paths)


def _relative_error(
    output: Tensor, target: Tensor, size: float | None = None
) -> Tensor:
    """Squared error over squared target, in float32 or wider."""
    wide = target.to(output.device, torch.promote_types(output.dtype, torch.float32))
    error = (output.to(wide.dtype) - wide).square().mean()
    scale = wide.square().mean() if size is None else wide.new_tensor(size)
    return error / scale.clamp_min(torch.finfo(wide.dtype).tiny)


def _size(target: Tensor) -> Tensor:
    """Mean square of a target, in float32 or wider."""
    wide = torch.promote_types(target.dtype, torch.float32)
    return target.to(wide).square().mean()


def _divergence(scores: Tensor, target: Tensor, temperature: float | int) -> Tensor:
    """How far scores are from the teacher's, in float32 or wider."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    ours = F.log_softmax(scores.to(wide) / temperature, dim=-1)
    theirs = F.log_softmax(target.to(scores.device, wide) / temperature, dim=-1)
    divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def _not_healable(
    found: str, fix: str = "Heal what convert(teacher, recipe) gave, with that teacher."
) -> NotHealable:
    return NotHealable(
        asked="healing a student after its teacher",
        found=found,
        why="each converted block learns from the block it replaced",
        fix=fix,
    )
