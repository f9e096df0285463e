"""Exported files: what they say about themselves, and how they are run.

Every file carries a *card*: the recipe, the class names, the preprocessing and the
versions that made it, as JSON in the place its format has for such things. A file that
was written by another tool has none and is refused by name.
"""

from __future__ import annotations

import importlib
import json
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import DataError, ImageSizeError, MissingExtra
from manyheads.geometry import Grid, fit_to_patches
from manyheads.hosts import ImageInput

__all__ = ["CARD", "Artifact", "Card", "Target", "open_artifact", "quiet", "require"]

Target = Literal["pt2", "onnx", "aoti"]
"""torch.export, ONNX for onnxruntime, and a package compiled ahead of time."""

FORMAT, VERSION = "manyheads.exported", 1
CARD = "manyheads.json"
INPUT = "images"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What an exported file says about itself.

    Attributes:
        target: The form it has.
        dtype: Type of weights, images and outputs, e.g. "float32".
        int8: Whether its matrices are stored as eight-bit integers.
        model: Class of the model that was exported.
        recipe: The recipe that had converted it, as JSON values; None if none had.
        labels: Class names in the order of the outputs; empty for an embedding.
        image: The preprocessing.
        cell: Height and width in pixels of which image sizes must be multiples; None
            where only the native size runs.
        versions: What made it.
        pads: Whether sizes between whole cells are padded with zeros, as the model's
            library does it; else they are refused.
        smallest: Height and width in pixels of the smallest image it takes.
    """

    target: Target
    dtype: str
    int8: bool
    model: str
    recipe: dict[str, Any] | None
    labels: tuple[str, ...]
    image: ImageInput
    cell: Grid | None
    versions: dict[str, str]
    pads: bool = True
    smallest: Grid = (1, 1)

    def to_json(self) -> str:
        """Write it as one JSON object with its format name and version."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Card:
        """Read what `to_json` wrote.

        Raises:
            DataError: It is of another format or version, or cut short.
        """
        try:
            values = json.loads(text)
            if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
                raise ValueError(f"it is not {FORMAT} version {VERSION}")
            image = {k: _tuples(v) for k, v in values.pop("image").items()}
            plain = {k: _tuples(v) for k, v in values.items()}
            if plain["target"] not in get_args(Target):
                raise ValueError(f"its target is {plain['target']!r}")
            return cls(image=ImageInput(**image), **plain)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _not_ours(where, f"its description is unreadable: {error}") from error


class Artifact(ABC):
    """An exported file, opened and ready to run.

    Attributes:
        card: What the file says about itself.
    """

    def __init__(self, card: Card) -> None:
        self.card = card

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B ..."]:
        """Run preprocessed images.

        Sizes between whole cells are padded with zeros where the model's library does
        so, and refused where it does not.

        Raises:
            ImageSizeError: The model does not take this size, or would answer
                something else at it than the file.
            DataError: The program fails on them.
        """
        size = (images.shape[-2], images.shape[-1])
        wanted = self._fed(size)
        padding = (0, wanted[1] - size[1], 0, wanted[0] - size[0])
        dtype: torch.dtype = getattr(torch, self.card.dtype)
        ready = F.pad(images, padding).to(dtype).contiguous()
        try:
            with torch.no_grad():
                return self._run(ready)
        except MemoryError:
            raise
        # Each runtime has errors of its own kind for a graph that does not run.
        except Exception as error:
            raise DataError(
                asked=f"running {len(ready)} images of {wanted[0]}x{wanted[1]}",
                found=f"the exported program fails: {error!s:.300}",
                fix="Use another image size, or export with dynamic=False.",
            ) from error

    def _fed(self, size: Grid) -> Grid:
        """Give the size to which images of this one are padded, or refuse them."""
        card, asked = self.card, f"image_size={size[0]}x{size[1]}"
        if card.cell is None:
            if size == card.image.size:
                return size
            height, width = card.image.size
            raise ImageSizeError(
                asked=asked,
                found=f"the file was exported for {height}x{width} only",
                fix="Export with dynamic=True from a model that takes any size.",
            )
        fed = fit_to_patches(size, card.cell)
        if fed != size and not card.pads:
            raise ImageSizeError(
                asked=asked,
                found=f"the file takes whole {card.cell[0]}x{card.cell[1]} cells",
                why="the model takes this size without padding, and padded with zeros "
                "the file would answer something else",
                fix=f"Use image_size={fed}.",
            )
        if fed[0] < card.smallest[0] or fed[1] < card.smallest[1]:
            raise ImageSizeError(
                asked=asked,
                found="its grid has fewer rows or columns than Interactive() has "
                "landmarks",
                why="a landmark is the average of at least one token of its own",
                fix=f"Use image_size={card.smallest} or more, or convert with fewer "
                "landmarks.",
            )
        return fed

    @abstractmethod
    def _run(self, images: Tensor) -> Tensor:
        """Run images that are known to fit, of the file's type."""


