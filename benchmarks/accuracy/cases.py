"""The cells of the accuracy study, as data.

A cell is one model under one treatment; it is run once per seed, and every seed has a
teacher of its own. The order of `CASES` is the order of running.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from manyheads import Compact, Hallucinated, Hydra, Interactive, Recipe, Swap

__all__ = ["CASES", "CIFAR10", "FASHION", "Case", "Setting"]

Treatment = Literal[
    "teacher",
    "converted",
    "calibrated",
    "healed",
    "progressive",
    "resized",
    "scratch",
]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Data, architecture, and how teachers and models from scratch are trained.

    Attributes:
        name: Name of the data set.
        train_images: Images trained on; the first of the data set.
        epochs: Passes over them, each augmented anew by shifts and flips.
        flips: Whether pictures may be mirrored.
        model: What timm's factory is given; a plain softmax Vision Transformer.
        batch_size: Images per step, in training, and in healing where nothing is said.
        learning_rate: Highest rate of training.
        weight_decay: Of training.
        warmup: Share of training in which the rate rises.
        calibration_images: Unlabelled images for converting and calibrating.
        healing_share: Most of the teacher's training work that healing may use.
    """

    name: str
    train_images: int
    epochs: int
    flips: bool = True
    model: tuple[tuple[str, int], ...] = (
        ("img_size", 32),
        ("patch_size", 4),
        ("embed_dim", 64),
        ("depth", 6),
        ("num_heads", 4),
        ("num_classes", 10),
    )
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    calibration_images: int = 512
    healing_share: float = 0.10


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell.

    Attributes:
        setting: Data, architecture and training.
        model: Short name of what the blocks become.
        treatment: What is done with it.
        recipe: What the blocks become; None for the teacher.
        kind: The table it belongs to.
        variant: What sets it apart from cells of the same model and treatment.
        heal: What `heal` is told beside its defaults.
        order: Groups of blocks that are converted and healed one after the other,
            each with an equal share of the work; empty for all at once.
        size: Height and width of the pictures that it is measured on, where healed
            models meet larger ones than they were trained on; the teacher does too.
        share: Most of the teacher's training work that healing may use, where it is
            another than the setting's.
        target: Points of top-1 that it may lie below the teacher; None for no target.
    """

    setting: Setting
    model: str
    treatment: Treatment
    recipe: Recipe | None = None
    kind: Literal["accuracy", "healing"] = "accuracy"
    variant: str = ""
    heal: tuple[tuple[str, Any], ...] = field(default=())
    order: tuple[tuple[int, ...], ...] = ()
    size: int = 32
    share: float | None = None
    target: float | None = None

    @property
    def name(self) -> str:
        """Give the name of the cell, as it stands in file names."""
        parts = (self.setting.name, self.model, self.treatment, self.variant)
        # A teacher is both the model and the treatment, and is named once.
        return "-".join(part for part in dict.fromkeys(parts) if part)

    @property
    def healed_name(self) -> str:
        """Give the name of the cell that heals this model in the table."""
        return replace(self, treatment="healed", variant="").name

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values; what is not usual where it is not."""
        described: dict[str, Any] = {
            "name": self.name,
            "setting": asdict(self.setting) | {"model": dict(self.setting.model)},
            "model": self.model,
            "treatment": self.treatment,
            "recipe": self.recipe.to_dict() if self.recipe else None,
            "variant": self.variant,
            "heal": dict(self.heal),
            "target": self.target,
        }
        if self.order:
            described["order"] = [list(group) for group in self.order]
        if self.share is not None:
            described["share"] = self.share
        if self.size != 32:
            described["size"] = self.size
        return described


CIFAR10 = Setting(name="cifar10", train_images=50_000, epochs=6)
# Garments in grey, 28 x 28: another nature of picture, and mirrored ones stay out.
FASHION = Setting(name="fashion", train_images=60_000, epochs=2, flips=False)

# 16 landmarks of 64 patch tokens: the quarter that 49 are of the usual 196.
LANDMARKS = (4, 4)
MODELS: dict[str, tuple[Recipe, float | None]] = {
    "hydra_last2": (Recipe(Swap(blocks=range(4, 6), attention=Hydra())), 1.0),
    "hallucinated_compact": (
        Recipe(Swap(attention=Hallucinated(), ffn=Compact(rank=0.5))),
        1.0,
    ),
    "interactive_after": (
        Recipe(Swap(attention=Interactive(landmarks=LANDMARKS))),
        2.0,
    ),
    "hydra_all": (Recipe(Swap(attention=Hydra())), 6.0),
    "interactive_none": (
        Recipe(Swap(attention=Interactive(landmarks=LANDMARKS, mix="none"))),
        2.0,
    ),
    "interactive_both": (
        Recipe(Swap(attention=Interactive(landmarks=LANDMARKS, mix="both"))),
        2.0,
    ),
    "hallucinated": (Recipe(Swap(attention=Hallucinated())), None),
    "compact": (Recipe(Swap(ffn=Compact(rank=0.5))), None),
}
"""What blocks become, and the target in points of top-1 after healing."""

# What the ways of healing are compared with: 64 images a step, in one pass, as images
# are many.
AT_64: dict[str, Any] = {
    "refit_images": 0,
    "block_epochs": 0,
    "logit_epochs": 1,
    "block_learning_rate": 2e-3,
    "learning_rate": 2e-3,
    "warmup_epochs": 0.05,
}
# What `heal` does by default where nothing is said: of these ways, the one that brought
# most back. A test holds it to the defaults; written out, a cell says what was done
# even after the defaults move.
BASE = AT_64 | {"batch_size": 32}


