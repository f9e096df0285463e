"""Where a model comes from when it is named by a word: a folder, or a library's list.

A result must say what its weights were, so the origin travels with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from manyheads.checkpoint import load
from manyheads.conversion import convert
from manyheads.errors import InvalidOption, UnknownModel
from manyheads.hosts import timm_zoo
from manyheads.recipe import Recipe
from manyheads.terminal.grammar import read_recipe_word

__all__ = ["NamedModel", "open_contestants", "open_model"]

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
    name: str,
    *,
    pretrained: bool = True,
    arguments: dict[str, Any] | None = None,
    seed: int = 0,
) -> NamedModel:
    """Give the model of a folder that `save` wrote, or a registered one.

    A folder is taken for a folder if it is there or if the name has a slash in it.

    Args:
        name: Folder, or registered name such as "deit_small_patch16_224".
        pretrained: For a registered name, published weights rather than random ones.
        arguments: For a registered name, arguments of the architecture.
        seed: For a registered name, of the weights that are random.

    Raises:
        UnknownModel: There is neither such a folder nor such a name.
        InvalidOption: The architecture does not take these arguments.
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
    model = timm_zoo.create(
        name, pretrained=pretrained, arguments=arguments or {}, seed=seed
    )
    weights: Weights = "pretrained" if pretrained else "random"
    return NamedModel(name=name, model=model, weights=weights)


def open_contestants(
    words: Sequence[str], further: Sequence[Recipe], *, pretrained: bool
) -> list[NamedModel]:
    """Open models, and convert the first of them by every recipe among the words.

    What is a folder is taken for a model, even where a recipe has the same name.

    Args:
        words: Models, and recipes as one word; a model comes first.
        further: More recipes for the first model.
        pretrained: For registered names, published weights rather than random ones.

    Raises:
        InvalidOption: The first word is a recipe.
        InvalidRecipe: A recipe cannot be read.
        UnknownModel: A word is neither a model nor a recipe.
    """
    read = [None if Path(word).is_dir() else read_recipe_word(word) for word in words]
    if read[0] is not None:
        raise InvalidOption(
            asked=f"comparing {' '.join(words)}",
            found=f"{words[0]} is a recipe and no model comes before it",
            fix=f"Name the model first, e.g. deit_small_patch16_224 {words[0]}.",
        )
    opened = [
        recipe or open_model(word, pretrained=pretrained)
        for word, recipe in zip(words, read, strict=True)
    ]
    base = next(one for one in opened if isinstance(one, NamedModel))
    return [
        one if isinstance(one, NamedModel) else _converted(base, one)
        for one in (*opened, *further)
    ]


def _converted(base: NamedModel, recipe: Recipe) -> NamedModel:
    return NamedModel(
        name=f"{base.name} + {_told(recipe)}",
        model=convert(base.model, recipe),
        weights=base.weights,
    )


def _told(recipe: Recipe) -> str:
    """Say in a few words what a recipe does."""
    parts = []
    for swap in recipe.swaps:
        specs = " + ".join(str(s) for s in (swap.attention, swap.ffn) if s is not None)
        blocks = "" if swap.blocks is None else ", ".join(map(str, swap.blocks))
        parts.append(f"{specs} in blocks {blocks}" if blocks else specs)
    return "; ".join(parts)
