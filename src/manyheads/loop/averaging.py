"""A running average of the weights, over timm's ModelEmaV3.

    average  <-  d average + (1 - d) weights        d = min(decay, t / (10 + t))

after update t of a stage; every stage averages anew. The cap makes a short run the
average of about its last tenth, instead of the weights that it began with; after
10 decay / (1 - decay) updates d is the decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

__all__ = ["Average"]


class Average:
    """An exponential moving average of a model's parameters and buffers.

    Args:
        model: The model; its weights now are the first average.
        decay: Share of the average that an update leaves.
    """

    def __init__(self, model: nn.Module, decay: float | int) -> None:
        self.model = model
        half = any(
            p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()
        )
        self._ema = ModelEmaV3(
            model,
            decay=decay,
            use_warmup=True,
            warmup_gamma=10.0,
            warmup_power=1.0,
            # In a half type most updates would be rounded away.
            dtype=torch.float32 if half else None,
        )

    @property
    def module(self) -> nn.Module:
        """The model with the averaged weights."""
        module: nn.Module = self._ema.module
        return module

    @torch.no_grad()
    def begin(self) -> None:
        """Start anew from the weights as they are."""
        torch._foreach_copy_(_tensors(self.module), _tensors(self.model))

    def update(self, done: int) -> None:
        """Take in the weights after so many updates."""
        # ModelEmaV3 passes the first update over.
        self._ema.update(self.model, step=done + 1)

    @torch.no_grad()
    def settle(self) -> None:
        """Give the model the average for good."""
        torch._foreach_copy_(_tensors(self.model), _tensors(self.module))

    @contextmanager
    def worn(self) -> Iterator[None]:
        """Let the model wear the average for a while."""
        own = [tensor.clone() for tensor in _tensors(self.model)]
        self.settle()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(_tensors(self.model), own)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in model.state_dict().values()]
