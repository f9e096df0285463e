"""Classifies or embeds photographs with an exported file and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.artifacts import open_artifact
from manyheads.artifacts.classes import one_each
from manyheads.data.photographs import prepare_files
from manyheads.errors import DataError, ImageSizeError, InvalidOption

__all__ = ["Answer", "Answers", "Guess", "run"]

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Guess:
    """One class, with the share of certainty that the model gives it."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says of one photograph.

    Attributes:
        file: The photograph.
        guesses: The likeliest classes, best first; empty where the model embeds.
        embedding: The output vector; empty where the model classifies.
    """

    file: str
    guesses: tuple[Guess, ...]
    embedding: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What an exported model says of some photographs, and how they were shown to it.

    Attributes:
        answers: One per photograph, in order.
        image_size: Height and width to which they were resized and cropped.
        model: The class of the model that was exported.
        recipe: The recipe that had converted it, as JSON values; None if none had.
    """

    answers: tuple[Answer, ...]
    image_size: tuple[int, int]
    model: str
    recipe: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for answer in self.answers:
            lines.append(f"{answer.file} at {self.image_size[0]}x{self.image_size[1]}:")
            lines += [
                f"  {100 * guess.probability:5.1f} %  {guess.label}"
                for guess in answer.guesses
            ]
            if answer.embedding:
                shown = ", ".join(f"{value:.3g}" for value in answer.embedding[:4])
                lines.append(f"  {len(answer.embedding)} numbers: {shown}, ...")
        return "\n".join(lines)


def run(
    path: str | Path,
    photographs: str | Path | Sequence[str | Path],
    *,
    top: int = 5,
    image_size: tuple[int, int] | None = None,
) -> Answers:
    """Classify or embed photographs with a file that `export` wrote.

    Everything that is needed is in the file: how images are prepared, the class names,
    and whether it classifies or embeds.

    Args:
        path: The exported file. Only from a source you trust: a compiled package is
            machine code.
        photographs: One picture file or several.
        top: Classes to name for each photograph.
        image_size: Height and width to show them at; None for the native size.

    Raises:
        DataError: The file was not written by `export` or is damaged, or a photograph
            cannot be read.
        ImageSizeError: The file does not run at this size.
        InvalidOption: `top` is not positive.
        MissingExtra: It is an ONNX file and onnxruntime is not installed.
    """
    if top < 1:
        raise InvalidOption(
            asked=f"run(top={top})",
            found="at least one class has to be named",
            fix="Use top=5.",
        )
    artifact = open_artifact(path)
    card = artifact.card
    size = image_size or card.image.size
    if min(size) < 1:
        raise ImageSizeError(
            asked=f"image_size={size[0]}x{size[1]}",
            found="an image has at least one row and one column",
            fix=f"Use image_size={card.image.size}, the native size.",
        )
    if isinstance(photographs, str | Path):
        photographs = [photographs]
    files = list(photographs)
    answers: list[Answer] = []
    names = card.labels
    for start in range(0, max(len(files), 1), _BATCH):
        part = files[start : start + _BATCH]
        outputs = artifact(prepare_files(part, card.image, size)).float()
        if outputs.ndim == 2:
            names = one_each(names, outputs.shape[1], whose=str(path))
        answers += [
            _answer(names, str(file), output, top)
            for file, output in zip(part, outputs, strict=True)
        ]
    return Answers(
        answers=tuple(answers), image_size=size, model=card.model, recipe=card.recipe
    )


def _answer(names: Sequence[str], file: str, output: Tensor, top: int) -> Answer:
    if not output.isfinite().all():
        raise DataError(
            asked=f"an answer for {file}",
            found="the exported model gave infinite or undefined numbers",
            fix="Export it in float32.",
        )
    if not names or output.ndim != 1:
        vector = tuple(output.flatten().tolist())
        return Answer(file=file, guesses=(), embedding=vector)
    best = torch.softmax(output, dim=-1).topk(min(top, len(names)))
    guesses = tuple(
        Guess(label=names[index], index=index, probability=probability)
        for probability, index in zip(
            best.values.tolist(), best.indices.tolist(), strict=True
        )
    )
    return Answer(file=file, guesses=guesses, embedding=())
