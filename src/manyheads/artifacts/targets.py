"""The forms a model can be exported to: tracing it, and writing each of them.

Compact branches are folded before anything is traced, by the convention of timm's
`reparameterize_model`: a module with a `fuse()` method is replaced by what it returns.
Hydra traces as plain operators, so that no file needs this package to run.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from manyheads.artifacts.files import CARD, INPUT, Card, Target, quiet, require
from manyheads.errors import InvalidOption, nearest
from manyheads.geometry import Grid
from manyheads.hosts import Host
from manyheads.kernels.tracing import tracing_for_onnx

__all__ = ["Shipped", "fold", "problem", "target_for", "trace", "write"]

_ONNX_LIMIT = 2 * 1024**3
_MOST_CELLS, _MOST_IMAGES = 4096, 4096


@runtime_checkable
class Foldable(Protocol):
    """A module that can give a simpler one of the same output in evaluation."""

    def fuse(self) -> nn.Module:
        """Give the simpler module."""


class Shipped(nn.Module):
    """A model as the exporters see it: one tensor in, one tensor out."""

    def __init__(self, model: nn.Module, host: Host) -> None:
        super().__init__()
        self.model = model
        self._pick, self._feed = host.output, host.feed

    def forward(self, images: Tensor) -> Tensor:
        """Run the part that looks at images and pick the tensor it is judged by."""
        return self._pick(self._feed(self.model, images))


def target_for(path: Path, target: Target | None) -> Target:
    """Read the target off the file's ending, or check that both agree.

    Raises:
        InvalidOption: The target is unknown, or the ending is another one's.
    """
    endings: dict[str, Target] = {".pt2": "pt2", ".onnx": "onnx"}
    if target is not None and target not in get_args(Target):
        raise InvalidOption(
            asked=f"export(target={target!r})",
            found="there is no such target",
            fix=nearest(str(target), get_args(Target)),
        )
    wanted = ".onnx" if target == "onnx" else ".pt2"
    if path.suffix not in endings or (target is not None and path.suffix != wanted):
        raise InvalidOption(
            asked=f"exporting to {path.name}" + (f" as {target!r}" if target else ""),
            found=f"the ending {path.suffix!r} does not name that form",
            fix='Use model.pt2 (torch.export; with target="aoti" compiled ahead of '
            "time) or model.onnx.",
        )
    return target or endings[path.suffix]


def problem(
    model: nn.Module, target: Target, dtype: torch.dtype, *, int8: bool
) -> str | None:
    """Say in one clause why this form cannot hold the model, or None if it can."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.device.type == "meta" for tensor in tensors):
        return "the model is on the meta device and has no weights"
    if target != "onnx":
        return f"int8 is offered for onnx, not for {target!r}" if int8 else None
    if dtype not in (torch.float32, torch.float16):
        return (
            f"onnxruntime's CPU kernels compute in float32 and float16, not in {dtype}"
        )
    if int8 and dtype is not torch.float32:
        return f"int8 starts from float32 weights, not from {dtype}"
    size = sum(tensor.numel() * dtype.itemsize for tensor in tensors)
    if size >= _ONNX_LIMIT:
        return f"one ONNX file holds 2 GiB and the weights take {size / 1024**3:.1f}"
    return None


def fold(model: nn.Module) -> int:
    """Replace every foldable module in place, and say how many there were.

    A compact layer without branches gives itself and is none.
    """
    folded = 0
    for name, child in list(model.named_children()):
        if not isinstance(child, Foldable):
            folded += fold(child)
        elif (plain := child.fuse()) is not child:
            model.register_module(name, plain.train(child.training))
            folded += 1
    return folded


def trace(
    shipped: Shipped, example: Tensor, cell: Grid | None, target: Target
) -> ExportedProgram:
    """Trace with any batch size, and any image size of whole cells if there are any.

    Whatever the tracer raises comes through: its own words are the reason.
    """
    told = tracing_for_onnx() if target == "onnx" else nullcontext()
    with quiet(), torch.no_grad(), told:
        return torch.export.export(
            shipped, (example,), dynamic_shapes=(_axes(cell),), strict=False
        )


def _axes(cell: Grid | None) -> dict[int, Any]:
    axes: dict[int, Any] = {0: Dim("batch", max=_MOST_IMAGES)}
    if cell is not None:
        axes[2] = cell[0] * Dim("rows", max=_MOST_CELLS)
        axes[3] = cell[1] * Dim("columns", max=_MOST_CELLS)
    return axes


def write(program: ExportedProgram, path: Path, card: Card) -> None:
    """Write one form; whatever its writer raises comes through."""
    with quiet(), _hushed():
        if card.target == "onnx":
            _write_onnx(program, path, card)
            return
        # In memory first: torch's archive ends the process where a disk is full.
        whole = io.BytesIO()
        if card.target == "pt2":
            torch.export.save(program, whole, extra_files={CARD: card.to_json()})
        else:
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=whole,
                inductor_configs={"aot_inductor.metadata": {CARD: card.to_json()}},
            )
        path.write_bytes(whole.getbuffer())


def _write_onnx(program: ExportedProgram, path: Path, card: Card) -> None:
    onnx = require("onnx", purpose="exporting to ONNX", extra="export")
    require("onnxscript", purpose="exporting to ONNX", extra="export")
    converted: Any = torch.onnx.export(
        program,
        dynamo=True,
        input_names=[INPUT],
        output_names=["outputs"],
        dynamic_shapes=(_axes(card.cell),),
        verbose=False,
    )
    written = converted.model_proto
    if card.int8:
        written = _quantised(onnx, written, path)
    onnx.helper.set_model_props(written, {CARD: card.to_json()})
    onnx.save(written, path)


def _quantised(onnx: Any, written: Any, path: Path) -> Any:
    """Store matrices as eight-bit integers; activations are scaled as they come."""
    quantization = require(
        "onnxruntime.quantization", purpose="int8 export", extra="export"
    )
    # The exporter's shapes clash with those that the quantiser infers.
    del written.graph.value_info[:]
    onnx.save(written, path)
    quantization.quantize_dynamic(
        str(path),
        str(path),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
    )
    return onnx.load(path)


@contextmanager
def _hushed() -> Iterator[None]:
    """Silence what the exporters log below an error while they work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
