"""Exports a model to one file, and keeps the file only if it does what the model does.

The written file is loaded again and run on photographs at its native size, at a larger
one and at one that is not square; every output is compared with the model's own. An
exporter that goes wrong seldom says so: it writes a file that answers something else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from manyheads.artifacts import Artifact, Card, Target, open_artifact
from manyheads.artifacts.classes import one_each, require_scores
from manyheads.artifacts.sizes import pads, smallest
from manyheads.artifacts.targets import Shipped, fold, problem, target_for, trace, write
from manyheads.artifacts.verification import (
    Check,
    LabelledCheck,
    compare,
    compare_labelled,
    run_at,
    warn_of_blindness,
)
from manyheads.attention import Softmax
from manyheads.data import Images
from manyheads.data.exhibits import Exhibits, exhibits
from manyheads.drafts import draft_of
from manyheads.errors import (
    DataError,
    ImageSizeError,
    InvalidOption,
    ManyheadsError,
    NotExportable,
)
from manyheads.geometry import Grid
from manyheads.hosts import Host, ImageInput, find_host
from manyheads.surgery import current_recipe

__all__ = ["Exported", "export"]

TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Largest difference allowed, as a share of the largest output; int8 has its own."""
INT8_TOLERANCE = 0.25
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written, and what it was found to do.

    Attributes:
        path: The file.
        target: Its form.
        dtype: Type of its weights, images and outputs.
        int8: Whether its matrices are eight-bit integers.
        cell: Height and width in pixels of which image sizes must be multiples; None
            where only the native size runs.
        fixed_because: Why only the native size runs; empty where any does.
        folded: Branched layers that were folded into plain ones.
        checks: Comparisons with the model; all within the tolerance.
        tolerance: What they were held to.
        labelled: Accuracy, where labelled images were given.
        size_mib: Size of the file.
        conditions: Versions, and the photographs.
    """

    path: Path
    target: Target
    dtype: str
    int8: bool
    cell: Grid | None
    fixed_because: str
    folded: int
    checks: tuple[Check, ...]
    tolerance: float
    labelled: LabelledCheck | None
    size_mib: float
    conditions: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        return asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        kind = f"{self.dtype} weights as int8" if self.int8 else self.dtype
        lines = [f"{self.path}: {self.target}, {kind}, {self.size_mib:.1f} MiB"]
        if self.cell:
            lines.append(
                f"any batch, any image size of whole {self.cell[0]}x{self.cell[1]} "
                "cells"
            )
        else:
            lines.append(f"any batch, native size only: {self.fixed_because}")
        if self.folded:
            lines.append(f"{self.folded} branched layers folded")
        lines += [
            f"{check.image_size[0]}x{check.image_size[1]}, {check.images} photographs: "
            f"differs by {check.difference:.1e} of the largest output "
            f"(allowed {self.tolerance:g})"
            for check in self.checks
        ]
        if self.labelled:
            found = self.labelled
            lines.append(
                f"accuracy on {found.images} labelled images: model "
                f"{100 * found.accuracy_model:.2f} %, file "
                f"{100 * found.accuracy_file:.2f} %"
            )
        return "\n".join(lines)


def export(
    model: nn.Module,
    path: str | Path,
    *,
    target: Target | None = None,
    dynamic: bool = True,
    dtype: torch.dtype | str | None = None,
    images: Images | None = None,
    tolerance: float | None = None,
    int8: bool = False,
    image_size: tuple[int, int] | None = None,
) -> Exported:
    """Write a model to one file that runs without this package, and check it.

    Compact branches are folded first. The file takes any batch; it takes any image
    size of whole patches where the model's library allows that, else its native size,
    and the result says why. It carries the recipe, the class names and the
    preprocessing, so that `manyheads run` needs nothing else.

    Cost: a copy of the model, one run of it on one image, and one per check at up to
    1.5 times the native sides; a compiled package takes a minute or more to build.

    Args:
        model: A hosted model, converted or not; it is not touched.
        path: The file: ``.pt2`` for torch.export, ``.onnx`` for onnxruntime.
        target: "aoti" for a ``.pt2`` that is compiled ahead of time for this machine's
            kind; None to go by the file's ending.
        dynamic: Whether any image size is wanted, or the native size alone.
        dtype: Type of the weights; None for the model's own.
        images: What the file is checked with: a picture file, a folder, preprocessed
            images [B, C, H, W], or these with labels; a folder with one subfolder per
            class counts as labelled. None for two photographs that scikit-learn has.
        tolerance: Largest difference allowed, as a share of the largest output; None
            for 1e-4 in float32, 2e-2 in float16, 1e-1 in bfloat16, 0.25 in int8.
        int8: Store matrices as eight-bit integers; ONNX only.
        image_size: Height and width that become the file's native size, whole patches
            both, with the position embedding resampled as the library does it; None
            for the model's own.

    Raises:
        UnknownHost: No host knows the model.
        DataError: An image cannot be read, or labels were given and the model gives no
            scores, or none for the highest label.
        ImageSizeError: The model cannot be made for this size.
        InvalidOption: The target, type or tolerance is unknown.
        NotExportable: The path cannot be written, the form cannot hold the model, the
            exporter fails, or the file differs from the model; then it was removed.
        MissingExtra: What the form needs is not installed.
    """
    file = Path(path)
    form = target_for(file, target)
    host, sites = find_host(model)
    own = next(model.parameters()).dtype
    kind = own if dtype is None else _dtype(dtype)
    limit = _limit(tolerance, kind, int8=int8)
    reason = problem(model, form, kind, int8=int8)
    if reason:
        raise _refusal(model, file, reason, fix="Choose another target or type.")
    reference = copy.deepcopy(model).cpu().eval()
    wanted = _sized(reference, host, image_size)
    shown = exhibits(images, wanted)
    with _new_file(file, model) as fresh:
        answer = run_at(reference, host, shown.at(wanted.size)[:1])
        scored = host.gives_scores(reference, answer)
        whose = type(model).__name__
        require_scores(shown.labels, answer, scored=scored, whose=whose)
        names = host.labels(model) if scored else ()
        ship = copy.deepcopy(reference).to(kind)
        folded = fold(ship)
        cell = host.free_size(ship) if dynamic else None
        recipe = current_recipe(sites, plain=Softmax())
        card = Card(
            target=form,
            dtype=str(kind).removeprefix("torch."),
            int8=int8,
            model=whose,
            recipe=recipe.to_dict() if recipe else None,
            labels=one_each(names, answer.shape[-1], whose=whose),
            image=wanted,
            cell=cell,
            versions=_versions(form, model),
            pads=cell is not None and pads(reference, host, wanted.size),
            smallest=smallest(reference, cell) if cell else wanted.size,
        )
        _write(model, Shipped(ship, host), fresh, card, file)
        artifact = _opened(model, fresh, file)
        checks = _compared(reference, host, artifact, shown, file)
        warn_of_blindness(checks, model)
        _require_close(checks, limit, model, file, free=cell is not None)
        labelled = compare_labelled(reference, host, artifact, shown)
        size = fresh.stat().st_size / 1024**2
    return Exported(
        path=file,
        target=form,
        dtype=card.dtype,
        int8=int8,
        cell=cell,
        fixed_because="" if cell else _why_fixed(model, dynamic=dynamic),
        folded=folded,
        checks=checks,
        tolerance=limit,
        labelled=labelled,
        size_mib=size,
        conditions={"versions": card.versions, "photographs": shown.names},
    )


def _sized(
    model: nn.Module, host: Host, image_size: tuple[int, int] | None
) -> ImageInput:
    """Make a model for this native size, in place, and say what images it wants."""
    wanted = host.image_input(model)
    if image_size is None or image_size == wanted.size:
        return wanted
    fed = host.resize(model, image_size)
    if fed != image_size:
        raise ImageSizeError(
            asked=f"export(image_size={image_size[0]}x{image_size[1]})",
            found="that is no whole number of patches",
            why="a native size is what enters the network, and nothing is padded there",
            fix=f"Use image_size=({fed[0]}, {fed[1]}).",
        )
    return replace(wanted, size=image_size)


def _dtype(named: torch.dtype | str) -> torch.dtype:
    name = str(named).removeprefix("torch.")
    if name not in _DTYPES:
        raise InvalidOption(
            asked=f"export(dtype={named!r})",
            found="weights cannot be of that type",
            fix=f"Choose from {', '.join(_DTYPES)}; int8=True stores integers.",
        )
    return _DTYPES[name]


def _limit(tolerance: float | None, dtype: torch.dtype, *, int8: bool) -> float:
    if tolerance is None:
        return INT8_TOLERANCE if int8 else TOLERANCE[dtype]
    if not tolerance > 0:
        raise InvalidOption(
            asked=f"export(tolerance={tolerance!r})",
            found="it is not a positive share of the largest output",
            fix="Use tolerance=1e-4, or leave it out.",
        )
    return float(tolerance)


def _versions(form: Target, model: nn.Module) -> dict[str, str]:
    library = type(model).__module__.partition(".")[0]
    needed = ["manyheads", "torch", "timm", library]
    needed += ["onnx", "onnxscript", "onnxruntime"] if form == "onnx" else []
    found = {}
    for name in needed:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _why_fixed(model: nn.Module, *, dynamic: bool) -> str:
    if not dynamic:
        return "dynamic=False"
    return f"the forward pass of {type(model).__name__} is tied to one size"


def _write(
    model: nn.Module, shipped: Shipped, fresh: Path, card: Card, file: Path
) -> None:
    """Trace and write; a failure of the exporter becomes a refusal with its words."""
    # Neither the batch nor a side may be 1 or equal another: both would be frozen.
    height, width = card.image.size
    if card.cell is not None:
        width += card.cell[1]
    example = torch.randn(
        2, card.image.channels, height, width, dtype=getattr(torch, card.dtype)
    )
    try:
        write(trace(shipped, example, card.cell, card.target), fresh, card)
    except (ManyheadsError, MemoryError, OSError):
        raise
    except Exception as error:
        raise _refusal(
            model,
            file,
            f"the exporter fails: {type(error).__name__}: {error!s:.400}",
            fix="Try another target, or dynamic=False.",
        ) from error


def _opened(model: nn.Module, fresh: Path, file: Path) -> Artifact:
    try:
        return open_artifact(fresh)
    except DataError as error:
        raise _refusal(
            model,
            file,
            f"what was written cannot be opened again: {error.found}",
            fix="Try another target or dtype.",
        ) from error


def _compared(
    model: nn.Module, host: Host, artifact: Artifact, shown: Exhibits, file: Path
) -> tuple[Check, ...]:
    """Run both; a file that does not run at all is refused with its words."""
    try:
        return tuple(compare(model, host, artifact, shown))
    except DataError as error:
        raise _refusal(
            model,
            file,
            f"what was written does not run: {error.asked}, {error.found}",
            fix="Try dynamic=False, or another target.",
        ) from error


def _require_close(
    checks: tuple[Check, ...], limit: float, model: nn.Module, file: Path, *, free: bool
) -> None:
    wrong = [check for check in checks if not check.difference <= limit]
    if wrong:
        told = "; ".join(
            f"by {check.difference:.2g} at {check.image_size[0]}x{check.image_size[1]}"
            for check in wrong
        )
        raise _refusal(
            model,
            file,
            "the written file's outputs differ from the model's, as a share of the "
            f"largest: {told}; {limit:.2g} is allowed. The file was removed",
            fix=f"Try {'dynamic=False, ' if free else ''}another target or dtype, or "
            "allow more with tolerance=.",
        )


@contextmanager
def _new_file(target: Path, model: nn.Module) -> Iterator[Path]:
    """Give a file to fill beside the target; move it there only if that went well."""
    if target.is_dir():
        raise _refusal(model, target, "a folder is there", fix="Name a file.")
    try:
        # Before any work is done: a path that cannot be written is known now.
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(target) as fresh:
            yield fresh
    except OSError as error:
        raise _refusal(
            model,
            target,
            f"it cannot be written: {error}",
            fix="Choose a folder that you may write to, on a disk with room.",
        ) from error


def _refusal(model: nn.Module, file: Path, found: str, *, fix: str) -> NotExportable:
    return NotExportable(
        asked=f"exporting {type(model).__name__} to {file}",
        found=found,
        why="an export that answers something else is worse than none",
        fix=fix,
    )
