"""Whatever the user has for images, made into a source that one model can read.

    photos/                   a folder of pictures, flat or with a subfolder per class
    photos/ or a.parquet      parquet files, laid out as those of the hub
    photos/ or a.tar          WebDataset shards
    "hub:owner/name"          a data set of the Hugging Face hub
    "digits"                  the digits that come with scikit-learn
    Dataset, DatasetDict      of Hugging Face datasets
    torch Dataset             map-style, of images or (image, label)
    tensor, (tensor, labels)  preprocessed already

Pictures get the preprocessing that the model's library recorded; tensors are taken as
they are, after a look at their shape, type and values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from manyheads.data.bundled import digits
from manyheads.data.folders import (
    list_files,
    list_pictures,
    picture_endings,
    require_one_kind,
)
from manyheads.data.glances import digest_tensor, glance_at
from manyheads.data.labels import number_labels
from manyheads.data.photographs import misfit
from manyheads.data.preprocessing import Preprocessing
from manyheads.data.samples import (
    PictureSamples,
    Store,
    TensorSamples,
    WrappedSamples,
)
from manyheads.data.shards import index_shards
from manyheads.data.source import ImageSource
from manyheads.data.splits import choose_split, group_by_split, split_name
from manyheads.data.tables import Rows, Table, open_hub, open_parquet, open_table
from manyheads.errors import DataError, InvalidOption
from manyheads.hosts import ImageInput, find_host

__all__ = ["Images", "image_source", "label_problem", "open_images", "pair_of"]

Images = str | Path | Tensor | tuple[Tensor, Tensor] | Dataset[Any] | Table
"""What every verb takes as `images`."""

_HUB, _DIGITS = "hub:", "digits"

_LABELLED = {
    "folder": "Put every picture into a subfolder of its class.",
    "table": "Give a table with a column label that has a class in every row.",
    "shards": "Give every picture a .cls member.",
    "tensor": "Give (images, labels).",
}
"""What gives a source labels, by its kind."""


def image_source(
    model: nn.Module,
    images: Images,
    *,
    labelled: bool,
    max_unreadable: float | int = 0.1,
    held_out: bool = False,
) -> ImageSource:
    """Make a source for this model out of what the user has.

    Args:
        model: A hosted model; its library says what preprocessing pictures need.
        images: A path, a name, a data set or tensors; `docs/data.md` lists them. A path
            or name may end in the part that is wanted: `"photos[test]"`,
            `"hub:owner/name[train[:10%]]"`.
        labelled: Whether labels are needed.
        max_unreadable: Share of unreadable pictures at which to stop.
        held_out: Whether the images are to measure rather than to learn from. Of
            several parts, validation or test is taken then, else train.

    Raises:
        DataError: The source is missing, empty, of the wrong kind, holds values that
            are not finite, leaves open which column or part is meant, or lacks the
            labels that are needed.
        InvalidOption: `max_unreadable` is no share.
        MissingExtra: It needs a package that is not installed.
        UnknownHost: No host knows the model.
    """
    wanted = find_host(model)[0].image_input(model)
    return open_images(
        wanted,
        images,
        labelled=labelled,
        max_unreadable=max_unreadable,
        held_out=held_out,
    )


def open_images(
    wanted: ImageInput,
    images: Images,
    *,
    labelled: bool,
    max_unreadable: float | int = 0.1,
    held_out: bool = False,
) -> ImageSource:
    """Make a source of images of this size and preprocessing; see `image_source`."""
    if not 0 <= max_unreadable < 1:
        raise InvalidOption(
            asked=f"max_unreadable={max_unreadable}",
            found="it is a share of all pictures, from 0 up to below 1",
            fix="Use max_unreadable=0 to stop at the first, 0.1 for a tenth.",
        )
    source = _Opening(wanted, labelled, held_out).any(images)
    source.max_unreadable = max_unreadable
    if labelled and not source.labelled:
        raise DataError(
            asked=f"labelled images from {source.where}",
            found="not every image has a label",
            why="training and evaluation compare with labels; heal() needs none",
            fix=_LABELLED.get(source.identity["kind"], "Give pairs (image, label)."),
        )
    return source


class _Opening:
    """Opens one source for a model that wants this, to learn from or to measure."""

    def __init__(self, wanted: ImageInput, labelled: bool, held_out: bool) -> None:
        self.wanted, self.labelled, self.held_out = wanted, labelled, held_out

    def any(self, images: Images) -> ImageSource:
        """Tell what was given by its type."""
        if isinstance(images, str | Path):
            return self.named(str(images))
        if isinstance(images, Tensor):
            return self.tensors(images, None)
        if isinstance(images, tuple) and all(isinstance(x, Tensor) for x in images):
            return self.tensors(*pair_of(images))
        if isinstance(images, Table):
            return self.table(images)
        return self.dataset(images)

    def named(self, text: str) -> ImageSource:
        """Open a path, or a name where there is no such path."""
        if Path(text).exists():
            return self.path(Path(text), None)
        name, split = split_name(text)
        if name.startswith(_HUB):
            rows, split = open_hub(
                name.removeprefix(_HUB),
                split,
                labelled=self.labelled,
                held_out=self.held_out,
                where=name,
            )
            return self.rows(rows, f"{name}[{split}]")
        if name == _DIGITS:
            return self.digits(split)
        return self.path(Path(name), split)

    def path(self, path: Path, split: str | None) -> ImageSource:
        """Open a folder or a file by what it holds: tables, else shards, else files."""
        known = {".parquet", ".tar"} | picture_endings()
        alone = path.is_file() and path.suffix.lower() in known
        files, root = ([path], path.parent) if alone else (list_files(path), path)
        require_one_kind(root, files)
        for ending, open_ in ((".parquet", self.parquet), (".tar", self.shards)):
            found = [file for file in files if file.suffix.lower() == ending]
            if found:
                groups = {"train": found} if alone else group_by_split(root, found)
                chosen = choose_split(
                    list(groups), split, held_out=self.held_out, where=str(path)
                )
                where = f"{path}[{chosen}]" if len(groups) > 1 else str(path)
                return open_(sorted(groups[chosen]), where)
        folder = list_pictures(root, files=files, split=split, held_out=self.held_out)
        labels = torch.tensor(folder.labels)
        return self.pictures(
            folder,
            str(path if alone else folder.root),
            {"kind": "folder", "images": len(labels), "digest": folder.digest()},
            labels,
            folder.classes,
        )

    def parquet(self, files: list[Path], where: str) -> ImageSource:
        """Open parquet files."""
        return self.rows(
            open_parquet(files, labelled=self.labelled, where=where), where
        )

    def shards(self, files: list[Path], where: str) -> ImageSource:
        """Open WebDataset shards."""
        shards = index_shards(files)
        labels, classes = number_labels(shards.words)
        identity = {
            "kind": "shards",
            "images": len(labels),
            "digest": shards.digest(),
        }
        return self.pictures(shards, where, identity, labels, classes)

    def table(self, table: Any) -> ImageSource:
        """Open a data set that the user loaded with datasets."""
        where = f"a {type(table).__name__}"
        if isinstance(table, dict):
            split = choose_split(list(table), None, held_out=self.held_out, where=where)
            table, where = table[split], f"{where}[{split}]"
        return self.rows(open_table(table, where=where, labelled=self.labelled), where)

    def rows(self, rows: Rows, where: str) -> ImageSource:
        """Make a source of the rows of a table."""
        identity = {"kind": "table", "images": len(rows), "digest": rows.digest()}
        return self.pictures(rows, where, identity, rows.labels, rows.classes)

    def pictures(
        self,
        store: Store,
        where: str,
        identity: dict[str, Any],
        labels: Tensor | None,
        classes: tuple[str, ...],
    ) -> ImageSource:
        """Make a source of encoded pictures."""
        if self.wanted.channels not in (1, 3):
            raise DataError(
                asked=f"images from {where}",
                found=f"the model wants {self.wanted.channels} channels",
                why="picture files give 1 (grey) or 3 (RGB)",
                fix=f"Give a tensor of images [n, {self.wanted.channels}, H, W].",
            )
        known = labels is not None and bool((labels >= 0).all())
        return ImageSource(
            items=PictureSamples(store, labels, Preprocessing(self.wanted)),
            size=identity["images"],
            where=where,
            identity=identity,
            labelled=known,
            labels=labels,
            classes=classes,
        )

    def digits(self, split: str | None) -> ImageSource:
        """Take the digits at the model's size, -1 to 1, as `digits` gives them."""
        chosen = choose_split(
            ["train", "test"], split, held_out=self.held_out, where=_DIGITS
        )
        parts = digits(image_size=self.wanted.size, channels=self.wanted.channels)
        source = self.tensors(*(parts.train if chosen == "train" else parts.test))
        source.where = f"{_DIGITS}[{chosen}]"
        source.classes = tuple("0123456789")
        return source

    def tensors(self, images: Tensor, labels: Tensor | None) -> ImageSource:
        """Take tensors as they are."""
        shape = list(images.shape)
        if problem := _misfit(images, labels, self.wanted.channels):
            height, width = self.wanted.size
            raise DataError(
                asked=f"images as a tensor {shape}",
                found=problem,
                fix=f"Give a float tensor [n, {self.wanted.channels}, {height}, "
                f"{width}], normalised as the model wants it, or a folder.",
            )
        identity = {"kind": "tensor", "shape": shape, "digest": digest_tensor(images)}
        if labels is not None:
            identity["labels"] = digest_tensor(labels)
        return ImageSource(
            items=TensorSamples(images, labels, Preprocessing(self.wanted)),
            size=len(images),
            where=f"a tensor {shape}",
            identity=identity,
            labelled=labels is not None,
            pictures=False,
            labels=labels,
        )

    def dataset(self, images: Any) -> ImageSource:
        """Take a map-style torch dataset."""
        kind = type(images).__name__
        sized = isinstance(images, Dataset) and not isinstance(images, IterableDataset)
        try:
            count = len(images) if sized else 0
        except (TypeError, NotImplementedError):
            sized, count = False, 0
        if not count:
            raise DataError(
                asked=f"images from a {kind}",
                found="it is empty" if sized else "it is no source of images",
                why="a run that can be resumed needs a length and items by number",
                fix="Give a folder, a map-style torch dataset, a tensor [n, C, H, W], "
                "or a pair of tensors (images, labels).",
            )
        first, label, digest = glance_at(images, count)
        if not isinstance(first, Tensor | Image.Image):
            broken = "none of its items that were tried can be read"
            raise DataError(
                asked=f"images from a {kind}",
                found=broken
                if first is None
                else f"an item is a {type(first).__name__}",
                fix="Items are a tensor [C, H, W] or a picture, alone or with a label: "
                "(image, label).",
            )
        plain = isinstance(first, Tensor)
        return ImageSource(
            items=WrappedSamples(images, Preprocessing(self.wanted)),
            size=count,
            where=f"a {kind}",
            identity={"kind": kind, "images": count, "digest": digest},
            labelled=label >= 0,
            pictures=not plain,
        )


def pair_of(images: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Take two tensors apart, or say how many there are."""
    if len(images) == 2:
        return images[0], images[1]
    raise DataError(
        asked=f"images as {len(images)} tensors",
        found="a source is one tensor of images or a pair (images, labels)",
        fix="Give (images, labels).",
    )


def _misfit(images: Tensor, labels: Tensor | None, channels: int) -> str | None:
    problem = misfit(images, channels)
    if problem is None and labels is not None:
        return label_problem(labels, len(images))
    return problem


def label_problem(labels: Tensor, count: int) -> str | None:
    """Say why these are no class numbers of so many images, or None."""
    if labels.ndim != 1 or len(labels) != count:
        return f"its labels are {list(labels.shape)}, not [n] = [{count}]"
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return f"its labels are {labels.dtype}, not class numbers"
    return f"label {int(labels.min())} is negative" if labels.min() < 0 else None
