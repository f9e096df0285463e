"""timm's registered models, by name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import nn

from manyheads.errors import CheckpointError, InvalidOption, UnknownModel

__all__ = ["create"]


def create(
    name: str, *, pretrained: bool, arguments: dict[str, Any], seed: int
) -> nn.Module:
    """Build a registered model, in evaluation mode.

    Args:
        name: Architecture, with or without the tag of its weights, e.g.
            "deit_small_patch16_224.fb_in1k".
        pretrained: Whether to fetch the published weights; random ones otherwise.
        arguments: Arguments of the architecture.
        seed: Of what is random: all weights, or those of a classifier that does not
            fit the published one.

    Raises:
        UnknownModel: timm registers no such model.
        InvalidOption: The architecture does not take these arguments.
        CheckpointError: The weights are not at hand and cannot be fetched.
    """
    import timm
    import torch

    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        meant = f"Did you mean {', '.join(close)}? " if close else ""
        raise UnknownModel(
            asked=f"the model {name!r}",
            found=f"timm {timm.__version__} registers no such model and no folder of "
            "that name is here",
            fix=f"{meant}timm.list_models() lists the names; a folder must have been "
            "written by manyheads.save().",
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = timm.create_model(
                name, pretrained=pretrained, **arguments
            )
    except (TypeError, ValueError, AssertionError) as error:
        if not arguments:
            raise
        told = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise InvalidOption(
            asked=f"{name} with {told}",
            found=f"timm cannot build it: {error}",
            fix="Use arguments of timm.create_model, such as num_classes=10 or "
            "img_size=128.",
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise CheckpointError(
            asked=f"the pretrained weights of {name!r}",
            found=f"they are neither on this machine nor can they be fetched: "
            f"{str(error).strip().splitlines()[0]}",
            fix="Connect to the network once so that they are kept, or use random "
            "weights with --no-pretrained (pretrained=False).",
        ) from error
    return model.eval()
