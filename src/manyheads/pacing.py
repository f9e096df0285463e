"""How healing is paced where nobody says: rates, warm-up and refit.

    highest rate    0.128 / D, for AdamW; D is the width of the widest block
    warm-up         a twentieth of the stage
    refit           512 images where nothing is trained, and none before training

Of the ways that `docs/accuracy.md` records, on models of 64 features, where the rate is
2e-3, these brought most back over all models. That the rate falls with the width is how
the best one of Adam for hidden matrices scales (Yang et al. 2022, arXiv 2203.03466);
here it is a choice that was not measured at other widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manyheads.errors import InvalidOption
from manyheads.hosts import Site
from manyheads.loop.stages import require_positive, require_warmup

__all__ = ["paced", "rate_at", "trains", "warmup_of"]

_RATE_TIMES_WIDTH = 2e-3 * 64
_WARMUP = 0.05
_REFIT_IMAGES = 512


def trains(config: Mapping[str, Any]) -> bool:
    """Say whether any stage has epochs."""
    return bool(config["block_epochs"] or config["logit_epochs"])


def rate_at(width: int) -> float:
    """Give the highest learning rate for blocks of this width."""
    return _RATE_TIMES_WIDTH / width


def paced(config: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
    """Fill in what was left to us. The warm-up is left: it is another in each stage.

    Raises:
        InvalidOption: A number is out of range, or nothing is to be done.
    """
    alone = not trains(config)
    rate = rate_at(max(site.geometry.dim for site in sites))
    usual = {
        "refit_images": _REFIT_IMAGES if alone else 0,
        "refit_unswapped": alone,
        "block_learning_rate": rate,
        "learning_rate": rate,
    }
    filled = {
        name: usual.get(name) if value is None else value
        for name, value in config.items()
    }
    _require_sound(filled)
    return filled


def warmup_of(config: Mapping[str, Any], epochs: int) -> float | int:
    """Give the epochs in which the rate of a stage of so many rises."""
    said: float | int | None = config["warmup_epochs"]
    return _WARMUP * epochs if said is None else said


def _require_sound(config: Mapping[str, Any]) -> None:
    if not (config["refit_images"] or trains(config)):
        raise InvalidOption(
            asked="refit_images=0, block_epochs=0, logit_epochs=0",
            found="then there is nothing to do",
            fix="Leave one of them out for the default.",
        )
    for name in ("block_learning_rate", "learning_rate", "temperature"):
        require_positive(name, config[name])
    names = ("refit_images", "block_epochs", "logit_epochs", "weight_decay")
    for name in (*names, "feature_weight"):
        require_positive(name, config[name], zero=True)
    if config["warmup_epochs"] is not None:
        for stage in ("block_epochs", "logit_epochs"):
            require_warmup(config["warmup_epochs"], config[stage], stage)