def _study(
    setting: Setting,
    treatments: tuple[Treatment, ...],
    models: tuple[str, ...] = tuple(MODELS),
) -> tuple[Case, ...]:
    """Give the cells of the table, treatment by treatment."""
    cells = []
    for treatment in treatments:
        if treatment == "teacher":
            cells.append(Case(setting=setting, model="teacher", treatment="teacher"))
            continue
        for model in models:
            recipe, target = MODELS[model]
            healed = treatment == "healed"
            cells.append(
                Case(
                    setting=setting,
                    model=model,
                    treatment=treatment,
                    recipe=recipe,
                    heal=tuple(BASE.items()) if healed else (),
                    target=target if healed else None,
                )
            )
    return tuple(cells)


def _at_64(
    setting: Setting, models: tuple[str, ...] = tuple(MODELS)
) -> tuple[Case, ...]:
    """Give the cells that are healed 64 images a step, beside those of the table."""
    return tuple(
        Case(
            setting=setting,
            model=model,
            treatment="healed",
            variant="batch_64",
            recipe=MODELS[model][0],
            heal=tuple(AT_64.items()),
        )
        for model in models
    )


# Ways of healing that are compared with each other, all with the same work: each is
# `AT_64` with one thing changed, but for the last three, which are the first defaults
# and what led away from them. A pass is over as many images as the work allows: fewer
# passes, more images.
FIRST = AT_64 | {
    "refit_images": 512,
    "block_learning_rate": 1e-3,
    "learning_rate": 1e-3,
    "warmup_epochs": 0.5,
}
WAYS: dict[str, dict[str, Any]] = {
    "refit": AT_64 | {"refit_images": 512},
    "rate_1e-3": AT_64 | {"learning_rate": 1e-3},
    "rate_4e-3": AT_64 | {"learning_rate": 4e-3},
    "blocks_first": AT_64 | {"block_epochs": 1, "logit_epochs": 3},
    "blocks_only": AT_64 | {"block_epochs": 1, "logit_epochs": 0},
    "features": AT_64 | {"feature_weight": 1.0},
    "temperature_2": AT_64 | {"temperature": 2.0},
    "new_rate_1e-2": AT_64 | {"learning_rate": 1e-2, "inherited_rate_factor": 0.2},
    "refit_rate_1e-3_warmup_0.5": FIRST,
    "rate_1e-3_warmup_0.5": FIRST | {"refit_images": 0},
    "refit_rate_2e-3_warmup_0.5": FIRST | {"learning_rate": 2e-3},
}
# Hydra has no new parameters: with the usual rate for inherited ones nothing differs.
WITHOUT = {("new_rate_1e-2", "hydra_all")}
ORDERS = {
    "last_blocks_first": ((4, 5), (2, 3), (0, 1)),
    "first_blocks_first": ((0, 1), (2, 3), (4, 5)),
}
# How a gap closes with work, beyond the tenth that the targets allow.
LONGER = {"twice_the_work": 0.2}
STUDIED = ("hydra_all", "hallucinated_compact", "interactive_after")


def _ways(setting: Setting, models: tuple[str, ...]) -> tuple[Case, ...]:
    """Give the cells of the healing study, way by way."""

    def cell(model: str, way: str, **told: Any) -> Case:
        usual: dict[str, Any] = {"treatment": "healed", "recipe": MODELS[model][0]}
        about: dict[str, Any] = {"setting": setting, "kind": "healing"}
        return Case(model=model, variant=way, **(about | usual | told))

    base = tuple(AT_64.items())
    together = [
        cell(model, way, heal=tuple(options.items()))
        for way, options in WAYS.items()
        for model in models
        if (way, model) not in WITHOUT
    ]
    in_turn = [
        cell(model, way, treatment="progressive", heal=base, order=order)
        for way, order in ORDERS.items()
        for model in models
    ]
    longer = [
        cell(model, way, heal=base, share=share)
        for way, share in LONGER.items()
        for model in models
    ]
    # The healed weights as they are, in a layer that divides by the count of tokens.
    corrections = {"off": Hydra(), "on": Hydra(reference_tokens=65)}
    larger = [
        cell(
            "hydra_all",
            f"at_48_pixels_correction_{name}",
            treatment="resized",
            recipe=Recipe(Swap(attention=spec)),
            size=48,
        )
        for name, spec in corrections.items()
    ]
    return (*together, *in_turn, *longer, *larger)


# In the order of running: the models with targets of their own first.
_FIRST = ("hydra_last2", *STUDIED)
_REST = tuple(model for model in MODELS if model not in _FIRST)
CASES: tuple[Case, ...] = (
    *_study(CIFAR10, ("teacher", "converted", "healed", "calibrated"), _FIRST),
    *_at_64(CIFAR10, _FIRST),
    *_ways(CIFAR10, STUDIED),
    *_study(CIFAR10, ("converted", "healed", "calibrated"), _REST),
    *_at_64(CIFAR10, _REST),
    *_study(CIFAR10, ("scratch",)),
    *_study(FASHION, ("teacher", "converted", "healed", "calibrated"), _FIRST),
    *_at_64(FASHION, _FIRST),
)
