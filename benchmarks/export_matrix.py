"""Tries every mechanism in every host family on every export target, and tabulates.

    python -m benchmarks.export_matrix --targets pt2 onnx
    python -m benchmarks.export_matrix --table

Each cell is one real export of a tiny model with random weights, verified like any
other. What is found goes to ``docs/export_matrix.json`` cell by cell with the date, the
code and the versions, so that a run may be cut and continued; a cell that is deleted
there is tried again. The table in ``docs/export.md`` is generated from it.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import timm
import torch
import torchvision
import transformers
from torch import nn

import manyheads as mh
import manyheads.backbones
from manyheads.artifacts import Target
from manyheads.attention import MECHANISMS, AttentionSpec
from manyheads.errors import ManyheadsError, NotExportable
from manyheads.gauges.machine import conditions

__all__ = ["FAMILIES", "SPECS", "awaken", "export_cell", "main", "table"]

DOCS = Path(__file__).parent.parent / "docs"
RECORD, PAGE = DOCS / "export_matrix.json", DOCS / "export.md"
_BLOCK = re.compile(r"(<!-- export-matrix -->\n).*?(<!-- end -->)", re.S)

SPECS: dict[str, AttentionSpec] = {
    kind.__name__: mh.Interactive(landmarks=(2, 2))
    if kind is mh.Interactive
    else kind()
    for kind in MECHANISMS
}
_VIT: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 7,
}


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = timm.create_model(name, **arguments)
        return model

    return make


def _torchvision() -> nn.Module:
    vit: type[nn.Module] = torchvision.models.VisionTransformer
    return vit(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=48,
        mlp_dim=96,
        num_classes=7,
    )


def _hugging_face(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        kind = getattr(transformers, name)
        model: nn.Module = kind(
            kind.config_class(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=32,
                patch_size=8,
            )
        )
        return model

    return make


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "timm ViT, DeiT": _timm("vit_tiny_patch16_224", **_VIT),
    "timm DINOv3": _timm("vit_small_patch16_dinov3", **_VIT | {"embed_dim": 96}),
    "timm PVT v2": _timm(
        "pvt_v2_b0",
        depths=(1, 1, 1, 1),
        embed_dims=(8, 16, 24, 32),
        num_heads=(1, 2, 3, 4),
        num_classes=7,
    ),
    "timm Next-ViT": _timm("nextvit_small", depths=(1, 1, 5, 1), num_classes=7),
    "iViT (ours)": _timm(
        "ivit_tiny", dims=(8, 16, 32, 64), depths=(1, 1, 2, 1), num_classes=7
    ),
    "transformers ViT": _hugging_face("ViTForImageClassification"),
    "transformers DINOv2": _hugging_face("Dinov2Model"),
    "transformers SigLIP": _hugging_face("SiglipVisionModel"),
    "torchvision ViT": _torchvision,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the record for the wanted targets, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="*", default=[], choices=get_args(Target))
    parser.add_argument("--table", action="store_true", help="Write the table only.")
    wanted = parser.parse_args(arguments)
    found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for target in wanted.targets:
        for family in FAMILIES:
            for name in SPECS:
                key = f"{family} | {name} | {target}"
                if key not in found:
                    found[key] = export_cell(family, name, target) | {"with": _with()}
                    RECORD.write_text(json.dumps(found, indent=1) + "\n")
                    print(key, found[key], flush=True)
    text = PAGE.read_text(encoding="utf-8")
    fresh = _BLOCK.sub(lambda m: m[1] + table(found) + m[2], text)
    PAGE.write_text(fresh, encoding="utf-8")


def table(found: dict[str, dict[str, Any]]) -> str:
    """Write the cells as one Markdown table, with the reasons for less below."""
    targets = [t for t in get_args(Target) if any(k.endswith(f"| {t}") for k in found)]
    columns = [(name, target) for name in SPECS for target in targets]
    lines = [
        "| host family | " + " | ".join(f"{n} {t}" for n, t in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    reasons: list[str] = []
    for family in FAMILIES:
        cells = []
        for name, target in columns:
            cell = found.get(f"{family} | {name} | {target}")
            if cell and _reason(cell) and _reason(cell) not in reasons:
                reasons.append(_reason(cell))
            cells.append(_shown(cell, reasons))
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", *notes]) + "\n"


def _reason(cell: dict[str, Any]) -> str:
    """Give why there is no file, or none that takes any size; empty if there is."""
    return str(cell["refused"] or cell["not_at_any_size"])


def _shown(cell: dict[str, Any] | None, reasons: list[str]) -> str:
    if cell is None:
        return "not run"
    note = f" ({reasons.index(_reason(cell)) + 1})" if _reason(cell) else ""
    if cell["refused"]:
        return f"no{note}"
    return "any size" if cell["cell"] else f"native size{note}"


def export_cell(family: str, name: str, target: Target) -> dict[str, Any]:
    """Export one mechanism in one family to one target, and say what came of it."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        ending = "onnx" if target == "onnx" else "pt2"
        try:
            model = awaken(FAMILIES[family]()).eval()
            if name != "Softmax":
                recipe = mh.Recipe(mh.Swap(attention=SPECS[name]))
                model = mh.convert(model, recipe)
            path = Path(folder) / f"m.{ending}"
            try:
                done, only = mh.export(model, path, target=target), ""
            except NotExportable as error:
                only = _told(error, folder)
                done = mh.export(model, path, target=target, dynamic=False)
        except ManyheadsError as error:
            return {"refused": _told(error, folder), "cell": None}
    return {
        "refused": "",
        "not_at_any_size": only,
        "cell": done.cell,
        "difference": max(check.difference for check in done.checks),
    }


def awaken(model: nn.Module) -> nn.Module:
    """Draw every parameter anew, so that every part of the model shows in its outputs.

    Libraries start some classifiers at zero, layer scales at 1e-5, and queries so small
    that all maps are flat: an exported file could then have any attention at all.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3:  # Tokens and position embeddings.
                parameter.normal_(std=0.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


def _with() -> dict[str, Any]:
    """Say when and with what a cell was tried."""
    here = conditions(torch.device("cpu"), torch.float32)
    told = {name: here[name] for name in ("date", "git", "system", "python")}
    packages = ("torch", "timm", "transformers", "torchvision", "onnx", "onnxruntime")
    return told | {name: version(name) for name in packages}


def _told(error: ManyheadsError, folder: str) -> str:
    words = f"{type(error).__name__}: {error.found}".replace(folder, "").split()
    # The first block's reason is everyone's.
    return " ".join(words).partition(" (at ")[0][:240]


if __name__ == "__main__":
    main()
