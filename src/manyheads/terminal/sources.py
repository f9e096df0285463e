"""Where a model comes from when it is named by a word: a folder, or a library's list.

A result must say what its weights were, so the origin travels with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from manyheads.checkpoint import load
from manyheads.errors import UnknownModel
from manyheads.hosts import timm_zoo

__all__ = ["NamedModel", "open_model"]

Weights = Literal["random", "pretrained", "folder"]


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model with the name it was asked for by.

    Attributes:
        name: The registered name or the folder.
        model: The model, in evaluation mode.
        weights: "random", "pretrained" as published, or "folder" as saved there.
    """

    name: str
    model: nn.Module
    weights: Weights

    def to_json(self) -> dict[str, Any]:
        """Give the name and the origin of the weights."""
        return {"name": self.name, "weights": self.weights}

    def __str__(self) -> str:
        origin = {
            "random": "random weights",
            "pretrained": "pretrained weights",
            "folder": "weights read from the folder",
        }
        return f"{self.name}: {origin[self.weights]}"


def open_model(
    name: str, *, pretrained: bool = True, arguments: dict[str, Any] | None = None
) -> NamedModel:
    """Give the model of a folder that `save` wrote, or a registered one.

    A folder is taken for a folder if it is there or if the name has a slash in it.

    Args:
        name: Folder, or registered name such as "deit_small_patch16_224".
        pretrained: For a registered name, published weights rather than random ones.
        arguments: For a registered name, arguments of the architecture.

    Raises:
        UnknownModel: There is neither such a folder nor such a name.
        CheckpointError: The folder holds no checkpoint of ours, or the published
            weights are out of reach.
    """
    folder = Path(name)
    if folder.exists():
        return NamedModel(name=name, model=load(folder), weights="folder")
    if len(folder.parts) > 1 or folder.is_absolute():
        raise UnknownModel(
            asked=f"the model {name!r}",
            found="there is no such folder",
            fix="Give a folder written by manyheads.save(), or a registered name such "
            "as deit_small_patch16_224.",
        )
    model = timm_zoo.create(name, pretrained=pretrained, arguments=arguments or {})
    weights: Weights = "pretrained" if pretrained else "random"
    return NamedModel(name=name, model=model, weights=weights)
