"""Saves and loads models as data: a folder with a JSON file and a safetensors file.

    student/manyheads.json        format, version, how to build the model, the recipe
    student/model.safetensors     the weights

Loading runs nobody's code: the model is built by its library from a registered name
and plain arguments, the recipe is read strictly, and the weights are tensors. A folder
is written beside its final place and moved there when it is whole and has been read
back; whatever goes wrong before leaves what was there untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import nn

from manyheads.attention import Softmax
from manyheads.errors import CheckpointError, ManyheadsError
from manyheads.hosts import Host, find_host, host_named
from manyheads.recipe import Recipe
from manyheads.surgery import apply_swaps, blank_copy, current_recipe, plan_swaps

__all__ = ["load", "require_free", "save"]

FORMAT = "manyheads.checkpoint"
VERSION = 1
CARD, WEIGHTS = "manyheads.json", "model.safetensors"
_RESAVE = "Write checkpoints with manyheads.save(model, folder)."


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a model, converted or not, so that `load` gives it back.

    The written folder is read back before it takes its place: what cannot be loaded
    again with the same tensors is never left behind.

    Args:
        model: A hosted model built through its library's factory.
        path: The folder to write. A manyheads checkpoint there is replaced; anything
            else is refused.

    Returns:
        The folder.

    Raises:
        UnknownHost: No host knows the model.
        CheckpointError: The model was not built through its library's factory, the
            folder holds something else, or it cannot be written.
    """
    target = Path(path)
    require_free(target)
    host, sites = find_host(model)
    recipe = current_recipe(sites, plain=Softmax())
    card = {
        "format": FORMAT,
        "version": VERSION,
        "host": host.name,
        "model": host.describe(model),
        "recipe": recipe.to_dict() if recipe else None,
        "dtype": _name(next(model.parameters()).dtype),
    }
    buffers = _of_other_types(model, next(model.parameters()).dtype)
    if buffers:
        card["buffers"] = buffers
    with _new_folder(target) as folder:
        save_model(model, str(folder / WEIGHTS), metadata={"format": "pt"})
        card["sha256"] = _digest(folder / WEIGHTS)
        (folder / CARD).write_text(json.dumps(card, indent=2), encoding="utf-8")
        for name, text in host.extra_files(model).items():
            (folder / name).write_text(text, encoding="utf-8")
        _require_equal(model, load(folder), target)
    return target


def require_free(target: Path) -> None:
    """See that a model can be written there, before long work is done for it.

    Raises:
        CheckpointError: Something else is there, or no folder can be made there.
    """
    if target.exists() and not (target / CARD).is_file():
        raise CheckpointError(
            asked=f"saving to {target}",
            found="something that is no manyheads checkpoint is there",
            why="nothing of yours is overwritten",
            fix="Choose a new folder name.",
        )
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        found = "you may not write to it" if above.is_dir() else "it is a file"
        raise CheckpointError(
            asked=f"saving to {target}",
            found=found,
            where=str(above),
            fix="Choose a folder that you may write to.",
        )


def load(path: str | Path) -> nn.Module:
    """Read what `save` wrote, in evaluation mode, on the CPU.

    Args:
        path: The folder.

    Raises:
        CheckpointError: The folder is missing, cut short, altered, of another format
            or version, or asks for something that a checkpoint may not ask for.
    """
    folder = Path(path)
    card = _read_card(folder)
    host = host_named(card["host"])
    if host is None:
        raise _damaged(folder, f"it names the unknown library {card['host']!r}")
    weights = folder / WEIGHTS
    if not weights.is_file() or _digest(weights) != card["sha256"]:
        raise _damaged(folder, f"{WEIGHTS} is missing, cut short or altered")
    skeleton = _skeleton(host, card, folder)
    model = blank_copy(skeleton, keep=_unwritten(skeleton).values())
    try:
        if card["recipe"] is not None:
            recipe = Recipe.from_dict(card["recipe"], where=str(folder / CARD))
            apply_swaps(model, host, plan_swaps(model, host.sites(model), recipe))
        state = load_file(weights)
        _restore_shared(model, state)
        model.load_state_dict(state, strict=True, assign=True)
    except (SafetensorError, RuntimeError, ManyheadsError) as error:
        raise _damaged(folder, f"its parts do not fit: {error}") from error
    return model.eval()


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill; move it to its place only if that went well."""
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        fresh = scratch / "new"
        fresh.mkdir()
        yield fresh
        for file in fresh.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            target.rename(scratch / "old")
        fresh.rename(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            asked=f"saving to {target}",
            found=f"it cannot be written: {error}",
            fix="Free space or choose another folder; what was there is as it was.",
        ) from error
    finally:
        if scratch is not None:
            if (scratch / "old").exists() and not target.exists():
                (scratch / "old").rename(target)
            shutil.rmtree(scratch, ignore_errors=True)


def _read_card(folder: Path) -> dict[str, Any]:
    """Read the JSON file and check its form before anything is built."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{CARD} cannot be read: {error}") from error
    fields = {"format", "version", "host", "model", "recipe", "dtype", "sha256"}
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise _damaged(folder, f"{CARD} is not of the format {FORMAT!r}")
    if card.get("version") != VERSION:
        raise _damaged(
            folder, f"it is version {card.get('version')!r}, this reads {VERSION}"
        )
    fields |= card.keys() & {"buffers"}
    dictionaries = card.get("model"), card.get("buffers", {})
    if set(card) != fields or not all(isinstance(d, dict) for d in dictionaries):
        odd = sorted(set(card) ^ fields) or ["model or buffers"]
        raise _damaged(folder, f"{CARD} has wrong or missing fields: {', '.join(odd)}")
    return card


