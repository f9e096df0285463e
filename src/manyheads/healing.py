"""Healing: a converted model learns to do again what its teacher does.

The papers whose mechanisms are swapped in train from scratch, for hundreds of epochs
and with labels. Healing is ours: it starts from the inherited weights, needs images
only, and takes a few epochs.

    0  refit    the last matrices of every converted block are solved by least squares,
                first block first, on a few hundred images; nothing is trained
    1  blocks   every converted block, on the teacher's own input of that block, is
                brought to the teacher's output; the blocks do not wait for each other
    2  logits   the whole student is brought to the teacher's scores, end to end; where
                there is no classifier, to the teacher's features

The last alone is the default: the work that others take before it brought less there.
The first alone is calibration: minutes on a CPU, for people who do not train.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from manyheads.data import Augmentation, Images, ImageSource, image_source
from manyheads.errors import InvalidOption
from manyheads.loop import Run
from manyheads.loop.stages import (
    RunOptions,
    Stage,
    StageRecord,
    require_augment,
    require_positive,
)
from manyheads.loop.weights import fingerprint, keeping_modes
from manyheads.pacing import paced, trains, warmup_of
from manyheads.pairing import Pair
from manyheads.refit import Refit, refit_on

__all__ = ["BlockHealing", "Healed", "heal"]

_SAMPLE = 256


@dataclass(frozen=True, kw_only=True)
class BlockHealing:
    """How far one block is from the teacher's, on the teacher's own input.

    Attributes:
        path: Module path.
        before: Squared error relative to the squared output, before healing.
        after: The same after healing.
    """

    path: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Healed:
    """What healing did. Measured on a sample of the images that it learned from.

    Attributes:
        blocks: The blocks that differ from the teacher's.
        refits: The matrices that were solved for, in order.
        divergence: Kullback-Leibler divergence of the student's scores from the
            teacher's at temperature 1, in nats, before and after; None for models
            that give features.
        agreement: Share of images on which both name the same class, before and
            after; None for models that give features.
        feature_error: Squared error of the features relative to the teacher's squared
            features, before and after; None for models that give scores.
        stages: What happened in each stage.
        images: Images of the source.
        sample: Images on which before and after were measured.
        skipped: Pictures that could not be read.
        seconds: Time spent, all calls of a resumed run together.
        run_dir: The folder of the run, if there is one.
    """

    blocks: tuple[BlockHealing, ...]
    refits: tuple[Refit, ...]
    divergence: tuple[float, float] | None
    agreement: tuple[float, float] | None
    feature_error: tuple[float, float] | None
    stages: tuple[StageRecord, ...]
    images: int
    sample: int
    skipped: tuple[str, ...]
    seconds: float
    run_dir: str | None

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{block.path}  error {block.before:.3g} -> {block.after:.3g}"
            for block in self.blocks
        ]
        told = []
        if self.divergence is not None:
            told.append("divergence {:.3g} -> {:.3g} nats".format(*self.divergence))
        if self.agreement is not None:
            told.append("agreement {:.1%} -> {:.1%}".format(*self.agreement))
        if self.feature_error is not None:
            told.append("features: error {:.3g} -> {:.3g}".format(*self.feature_error))
        lines.append(f"{', '.join(told)} (on {self.sample} of the images healed on)")
        done = [f"{len(self.refits)} refits"] if self.refits else []
        done += [f"{s.steps} {s.name} steps" for s in self.stages if s.steps]
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        lines.append(
            f"{' + '.join(done)} over {self.images} images{skipped} "
            f"in {self.seconds:.0f} s"
        )
        overflows = sum(stage.overflows for stage in self.stages)
        if overflows:
            lines[-1] += f"; {overflows} updates overflowed float16 and were left out"
        return "\n".join(lines)


def heal(
    student: nn.Module,
    teacher: nn.Module,
    images: Images,
    *,
    refit_images: int | None = None,
    refit_unswapped: bool | None = None,
    block_epochs: int = 0,
    logit_epochs: int = 15,
    batch_size: int = 32,
    block_learning_rate: float | int | None = None,
    learning_rate: float | int | None = None,
    weight_decay: float | int = 0.0,
    warmup_epochs: float | int | None = None,
    temperature: float | int = 1.0,
    feature_weight: float | int = 0.0,
    inherited_rate_factor: float | int = 1.0,
    max_grad_norm: float | int | None = 1.0,
    accumulation: int = 1,
    precision: str = "fp32",
    ema_decay: float | int | None = None,
    augment: bool | Augmentation = True,
    max_unreadable: float | int = 0.1,
    num_workers: int = 0,
    seed: int = 0,
    run_dir: str | Path | None = None,
    checkpoint_every: int = 200,
    log_every: int = 10,
    tensorboard: bool = False,
    progress: bool = True,
) -> Healed:
    """Bring a converted model back to what its teacher does; no labels are needed.

        blocks   sum over blocks of  |S_b(x_b) - T_b(x_b)|^2 / |T_b(x_b)|^2
        logits   t^2 KL(softmax(T / t) || softmax(S / t))  +  w |s - f|^2 / |f|^2

    x_b is what the teacher feeds its block b, t the temperature, s and f the last
    block's outputs of student and teacher, w the `feature_weight`. A model without a
    classifier gives features S and T, and the divergence gives way to
    |S - T|^2 / |T|^2. In the first stage only converted blocks move, each by its own
    error; in the second the whole student moves, frozen parameters too. Dropout and
    stochastic depth rest in both, because the target is fixed. The teacher is read
    only.

    Without any epochs the last matrices of the converted layers are solved for by least
    squares instead, on `refit_images` images; see `manyheads.refit`. That is
    calibration, for people who do not train. Before training it cost hallucinated and
    interactive attention a point, gave Hydra none, and is done only if asked for.

    The papers do not fix any of this. Stages, rates and warm-up are those that brought
    most back in the study of `docs/accuracy.md`, where other ways stand beside them;
    see `manyheads.pacing`. Epochs and the augmentation of pictures were not studied.
    Processes share a run, and a run goes on after an interruption, as in `train`.

    Cost: a step of stage one is the teacher's forward pass, and both passes of the
    converted blocks; one of stage two, the same with the whole student. Beside the
    optimiser's two copies of the moving weights a third is kept, of the last ones that
    were good, and in host memory those of the start. Where a batch is worked on in
    pieces, by parts or by processes, a step of stage one has a second forward pass of
    the teacher, for what the error of the whole batch is divided by.

    Args:
        student: What `convert` made; changed in place.
        teacher: What it was made from; untouched.
        images: A folder of pictures, a dataset, or preprocessed tensors; labels are
            not looked at.
        refit_images: Images on which last matrices are solved for first, fewer where
            they are larger than 224 x 224; 0 leaves it out. None for 512 where no
            training follows, else 0.
        refit_unswapped: Whether those of feed-forward layers are solved for behind
            swapped attention too; None for only where no training follows.
        block_epochs: Passes over the images in stage one; 0 leaves it out, which was
            better for the same work where it was measured.
        logit_epochs: Passes over the images in stage two; 0 leaves it out.
        batch_size: Images per step.
        block_learning_rate: Highest rate of stage one; None for 0.128 over the width
            of the widest block.
        learning_rate: Highest rate of stage two; None for the same.
        weight_decay: Of both stages.
        warmup_epochs: Epochs in which the rate of a stage rises, no more than it has;
            None for a twentieth of it.
        temperature: Flattens both models' scores before they are compared.
        feature_weight: Weight of the last block's outputs in stage two.
        inherited_rate_factor: Factor of both rates for parameters that the teacher has
            too, in the same shape; new ones have the whole. 0 holds them still.
        max_grad_norm: Length to which longer gradients are cut; None for any length.
        accumulation: Parts in which a process works through its images of a step, one
            after another; memory falls, the result stays.
        precision: "fp32", or matrix products in "bf16" or "fp16" in both stages,
            the teacher's too; weights stay as they are, and fp16 scales the loss.
        ema_decay: Decay of a running average of the weights, which each stage begins
            anew; the model ends with the last one.
        augment: Whether pictures get random crops and flips, and tensors nothing; or
            what happens to images, such as Augmentation.deit().
        max_unreadable: Share of unreadable pictures at which to stop.
        num_workers: Processes that load images; 0 for this one.
        seed: What order and augmentation come from.
        run_dir: A folder from which the same call goes on after an interruption. Gets
            steps.csv and epochs.csv as well.
        checkpoint_every: Steps between two writings to `run_dir`.
        log_every: Steps between two lines of its steps.csv.
        tensorboard: Whether to write TensorBoard events to `run_dir` too.
        progress: Whether to show a progress bar.

    Raises:
        NotHealable: The models do not pair up, nothing was converted, student and
            teacher share weights, or the student's weights are of a half type.
        DataError: The images are missing, unreadable, or not what the model takes.
            However late that comes out, the student has the weights it came with.
        NonFiniteLoss: A loss stopped being finite; names stage, step and block.
        CheckpointError: The run_dir belongs to another run, or cannot be written.
        InvalidOption: A number is out of range, a name is unknown, nothing is to be
            done, or nothing new is there to move.
        MissingExtra: accelerate, or the TensorBoard asked for, is not installed.
    """
    options = RunOptions(
        batch_size=batch_size,
        seed=seed,
        run_dir=run_dir,
        progress=progress,
        num_workers=num_workers,
        checkpoint_every=checkpoint_every,
        max_grad_norm=max_grad_norm,
        accumulation=accumulation,
        precision=precision,
        ema_decay=ema_decay,
        log_every=log_every,
        tensorboard=tensorboard,
    )
    config: dict[str, Any] = {
        "refit_images": refit_images,
        "refit_unswapped": refit_unswapped,
        "block_epochs": block_epochs,
        "logit_epochs": logit_epochs,
        "block_learning_rate": block_learning_rate,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup_epochs": warmup_epochs,
        "temperature": temperature,
        "feature_weight": feature_weight,
        "augment": augment,
    }
    _require_sound(config, inherited_rate_factor, ema_decay)
    pair = Pair(student, teacher, temperature, feature_weight)
    config = paced(config, pair.student_sites)
    factors = pair.rate_factors(inherited_rate_factor)
    limit = max_unreadable
    source = image_source(student, images, labelled=False, max_unreadable=limit)
    config |= {
        "verb": "heal",
        "student": fingerprint(student, values=False),
        "converted": [repr(site) for site in pair.student_sites],
        "teacher": fingerprint(teacher, values=True),
    }
    if factors:
        # Left out for 1: folders of runs from before the factor existed go on.
        config["inherited_rate_factor"] = inherited_rate_factor
    told = dict(config)
    if isinstance(augment, Augmentation):
        source.require_augmentable(augment)
        told["augment"] = augment.to_json()
    with (
        keeping_modes(student, teacher),
        Run(student, source, options, told, beside=[teacher]) as run,
    ):
        if not run.finished:
            _perform(run, pair, source, config, factors)
        return _result(run, source, options)


def _perform(
    run: Run,
    pair: Pair,
    source: ImageSource,
    config: dict[str, Any],
    factors: dict[str, float | int],
) -> None:
    """Refit, and follow both stages, from wherever the run stopped last."""
    pair.teacher.eval()
    pair.set_student_mode()
    sample = source.sample(_SAMPLE).images
    pair.require_accepted(sample, source.where)
    if "before" not in run.notes:
        # One after the other with no checkpoint between them: a run that goes
        # on has both behind it, or neither.
        run.notes["before"] = pair.measure(sample)
        found = refit_on(
            pair,
            source,
            config["refit_images"],
            unswapped=config["refit_unswapped"],
            alone=not trains(config),
        )
        run.notes["refits"] = [asdict(one) for one in found]
    for stage in _stages(pair, config, factors):
        pair.take_sizes({})
        run.perform(stage)
    run.settle()
    run.notes.update({"after": pair.measure(sample), "sample": len(sample)})
    run.finish()


def _stages(
    pair: Pair, config: dict[str, Any], factors: dict[str, float | int]
) -> tuple[Stage, Stage]:
    common: dict[str, Any] = {
        "weight_decay": config["weight_decay"],
        "augment": config["augment"],
        "rate_factors": factors,
        "resize": pair.take_sizes,
    }
    blocks = Stage(
        name="blocks",
        epochs=config["block_epochs"],
        warmup_epochs=warmup_of(config, config["block_epochs"]),
        learning_rate=config["block_learning_rate"],
        trains=pair.differing,
        loss=pair.block_losses,
        blame=pair.blame_block,
        sizes=pair.block_sizes,
        **common,
    )
    logits = Stage(
        name="logits",
        epochs=config["logit_epochs"],
        warmup_epochs=warmup_of(config, config["logit_epochs"]),
        learning_rate=config["learning_rate"],
        trains=("",),
        loss=pair.logit_losses,
        blame=pair.blame_logits,
        sizes=pair.logit_sizes,
        **common,
    )
    return blocks, logits


def _result(run: Run, source: ImageSource, options: RunOptions) -> Healed:
    before, after = run.notes["before"], run.notes["after"]
    return Healed(
        blocks=tuple(
            BlockHealing(path=path, before=error, after=after["blocks"][path])
            for path, error in before["blocks"].items()
        ),
        refits=tuple(Refit(**one) for one in run.notes["refits"]),
        divergence=_both(before, after, "divergence"),
        agreement=_both(before, after, "agreement"),
        feature_error=_both(before, after, "feature_error"),
        stages=run.records,
        images=len(source),
        sample=run.notes["sample"],
        skipped=tuple(sorted(source.skipped)),
        seconds=run.seconds,
        run_dir=None if options.run_dir is None else str(options.run_dir),
    )


def _both(
    before: dict[str, Any], after: dict[str, Any], name: str
) -> tuple[float, float] | None:
    """Pair a measure up; None where it does not apply to the models."""
    earlier, later = before.get(name), after.get(name)
    return None if earlier is None or later is None else (earlier, later)


def _require_sound(
    config: dict[str, Any], factor: float | int, ema_decay: float | int | None
) -> None:
    require_augment(config["augment"])
    require_positive("inherited_rate_factor", factor, zero=True)
    if ema_decay is not None and not trains(config):
        raise InvalidOption(
            asked=f"ema_decay={ema_decay}, block_epochs=0, logit_epochs=0",
            found="without epochs there are no weights to average",
            fix="Leave ema_decay out.",
        )