class _Program(Artifact):
    """A torch.export program or an ahead-of-time package; both are callables."""

    def __init__(self, card: Card, program: Any) -> None:
        super().__init__(card)
        self._program = program

    def _run(self, images: Tensor) -> Tensor:
        result = self._program(images)
        outputs: Tensor = result if isinstance(result, Tensor) else result[0]
        return outputs


class _Session(Artifact):
    """An ONNX file in onnxruntime, on the CPU."""

    def __init__(self, card: Card, session: Any) -> None:
        super().__init__(card)
        self._session = session

    def _run(self, images: Tensor) -> Tensor:
        outputs: np.ndarray[Any, Any] = self._session.run(None, {INPUT: images.numpy()})
        return torch.from_numpy(outputs[0])


def open_artifact(path: str | Path) -> Artifact:
    """Open a file that `export` wrote, to run it on the CPU.

    Only files from a source you trust: a compiled package is machine code.

    Raises:
        DataError: There is no such file, it is cut short, or `export` did not write
            it.
        MissingExtra: It is an ONNX file and onnxruntime is not installed.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(
            asked=f"opening the exported model {file}",
            found="there is no such file",
            fix="Write one with manyheads.export(model, path).",
        )
    try:
        with quiet():
            if zipfile.is_zipfile(file):
                return _open_zip(file)
            if file.suffix == ".onnx":
                return _open_onnx(file)
    except (MissingExtra, DataError):
        raise
    # Three runtimes' parsers raise their own kinds on damaged files.
    except Exception as error:
        raise _not_ours(str(file), f"it cannot be opened: {error!s:.300}") from error
    raise _not_ours(str(file), "it is neither a .pt2 nor an .onnx file")


def require(module: str, *, purpose: str, extra: str) -> Any:
    """Import what an extra brings, or say which.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            asked=purpose,
            found=f"{module.partition('.')[0]} is not installed",
            fix=f'pip install "manyheads[{extra}]"',
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' remarks about themselves off the user's screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open_zip(file: Path) -> Artifact:
    with zipfile.ZipFile(file) as archive:
        compiled = any("/data/aotinductor/" in name for name in archive.namelist())
    if compiled:
        package = torch._inductor.aoti_load_package(str(file))
        text = package.get_metadata().get(CARD, "")
        return _Program(_card(text, file), package)
    extra = {CARD: ""}
    program = torch.export.load(file, extra_files=extra)
    return _Program(_card(extra[CARD], file), program.module())


def _open_onnx(file: Path) -> Artifact:
    runtime = require("onnxruntime", purpose=f"running {file}", extra="export")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    # onnxruntime takes every core unless told; torch's setting is the user's word.
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"]
    )
    known = session.get_modelmeta().custom_metadata_map
    return _Session(_card(known.get(CARD, ""), file), session)


def _card(text: str, file: Path) -> Card:
    if not text:
        raise _not_ours(str(file), "it carries no description")
    return Card.from_json(text, where=str(file))


def _not_ours(where: str, found: str) -> DataError:
    return DataError(
        asked="opening an exported model",
        found=found,
        where=where,
        why="without its description nobody knows what images it wants",
        fix="Write it with manyheads.export(model, path).",
    )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
