"""Student and teacher side by side: which blocks differ, and by how much."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import Batch
from manyheads.errors import NotHealable
from manyheads.hosts import Site, find_host
from manyheads.loop.probes import Recorder, broken_block, like, try_one
from manyheads.loop.weights import keeping_modes

__all__ = ["Pair"]


class Pair:
    """A student and its teacher, block by block.

    Attributes:
        student_sites: The student's blocks.
        paths: Paths of all blocks; they are the same in both models.
        differing: Paths of the modules that hold what was converted.

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
        self.student_sites, sites = _matching_sites(student, teacher)
        self.paths = tuple(site.path for site in sites)
        self.differing = _differing(self.student_sites, sites)
        self._shown: torch.Size | None = None

    def set_student_mode(self) -> None:
        """Train, with everything random at rest."""
        self.student.train()
        for module in self.student.modules():
            random = isinstance(module, nn.modules.dropout._DropoutNd)
            if random or type(module).__name__.startswith(("DropPath", "PatchDropout")):
                module.eval()

    def require_accepted(self, images: Tensor, where: str) -> None:
        """See that both models take such images and give as many scores.

        Raises:
            DataError: One of them refuses an image.
            NotHealable: They give different numbers of scores.
        """
        ours, theirs = (
            try_one(model, images, where).shape[1]
            for model in (self.student, self.teacher)
        )
        if ours != theirs:
            raise _not_healable(f"it gives {ours} scores and the teacher {theirs}")

    def block_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compare every converted block with the teacher's, on the teacher's input."""
        with torch.no_grad(), Recorder(self.teacher, self.differing) as calls:
            self.teacher(like(batch.images, self.teacher))
        self._show_grid(batch.images)
        losses = {}
        for path in self.differing:
            args = [like(value, self.student) for value in calls[path].args]
            kwargs = {k: like(v, self.student) for k, v in calls[path].kwargs.items()}
            output = self.student.get_submodule(path)(*args, **kwargs)
            losses[path] = _relative_error(output, calls[path].output)
        return losses

    def logit_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compare the scores, and the last block's outputs if they have a weight."""
        last = self.paths[-1:]
        with torch.no_grad(), Recorder(self.teacher, last) as taught:
            target = self.teacher(like(batch.images, self.teacher))
        with Recorder(self.student, last) as learned:
            scores = self.student(like(batch.images, self.student))
        losses = {"logits": _divergence(scores, target, self.temperature)}
        if self.feature_weight:
            error = _relative_error(learned[last[0]].output, taught[last[0]].output)
            losses["features"] = self.feature_weight * error
        return losses

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
        """Give block errors, divergence and agreement, both models in evaluation."""
        errors = dict.fromkeys(self.differing, 0.0)
        divergence, agreement = 0.0, 0
        with keeping_modes(self.student):
            self.student.eval()
            for part in torch.split(images, 64):
                share = len(part) / len(images)
                for path, loss in self.block_losses(Batch(part, part)).items():
                    errors[path] += share * float(loss)
                scores = self.student(like(part, self.student))
                target = self.teacher(like(part, self.teacher))
                divergence += share * float(_divergence(scores, target, 1.0))
                same = scores.argmax(-1) == target.argmax(-1)
                agreement += int(same.sum())
        return {
            "blocks": errors,
            "divergence": divergence,
            "agreement": agreement / len(images),
        }

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
    weights = {p.data_ptr() for p in teacher.parameters()}
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


def _relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error over squared target, in float32 or wider."""
    wide = target.to(output.device, torch.promote_types(output.dtype, torch.float32))
    scale = wide.square().mean().clamp_min(torch.finfo(wide.dtype).tiny)
    return (output.to(wide.dtype) - wide).square().mean() / scale


def _divergence(scores: Tensor, target: Tensor, temperature: float | int) -> Tensor:
    """How far the student's scores are from the teacher's, at one temperature."""
    ours = F.log_softmax(scores.float() / temperature, dim=-1)
    theirs = F.log_softmax(target.float().to(scores.device) / temperature, dim=-1)
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
