"""Tables of pictures: parquet files, data sets of the hub, `datasets.Dataset` objects.

Hugging Face datasets reads them. Parquet files become Arrow files in its cache when
they are first used, and rows are mapped from there, not held in memory. Columns are
found by their features; pictures are decoded here, like those of a folder.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from manyheads.data.labels import number_labels
from manyheads.data.splits import choose_split
from manyheads.errors import DataError, ManyheadsError, MissingExtra

__all__ = ["Rows", "Table", "open_hub", "open_parquet", "open_table"]

_LABELS = ("label", "labels", "target", "class")
_DIGESTED = 64


@runtime_checkable
class Table(Protocol):
    """A `datasets.Dataset` or `datasets.DatasetDict`, told by what it can do."""

    column_names: Any

    def cast_column(self, column: str, feature: Any) -> Any:
        """Give the same table with another type of one column."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Rows of a table.

    Attributes:
        column: The pictures, encoded; a `datasets.Dataset` of one column.
        names: File and number of the first row of each; without files, "row" and 0.
        labels: One number each; None without a column of labels.
        classes: Names of the classes where they are known.
    """

    column: Any
    names: tuple[tuple[str, int], ...]
    labels: Tensor | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.column)

    def name(self, position: int) -> str:
        """Give file and row."""
        place = bisect_right(self.names, position, key=lambda file: file[1]) - 1
        file, first = self.names[place]
        return f"{file}:{position - first}"

    def open(self, position: int) -> Path | BytesIO:
        """Give one row's encoded picture."""
        (value,) = self.column[position].values()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return BytesIO(value)
        if isinstance(value, str) and value:
            return Path(value)
        raise OSError("the row has no picture")

    def digest(self) -> str:
        """Sum up the number of rows, all labels and the bytes of some pictures."""
        digest = hashlib.sha256(str(len(self)).encode())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        for position in range(0, len(self), max(1, len(self) // _DIGESTED)):
            try:
                file = self.open(position)
                encoded = file.read_bytes() if isinstance(file, Path) else file.read()
            except OSError:
                continue
            digest.update(encoded)
        return digest.hexdigest()[:16]


def open_parquet(files: Sequence[Path], *, labelled: bool, where: str) -> Rows:
    """Open parquet files as one table, through the cache of datasets.

    Raises:
        DataError: They cannot be read, or are no table of images.
        MissingExtra: datasets is not installed.
    """
    library = _library(where)
    names: list[tuple[str, int]] = []
    first = 0
    try:
        import pyarrow.parquet

        for file in files:
            names.append((file.name, first))
            first += pyarrow.parquet.read_metadata(file).num_rows
        table = library.load_dataset(
            "parquet", data_files=[str(file) for file in files], split="train"
        )
    # The library and its parts raise errors of a dozen kinds on bad files.
    except Exception as error:
        raise _unreadable(where, error) from error
    return open_table(table, where=where, labelled=labelled, names=tuple(names))


def open_hub(
    name: str, split: str | None, *, labelled: bool, held_out: bool, where: str
) -> tuple[Rows, str]:
    """Open a data set of the Hugging Face hub, fetched when it is first used.

    Args:
        name: "owner/name", or "owner/name/configuration".
        split: The part, also a slice such as "train[:10%]"; None for the usual one.
        labelled: Whether labels are needed.
        held_out: Whether the images are to measure rather than to learn from.
        where: What the user gave.

    Returns:
        The rows, and the part that was chosen.

    Raises:
        DataError: That is no name, there is no such data set or part, it is out of
            reach, or it is no table of images.
        MissingExtra: datasets is not installed.
    """
    parts = [part.strip() for part in name.split("/")]
    if len(parts) > 3 or not all(parts):
        raise DataError(
            asked=f"images from {where}",
            found=f"{name!r} is no name of a data set",
            why="a name is owner/name or owner/name/configuration",
            fix='Give "hub:uoft-cs/cifar10" or another name from the hub.',
        )
    library = _library(where)
    owner_and_name, configuration = name, None
    if name.count("/") == 2:
        owner_and_name, _, configuration = name.rpartition("/")
    try:
        builder = library.load_dataset_builder(owner_and_name, configuration)
        if split is None and not builder.info.splits:
            builder.download_and_prepare()
        if split is None:
            split = choose_split(
                list(builder.info.splits), None, held_out=held_out, where=where
            )
        table = library.load_dataset(owner_and_name, configuration, split=split)
    except ManyheadsError:
        raise
    # The library and its parts raise errors of a dozen kinds when a hub is not there.
    except Exception as error:
        raise _unreadable(where, error) from error
    rows = open_table(table, where=f"{where}[{split}]", labelled=labelled)
    return rows, split


def open_table(
    table: Any,
    *,
    where: str,
    labelled: bool,
    names: tuple[tuple[str, int], ...] = (("row", 0),),
) -> Rows:
    """Find the pictures and the labels among the columns of a table.

    Pictures are the column with the feature Image, else the one of encoded bytes;
    labels the one with the feature ClassLabel, else one of whole numbers or words that
    is called label, labels, target or class.

    Raises:
        DataError: There is no column of pictures, or more than one that could be
            meant; or the rows cannot be reached by number.
    """
    library = _library(where)
    stream = isinstance(table, library.IterableDataset)
    if stream or not len(table):
        raise DataError(
            asked=f"images from {where}",
            found="it is a stream" if stream else "it has no row",
            why="a run that can be resumed needs a length and rows by number",
            fix="Load a part that is not empty, without streaming=True.",
        )
    if table.format["type"] == "custom":
        raise DataError(
            asked=f"images from {where}",
            found="it has a transform of its own",
            why="pictures are preprocessed for the model",
            fix="Pass dataset.with_format(None).",
        )
    features = dict(table.features)
    image = _image_column(features, library, where)
    column = table.select_columns([image]).with_format(None)
    if isinstance(features[image], library.Image):
        column = column.cast_column(image, library.Image(decode=False))
    label = _label_column(features, library, where if labelled else None)
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    if label is not None:
        words = table.select_columns([label]).with_format(None)[:][label]
        labels, classes = number_labels(words)
        if isinstance(features[label], library.ClassLabel):
            classes = tuple(features[label].names)
    return Rows(column=column, names=names, labels=labels, classes=classes)


def _image_column(features: dict[str, Any], library: Any, where: str) -> str:
    images = [k for k, kind in features.items() if isinstance(kind, library.Image)]
    images = images or [k for k, kind in features.items() if _holds_bytes(kind)]
    if len(images) == 1:
        return images[0]
    columns = ", ".join(f"{k} ({_kind(kind)})" for k, kind in features.items())
    raise DataError(
        asked=f"images from {where}",
        found=f"{', '.join(images)} are all pictures"
        if images
        else f"no column holds pictures; there is {columns}",
        why="which column is the image would be a guess",
        fix='Pass datasets.load_dataset(...).select_columns(["image", "label"]).',
    )


def _label_column(
    features: dict[str, Any], library: Any, needed_by: str | None
) -> str | None:
    """Name the column of labels; None if there is none, or several and no need."""
    labels = [k for k, kind in features.items() if isinstance(kind, library.ClassLabel)]
    labels = labels or [
        name
        for name, kind in features.items()
        if name in _LABELS
        and getattr(kind, "dtype", "").startswith(("int", "uint", "str"))
    ]
    if len(labels) > 1 and needed_by is not None:
        raise DataError(
            asked=f"labelled images from {needed_by}",
            found=f"{', '.join(labels)} are all labels",
            why="which column is the label would be a guess",
            fix="Pass datasets.load_dataset(...).select_columns(["
            f'"image", "{labels[0]}"]).',
        )
    return labels[0] if len(labels) == 1 else None


def _holds_bytes(kind: Any) -> bool:
    inner = kind.get("bytes") if isinstance(kind, dict) else kind
    return getattr(inner, "dtype", "") in ("binary", "large_binary")


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _library(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(
            asked=f"images from {where}",
            found="datasets, which reads tables and the hub, is not installed",
            fix='pip install "manyheads[train]"',
        ) from error
    return datasets


def _unreadable(where: str, error: Exception) -> DataError:
    from datasets import config

    offline = bool(config.HF_HUB_OFFLINE)
    first = (str(error).splitlines() or [""])[0]
    return DataError(
        asked=f"images from {where}",
        found=f"{type(error).__name__}: {first}",
        why="HF_HUB_OFFLINE is set, so only what is in the cache is found"
        if offline
        else "",
        fix="Fetch it once where there is a network, or give a folder of its .parquet "
        "files."
        if where.startswith("hub:")
        else "Give .parquet files that datasets.load_dataset() reads.",
    )
