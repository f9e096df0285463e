"""Looks at images before converting: how alike heads are, what layers put out.

Nothing is trained. A copy of the model sees the images once; the heads whose maps are
most alike are paired, and the outputs of feed-forward layers are summed up, so that
`convert` starts the new parts where they change least.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from manyheads import data
from manyheads.attention import Hallucinated, Mechanism, Softmax
from manyheads.attention.pairing import HeadChoice, choose_heads, map_similarity
from manyheads.data import ImageSource, Table
from manyheads.data.opening import open_images
from manyheads.errors import DataError
from manyheads.ffn import OutputMoments
from manyheads.hosts import Host, ImageInput, mechanism_of, replace_module
from manyheads.surgery import Operation

__all__ = ["Images", "calibrate"]

Images = data.Images | Iterable[Tensor]
"""What every verb takes as images, or batches [B, channels, height, width] of them."""

CALIBRATION_IMAGES = 256
"""Images of a folder, a data set or a table that are looked at, evenly spread."""
_BATCH = 16
"""Images at a time: the maps of so many are held."""


def calibrate(
    model: nn.Module, host: Host, operations: Sequence[Operation], images: Images
) -> tuple[Operation, ...]:
    """Add to each operation what the images say about where it should start.

    Heads are compared where a layer of ordinary attention becomes hallucinated;
    outputs are gathered where a feed-forward layer's output matrix is swapped. Other
    operations come back as they are.

    Cost: one pass over the images in evaluation mode, with the maps of the layers in
    question built one batch at a time: O(B H N^2) memory, with B = 16 where batches are
    not given.

    Args:
        model: The model to convert; a copy of it is run.
        host: Its host.
        operations: What is to happen, as planned.
        images: What to look at; dozens are enough for heads. Of a folder, a data set or
            a table 256 are taken, evenly spread; tensors and batches are taken whole.

    Raises:
        DataError: There is no image, too many cannot be read, or a batch is no
            [B, C, H, W] tensor.
    """
    watched = copy.deepcopy(model).eval()
    heads = [op for op in operations if _chooses_heads(op)]
    outputs = [op for op in operations if op.ffn is not None and op.site.ffn_path]
    notes = _Notes()
    for operation in heads:
        path = operation.site.attention_path
        layer = host.swap_attention(watched, operation.site, Softmax())
        replace_module(watched, path, layer)
        notes.watch_maps(path, mechanism_of(layer))
    for operation in outputs:
        path = operation.site.ffn_path or ""
        notes.watch_outputs(path, watched.get_submodule(path))
    place = next(watched.parameters())
    with notes, torch.no_grad():
        for batch in _batches(host.image_input(model), images):
            host.feed(watched, batch.to(place))
    choices = {op.site.index: notes.choice(op) for op in heads}
    moments = {op.site.index: notes.moments(op.site.ffn_path or "") for op in outputs}
    return tuple(
        replace(
            op, heads=choices.get(op.site.index), moments=moments.get(op.site.index)
        )
        for op in operations
    )


class _Notes:
    """Sums over images, gathered by hooks that go when the pass is over."""

    def __init__(self) -> None:
        self._hooks = ExitStack()
        self.similarity: dict[str, Tensor] = {}
        self.images: dict[str, int] = {}
        self.sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def watch_maps(self, path: str, core: Mechanism | None) -> None:
        """Compare the heads of a layer of ordinary attention, image by image."""
        if core is None:
            return

        def note(core: Any, args: tuple[Any, ...]) -> None:
            q, k, _, mask, grid = args
            alike = map_similarity(core.maps(q, k, mask, grid)).double()
            self.similarity[path] = self.similarity.get(path, 0) + alike.sum(dim=0)
            self.images[path] = self.images.get(path, 0) + len(alike)

        handle = core.register_forward_pre_hook(note)
        self._hooks.callback(handle.remove)

    def watch_outputs(self, path: str, output: nn.Module) -> None:
        """Sum up what an output matrix gives, token by token."""
        convolution = isinstance(output, nn.Conv2d)

        def note(_: nn.Module, __: Any, y: Tensor) -> None:
            tokens = y.movedim(1, -1) if convolution else y
            flat = tokens.reshape(-1, tokens.shape[-1]).double()
            mean, second, count = self.sums.get(path, (0, 0, 0))
            more = flat.t() @ flat
            self.sums[path] = (mean + flat.sum(0), second + more, count + len(flat))

        handle = output.register_forward_hook(note)
        self._hooks.callback(handle.remove)

    def choice(self, operation: Operation) -> HeadChoice:
        """Choose the real heads of one layer."""
        path, block = operation.site.attention_path, operation.site.index
        mean = (self.similarity[path] / self.images[path]).cpu()
        return choose_heads(mean, block=block, path=path)

    def moments(self, path: str) -> OutputMoments:
        """Turn the sums over one output matrix into means."""
        total, second, count = self.sums[path]
        return OutputMoments(
            mean=total / count, second=second / count, num_tokens=count
        )


def _chooses_heads(operation: Operation) -> bool:
    becomes, was = operation.attention, operation.site.attention
    return isinstance(becomes, Hallucinated) and isinstance(was, Softmax)


def _batches(wanted: ImageInput, images: Images) -> Iterable[Tensor]:
    """Give batches of images, and refuse what gives none."""
    if isinstance(images, tuple) and len(images) == 2 and _is_labels(images[1]):
        images = images[0]
    if isinstance(images, Tensor):
        images = torch.split(images, _BATCH) if images.ndim == 4 else [images]
    elif isinstance(images, str | Path | Table) or (
        isinstance(images, Dataset) and not isinstance(images, IterableDataset)
    ):
        yield from _looked_at(open_images(wanted, images, labelled=False))
        return
    seen = 0
    for batch in images:
        if not isinstance(batch, Tensor) or batch.ndim != 4 or not len(batch):
            shape = list(batch.shape) if isinstance(batch, Tensor) else type(batch)
            raise DataError(
                asked="calibrating on images",
                found=f"a batch is {shape}, not [B, channels, height, width]",
                fix="Give a folder, a tensor of normalised images, or an iterable of "
                "such.",
            )
        seen += len(batch)
        yield batch
    if not seen:
        raise DataError(
            asked="calibrating on images",
            found="there are none",
            fix="Give at least one, or leave images out.",
        )


def _is_labels(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1


def _looked_at(source: ImageSource) -> Iterable[Tensor]:
    """Load some images of a source, evenly spread; say how many could not be read."""
    spread = range(0, len(source), -(-len(source) // CALIBRATION_IMAGES))
    read = 0
    for batch in source.batches(spread, _BATCH):
        read += len(batch.images)
        if len(batch.images):
            yield batch.images
    if not read:
        raise source.too_many()
    if source.skipped:
        warnings.warn(
            f"calibrating on {source.where}: {len(source.skipped)} of {len(spread)} "
            f"pictures cannot be read: {', '.join(sorted(source.skipped))}",
            stacklevel=2,
        )
