"""The processes of a run and their devices, over Hugging Face accelerate.

A run means the same in one process and in many: a batch is what all processes see
together, and each takes its share of it. Only the first process, the main one, writes
and shows anything. Whoever fails tells the others, so that nobody waits in vain.
"""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from manyheads.errors import InvalidOption, MissingExtra

__all__ = ["PRECISIONS", "Processes", "autocast", "require_precision"]

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Set by launchers of MPI, which accelerate does not follow on GPUs.
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")

_T = TypeVar("_T")


class Processes:
    """The processes that share a run: how many, which one this is, and what they say.

    Args:
        verb: What they do, for messages.
        required: Whether accelerate is needed even for a process that is alone.

    Attributes:
        count: How many there are.
        index: Which one this is, from 0.
        device: Where this process computes, if there are several.

    Raises:
        MissingExtra: accelerate is not installed, and is needed.
        InvalidOption: The launcher promised other processes than there are.
    """

    def __init__(self, verb: str = "healing or training", *, required: bool = True):
        launched = _launched()
        self.count, self.index = 1, 0
        self._accelerator: Any = None
        if required or launched > 1:
            self._accelerator = _accelerator(verb, launched)
            self.count = self._accelerator.num_processes
            self.index = self._accelerator.process_index
        if self.count != launched:
            raise InvalidOption(
                asked=f"a run of {launched} processes, says WORLD_SIZE",
                found=f"accelerate found {self.count}",
                fix="Start it with torchrun --nproc-per-node 2.",
            )
        if self.count == 1:
            _warn_of_a_lone_process()

    @property
    def is_main(self) -> bool:
        """Whether this process writes and shows."""
        return self.index == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes and communicates."""
        if self._accelerator is None:
            return torch.device("cpu")
        device: torch.device = self._accelerator.device
        return device

    @contextmanager
    def placed(self, *models: nn.Module) -> Iterator[None]:
        """Bring models to this process's own device, and back at the end.

        A process that is alone computes where the user put the model.
        """
        before = [next(model.parameters()).device for model in models]
        moved = [
            (model, device)
            for model, device in zip(models, before, strict=True)
            if self.count > 1 and device.type != self.device.type
        ]
        for model, _ in moved:
            model.to(self.device)
        try:
            yield
        finally:
            for model, device in moved:
                model.to(device)

    def sum(self, *values: float | int) -> list[float]:
        """Add up each number over all processes; every process has to ask."""
        if self.count == 1:
            return [float(value) for value in values]
        device = self.device
        # Counts must be exact and MPS knows no float64.
        kind = torch.float32 if device.type == "mps" else torch.float64
        held = torch.tensor(values, dtype=kind, device=device)
        total: list[float] = self._accelerator.reduce(held, "sum").tolist()
        return total

    def gather(self, value: _T) -> list[_T]:
        """Give what every process says, in order; every process has to ask."""
        if self.count == 1:
            return [value]
        said: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(said, value)
        return said

    def tell(self, value: _T) -> _T:
        """Give everybody what the main process says."""
        if self.count == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, device=self.device)
        return held[0]

    def on_main(self, act: Callable[[], _T]) -> _T | None:
        """Let the main process do something; if it fails, all of them fail alike."""
        result, problem = None, None
        if self.is_main:
            try:
                result = act()
            except Exception as error:
                if self.count == 1:
                    raise
                problem = error
        self.agree(problem)
        return result

    def agree(self, problem: Exception | None) -> None:
        """Raise in all processes what went wrong in any; every process has to ask."""
        for said in self.gather(problem):
            if said is not None:
                raise said

    @torch.no_grad()
    def spread(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give every process the main one's values."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), src=0)

    def averaging(self, objective: nn.Module) -> nn.Module:
        """Wrap a module so that gradients are averaged over all processes."""
        if self.count == 1:
            return objective
        wrapped: nn.Module = self._accelerator.prepare_model(objective)
        self._accelerator.free_memory()
        return wrapped


@contextmanager
def autocast(model: nn.Module, precision: str) -> Iterator[None]:
    """Compute matrix products in a half type; weights stay as they are.

    Weights are cast at each use. Up to torch 2.9 the cache of casts may hand one that
    was made without gradients to a step that wants them: nine of a block's parameters
    had none in the first step after a resumption, in silence.
    """
    dtype, device = PRECISIONS[precision], next(model.parameters()).device.type
    with torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False):
        yield


def require_precision(model: nn.Module, precision: str) -> None:
    """See that this model can be trained at this precision.

    Raises:
        InvalidOption: The name is unknown, or the device lacks the type.
    """
    device = next(model.parameters()).device.type
    problem = None
    if precision not in PRECISIONS:
        problem = "there is no such precision"
    elif device == "cuda" and precision == "bf16" and not _has_bf16():
        problem = "this GPU has no bfloat16"
    if problem:
        raise InvalidOption(
            asked=f"precision={precision!r}",
            found=problem,
            fix=f"Choose from {', '.join(PRECISIONS)}.",
        )


def _has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _launched() -> int:
    """Give how many processes were started, as far as the environment tells."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    for name in _MPI:
        if int(os.environ.get(name, "1")) > 1:
            raise InvalidOption(
                asked=f"a run of {os.environ[name]} processes, says {name}",
                found="they were not told how to find each other",
                why="each would make the whole run alone",
                fix="Start them with torchrun --nproc-per-node 2.",
            )
    return 1


def _accelerator(verb: str, launched: int) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtra(
            asked=verb,
            found="accelerate, which runs it, is not installed",
            fix='pip install "manyheads[train]"',
        ) from error
    # Without being told that it is for the CPU, accelerate would leave every process
    # that torchrun starts on a machine without GPUs alone, in silence.
    kind = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = launched > 1 and (kind is None or kind.type == "mps")
    # Models stay where the user put them; precision is set for each run, whereas
    # accelerate's holds for the whole process.
    before = torch.distributed.is_initialized()
    accelerator = Accelerator(
        cpu=on_cpu or _told_to_use_cpu(), device_placement=False, mixed_precision="no"
    )
    if torch.distributed.is_initialized() and not before:
        # Threads of the group that outlive the interpreter may end a process that had
        # done its work with SIGABRT.
        atexit.register(_leave_group)
    return accelerator


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _told_to_use_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def _warn_of_a_lone_process() -> None:
    """Say aloud what `accelerate launch --cpu --num_processes 2` does in silence."""
    if _told_to_use_cpu():
        warnings.warn(
            "accelerate launch started one process; with --cpu it passes over "
            "--num_processes. Start several with torchrun --nproc-per-node 2.",
            RuntimeWarning,
            stacklevel=2,
        )
