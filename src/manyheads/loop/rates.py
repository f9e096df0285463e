"""The optimiser of a stage and its learning rates, over timm.optim and timm.scheduler.

rate(t) = peak t / warmup                                 while it rises
          peak (1 + cos(pi t / total)) / 2                afterwards
layer i of n:  rate(t) decay^(n - i)                      with layer-wise decay
"""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from manyheads.errors import InvalidOption
from manyheads.loop.stages import RunOptions, Stage

__all__ = ["optimizer_and_schedule"]


def optimizer_and_schedule(
    model: nn.Module, stage: Stage, options: RunOptions, per_epoch: int
) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    """Make AdamW over the parameters that move, and the cosine that drives its rate.

    Args:
        model: Its `group_matcher`, or else the order of its parameters, says which
            layer is which.
        stage: Rate, decay and length.
        options: Whether rates fall from layer to layer.
        per_epoch: Steps of an epoch.

    Raises:
        InvalidOption: Rates are to fall from layer to layer, and no layers are known.
    """
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt="adamw",
        lr=stage.learning_rate,
        weight_decay=stage.weight_decay,
        layer_decay=options.layer_decay,
    )
    if options.layer_decay is not None:
        scales = {group["lr_scale"] for group in optimizer.param_groups}
        if len(scales) == 1:
            raise InvalidOption(
                asked=f"layer_decay={options.layer_decay}",
                found=f"timm finds no layers in this {type(model).__name__}",
                fix="Leave it out for one learning rate.",
            )
    total = per_epoch * stage.epochs
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=total,
        warmup_t=min(total - 1, round(stage.warmup_epochs * per_epoch)),
        warmup_lr_init=stage.learning_rate / 100,
        t_in_epochs=False,
    )
    return optimizer, schedule
