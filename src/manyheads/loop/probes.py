"""What a model does inside while it runs: inputs and outputs of some of its modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.errors import DataError, ManyheadsError, UnknownHost
from manyheads.hosts import host_of, respond

__all__ = ["Call", "Recorder", "broken_block", "first", "like", "try_one"]


class Call(NamedTuple):
    """One call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Recorder:
    """Notes the last call of each of some modules while it is entered.

    with Recorder(model, ["blocks.3"]) as calls:
        model(images)
    calls["blocks.3"].output
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.model, self.paths = model, paths
        self.calls: dict[str, Call] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> dict[str, Call]:
        for path in self.paths:
            handle = self.model.get_submodule(path).register_forward_hook(
                self._note(path), with_kwargs=True
            )
            self._hooks.callback(handle.remove)
        return self.calls

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _note(self, path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.calls[path] = Call(args, kwargs, first(output))

        return note


def first(output: Any) -> Any:
    """Give a block's tokens: what it returns, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


def like(value: Any, model: nn.Module) -> Any:
    """Bring floating tensors, in tuples too, to the type and device of the weights."""
    if isinstance(value, tuple):
        return tuple(like(part, model) for part in value)
    if isinstance(value, Tensor):
        weight = next(model.parameters())
        dtype = weight.dtype if value.is_floating_point() else value.dtype
        return value.to(weight.device, dtype)
    return value


@torch.no_grad()
def try_one(
    model: nn.Module, images: Tensor, where: str, *, scored: bool = False
) -> Tensor:
    """Run the model on one image, in evaluation mode, and give what it says.

    Args:
        model: A hosted model.
        images: Its first one is shown.
        where: Where they come from, for messages.
        scored: Whether the answer must be scores of classes.

    Raises:
        DataError: The model refuses the image, or gives no scores where it must.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        output = respond(model.eval(), like(images[:1], model))
    except UnknownHost:
        raise
    except (
        ManyheadsError,
        RuntimeError,
        ValueError,
        TypeError,
        AssertionError,
    ) as error:
        raise DataError(
            asked=f"images from {where} for this {type(model).__name__}",
            found=f"it refuses an image {list(images.shape[1:])}: {error}",
            fix="Give images [C, H, W] of the size the model was built for.",
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if scored and not host_of(model).gives_scores(model, output):
        raise DataError(
            asked=f"scores [n, classes] of this {type(model).__name__}",
            found=f"it gives features {list(output.shape)}",
            why="labels are compared with scores, one for each class",
            fix="Give a model with a classifier; heal() does without one.",
        )
    return output


@torch.no_grad()
def broken_block(model: nn.Module, images: Tensor, paths: Sequence[str]) -> str | None:
    """Name the first of these modules whose output is not finite, or None."""
    with Recorder(model, paths) as calls:
        output = respond(model, like(images, model))
    for number, path in enumerate(paths):
        call = calls.get(path)
        if call is not None and not call.output.isfinite().all():
            return f"{path} (block {number})"
    return None if output.isfinite().all() else "the layers after the last block"
