"""Weights, gradients and optimiser dealt out over processes: torch's FSDP2.

    process p holds   1/P of every block's weights, gradients and Adam moments
    a block runs      after its weights were gathered, and frees them again

accelerate calls the same `fully_shard`; it is called directly here because accelerate
passes over it in silence on the CPU, where this has to be tested.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from manyheads.loop.devices import Processes

__all__ = ["Shards"]

_WHOLE = StateDictOptions(full_state_dict=True)


class Shards:
    """A copy of a model in shards; the model itself holds the whole in host memory.

    Args:
        model: The model, on the CPU.
        paths: Its blocks; each is gathered as one piece.
        processes: Who gets a shard.

    Attributes:
        module: The copy in shards, which learns.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], processes: Processes
    ) -> None:
        self.model, self._processes = model, processes
        processes.spread(list(model.state_dict().values()))
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        self.module: nn.Module = copy.deepcopy(model)
        for path in paths:
            fully_shard(self.module.get_submodule(path), mesh=mesh)
        fully_shard(self.module, mesh=mesh)

    def deal(self) -> None:
        """Give the shards what the whole model holds."""
        set_model_state_dict(self.module, self.model.state_dict(), options=_WHOLE)

    def collect(self) -> None:
        """Give the whole model what the shards hold, in every process."""
        self.model.load_state_dict(get_model_state_dict(self.module, options=_WHOLE))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Give the whole state of the optimiser, as tensors and plain values."""
        return get_optimizer_state_dict(self.module, optimizer, options=_WHOLE)

    def restore_optimizer(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Deal the state of the optimiser out again."""
        set_optimizer_state_dict(self.module, optimizer, state, options=_WHOLE)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep gradients to this process for now."""
        module: Any = self.module
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
