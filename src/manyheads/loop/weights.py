"""Which weights may move, the last ones that were good, and what tells them apart."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = [
    "Keeper",
    "Origin",
    "fingerprint",
    "free_only",
    "is_finite",
    "keeping_modes",
    "keeping_randomness",
    "seed_all",
]


class Keeper:
    """Remembers the last weights whose loss was finite, at the cost of a copy."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [
            (n, p) for n, p in model.named_parameters() if p.requires_grad
        ]
        self.held = [_local(p.detach()) for _, p in self.parameters]
        self.held += [b for b in model.buffers() if b.numel()]
        self.kept = [tensor.clone() for tensor in self.held]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember what the model holds now."""
        torch._foreach_copy_(self.kept, self.held)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model what was remembered."""
        torch._foreach_copy_(self.held, self.kept)

    def first_broken(self) -> str | None:
        """Name the first parameter that is not finite."""
        return next((n for n, p in self.parameters if not is_finite(p)), None)


class Origin:
    """Remembers in host memory what a model came with, at the cost of a copy."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in _tensors(model).items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model all of it back, wherever the model is by now."""
        # By name: a model that moves to another device gets new buffers.
        now = _tensors(self._model)
        for name, kept in self._kept.items():
            now[name].copy_(kept)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor, or what of it is in this process, is finite."""
    return bool(_local(tensor).isfinite().all())


def _local(tensor: Tensor) -> Tensor:
    """Give what of a tensor is in this process: all of it, as a rule."""
    held: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held


@contextmanager
def keeping_modes(*models: nn.Module) -> Iterator[None]:
    """Give every module its training flag and every parameter its flag back."""
    modules = [(m, m.training) for model in models for m in model.modules()]
    parameters = [(p, p.requires_grad) for model in models for p in model.parameters()]
    try:
        yield
    finally:
        for module, training in modules:
            module.training = training
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)


@contextmanager
def keeping_randomness(device: torch.device) -> Iterator[None]:
    """Give the generators of torch, numpy and Python back as they were."""
    plain, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(array)


def seed_all(seed: int) -> None:
    """Seed whatever a model may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def free_only(
    model: nn.Module, paths: tuple[str, ...], *, but: Iterable[str] = ()
) -> None:
    """Let the parameters of these modules move, and no others.

    Args:
        model: The model.
        paths: Modules; "" is the whole model.
        but: Names of parameters that are held still wherever they are.
    """
    model.requires_grad_(False)
    for path in paths:
        model.get_submodule(path).requires_grad_(True)
    for name in but:
        model.get_parameter(name).requires_grad_(False)


def fingerprint(model: nn.Module, *, values: bool) -> str:
    """Give a digest of all tensors: names, types and shapes, and values if asked."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if values:
            plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(plain.numpy().tobytes())
    return digest.hexdigest()[:16]