def _skeleton(host: Host, card: dict[str, Any], folder: Path) -> nn.Module:
    """Build the model that the card describes, with its buffers of the right types."""
    with torch.random.fork_rng(devices=[]):
        model = host.rebuild(card["model"])
    built = dict(model.named_buffers())
    model.to(_dtype(card["dtype"], folder))
    for name, kind in card.get("buffers", {}).items():
        if name not in built:
            raise _damaged(folder, f"it names the unknown buffer {name!r}")
        parent_path, _, leaf = name.rpartition(".")
        wanted = built[name].to(_dtype(kind, folder))
        model.get_submodule(parent_path)._buffers[leaf] = wanted
    return model


def _unwritten(model: nn.Module) -> dict[str, torch.Tensor]:
    """List the buffers that no state dict holds: the library computes them."""
    written = model.state_dict().keys()
    return {n: b for n, b in model.named_buffers() if n not in written}


def _of_other_types(model: nn.Module, usual: torch.dtype) -> dict[str, str]:
    """Name the types of computed buffers that did not follow the parameters.

    `from_pretrained(dtype=torch.bfloat16)` leaves the frequencies of a rotation wide;
    `model.bfloat16()` narrows them. Either must come back as it was.
    """
    return {
        name: _name(buffer.dtype)
        for name, buffer in _unwritten(model).items()
        if buffer.is_floating_point() and buffer.dtype != usual
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: object, folder: Path) -> torch.dtype:
    known = {
        "float64": torch.float64,
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    if not isinstance(name, str) or name not in known:
        raise _damaged(folder, f"it names the unknown type {name!r}")
    return known[name]


def _restore_shared(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Add the second names of tensors that the model holds twice, stored once."""
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        original = first.setdefault(id(tensor), name)
        if name not in state and original in state:
            state[name] = state[original]
        elif original not in state and name in state:
            state[original] = state[name]


def _require_equal(model: nn.Module, again: nn.Module, target: Path) -> None:
    """Refuse to keep a checkpoint whose tensors differ from the model's."""
    ours, theirs = model.state_dict(), again.state_dict()
    differing = [
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours
        or name not in theirs
        or not torch.equal(ours[name].cpu().nan_to_num(), theirs[name].nan_to_num())
    ]
    differing += _other_buffers(_unwritten(model), _unwritten(again))
    if differing:
        raise CheckpointError(
            asked=f"saving to {target}",
            found=f"{len(differing)} tensors come back different, "
            f"{sorted(differing)[0]!r} first",
            why="the model was changed after its library built it",
            fix="Build it with the final arguments through the library's factory.",
        )


def _other_buffers(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> list[str]:
    """Name computed buffers that differ by more than another device's arithmetic."""
    differing = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        one, two = ours[name].cpu(), theirs[name]
        alike = one.dtype == two.dtype and one.shape == two.shape
        limit = 2e-2 if one.element_size() == 2 else 1e-3
        one, two = one.double(), two.double()
        if not alike or not torch.allclose(
            one, two, rtol=limit, atol=limit, equal_nan=True
        ):
            differing.append(name)
    return differing


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _damaged(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(
        asked=f"loading {folder}", found=found, where=str(folder / CARD), fix=_RESAVE
    )
