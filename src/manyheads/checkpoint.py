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
from manyheads.hosts import find_host, host_named
from manyheads.recipe import Recipe
from manyheads.surgery import apply_swaps, blank_copy, current_recipe, plan_swaps

__all__ = ["load", "save"]

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
    if target.exists() and not (target / CARD).is_file():
        raise CheckpointError(
            asked=f"saving to {target}",
            found="something that is no manyheads checkpoint is there",
            why="nothing of yours is overwritten",
            fix="Choose a new folder name.",
        )
    host, sites = find_host(model)
    recipe = current_recipe(sites, plain=Softmax())
    card = {
        "format": FORMAT,
        "version": VERSION,
        "host": host.name,
        "model": host.describe(model),
        "recipe": recipe.to_dict() if recipe else None,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    with _new_folder(target) as folder:
        save_model(model, str(folder / WEIGHTS), metadata={"format": "pt"})
        card["sha256"] = _digest(folder / WEIGHTS)
        (folder / CARD).write_text(json.dumps(card, indent=2), encoding="utf-8")
        for name, text in host.extra_files(model).items():
            (folder / name).write_text(text, encoding="utf-8")
        _require_equal(model, load(folder), target)
    return target


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
    with torch.random.fork_rng(devices=[]):
        skeleton = host.rebuild(card["model"]).to(_dtype(card, folder))
    model = blank_copy(skeleton)
    try:
        if card["recipe"] is not None:
            recipe = Recipe.from_dict(card["recipe"], where=str(folder / CARD))
            apply_swaps(model, host, plan_swaps(model, host.sites(model), recipe))
        state = load_file(weights)
        _restore_shared(model, state)
        model.load_state_dict(state, strict=True, assign=True)
        _restore_buffers(model, skeleton)
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
    if set(card) != fields or not isinstance(card["model"], dict):
        odd = sorted(set(card) ^ fields) or ["model"]
        raise _damaged(folder, f"{CARD} has wrong or missing fields: {', '.join(odd)}")
    return card


def _dtype(card: dict[str, Any], folder: Path) -> torch.dtype:
    known = {
        "float64": torch.float64,
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    if card["dtype"] not in known:
        raise _damaged(folder, f"it names the unknown type {card['dtype']!r}")
    return known[card["dtype"]]


def _restore_shared(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Add the second names of tensors that the model holds twice, stored once."""
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        original = first.setdefault(id(tensor), name)
        if name not in state and original in state:
            state[name] = state[original]
        elif original not in state and name in state:
            state[original] = state[name]


def _restore_buffers(model: nn.Module, skeleton: nn.Module) -> None:
    """Bring back buffers that no state dict holds from the freshly built model."""
    built = dict(skeleton.named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.device.type == "meta":
            parent_path, _, leaf = name.rpartition(".")
            model.get_submodule(parent_path)._buffers[leaf] = built[name].clone()


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
    if differing:
        raise CheckpointError(
            asked=f"saving to {target}",
            found=f"{len(differing)} tensors come back different, "
            f"{sorted(differing)[0]!r} first",
            why="the model was changed after its library built it",
            fix="Build it with the final arguments through the library's factory.",
        )


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _damaged(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(
        asked=f"loading {folder}", found=found, where=str(folder / CARD), fix=_RESAVE
    )
