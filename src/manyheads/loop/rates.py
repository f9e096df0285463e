"""The optimiser of a stage and its learning rates, over timm.optim and timm.scheduler.

rate(t) = peak t / warmup                                 while it rises
          peak (1 + cos(pi t / total)) / 2                afterwards
layer i of n:  rate(t) decay^(n - i)                      with layer-wise decay
parameter p:   rate(t) factor(p)                          where the stage has factors
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from manyheads.hosts import find_host
from manyheads.loop.stages import RunOptions, Stage

__all__ = ["optimizer_and_schedule"]


def optimizer_and_schedule(
    model: nn.Module, stage: Stage, options: RunOptions, per_epoch: int
) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    """Make AdamW over the parameters that move, and the cosine that drives its rate.

    Args:
        model: Its `group_matcher`, or else its host, says which layer is which.
        stage: Rate, decay, length, and factors of some parameters.
        options: Whether rates fall from layer to layer.
        per_epoch: Steps of an epoch.

    """
    layered = _layered(model) if options.layer_decay is not None else nullcontext()
    with layered:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt="adamw",
            lr=stage.learning_rate,
            weight_decay=stage.weight_decay,
            layer_decay=options.layer_decay,
        )
    _set_apart(optimizer, model, stage.rate_factors)
    total = per_epoch * stage.epochs
    schedule = CosineLRScheduler(
        optimizer,
        # Of one step timm warns that a cosine changes nothing. Two begin with the same
        # rate, and the second is not done.
        t_initial=max(total, 2),
        warmup_t=min(total - 1, round(stage.warmup_epochs * per_epoch)),
        warmup_lr_init=stage.learning_rate / 100,
        t_in_epochs=False,
    )
    return optimizer, schedule


def _set_apart(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    factors: Mapping[str, float | int],
) -> None:
    """Give parameters with a factor groups of their own; the scheduler obeys those."""
    if not factors:
        return
    named = dict(model.named_parameters())
    factor_of = {id(named[name]): factor for name, factor in factors.items()}
    groups = []
    for group in optimizer.param_groups:
        apart: dict[float | int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.requires_grad:
                factor = factor_of.get(id(parameter), 1)
                apart.setdefault(factor, []).append(parameter)
        groups += [
            {**group, "params": held, "lr_scale": group.get("lr_scale", 1.0) * factor}
            for factor, held in apart.items()
        ]
    optimizer.param_groups[:] = groups


@contextmanager
def _layered(model: Any) -> Iterator[None]:
    """Say for a while which layer is which, where the model itself cannot.

    timm's models have a `group_matcher`; to others one is lent, in which each block is
    a layer, what comes before the first is below it and the rest above the last.
    """
    if hasattr(model, "group_matcher"):
        yield
        return
    paths = [site.path for site in find_host(model)[1]]
    # Numbers in the paths of blocks tell them apart and set their order. What matches
    # nothing is the layer on top.
    blocks = sorted({re.sub(r"\d+", r"(\\d+)", re.escape(path)) for path in paths})
    inside = re.compile(f"({'|'.join(map(re.escape, paths))})\\.")
    names = [name for name, _ in model.named_parameters()]
    below = list(takewhile(lambda name: not inside.match(name), names))
    matcher = {
        "stem": f"^(?:{'|'.join(map(re.escape, below))})$",
        "blocks": [(f"^{block}\\.", None) for block in blocks],
    }
    model.group_matcher = lambda **_: matcher
    try:
        yield
    finally:
        del model.group_matcher
