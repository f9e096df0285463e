"""What transformers' image processors say about the images a model wants."""

from __future__ import annotations

from typing import Any

from manyheads.hosts.base import CropMode, ImageInput
from manyheads.hosts.hf_names import STATISTICS

__all__ = ["PROCESSOR_FILE", "input_of", "processor_of"]

PROCESSOR_FILE = "preprocessor_config.json"
# Families whose processors scale the shorter side; those of all others stretch.
_COVERING = ("clip", "clip_vision_model", "dinov2", "dinov2_with_registers")
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def input_of(model: Any, root: Any, size: tuple[int, int]) -> ImageInput:
    """Read the image processor; without one, the family's usual statistics."""
    processor = processor_of(model) or {}
    mean, std = STATISTICS.get(root.config.model_type, STATISTICS["vit"])
    if processor.get("do_normalize", True):
        mean = tuple(processor.get("image_mean") or mean)
        std = tuple(processor.get("image_std") or std)
    else:
        mean, std = (0.0,) * 3, (1.0,) * 3
    channels = root.config.num_channels
    crop, mode = _framing(processor, root.config.model_type)
    return ImageInput(
        channels=channels,
        size=size,
        mean=mean if len(mean) == channels else (sum(mean) / len(mean),) * channels,
        std=std if len(std) == channels else (sum(std) / len(std),) * channels,
        interpolation=_RESAMPLING.get(processor.get("resample", 3), "bicubic"),
        crop=crop,
        crop_mode=mode,
    )


def processor_of(model: Any) -> dict[str, Any] | None:
    """Find the image processor's settings where the model came from; no network."""
    known: dict[str, Any] | None = getattr(model, "manyheads_processor", None)
    source = getattr(model.config, "_name_or_path", "")
    if known is not None or not source:
        return known
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(
            source, local_files_only=True
        )
    except OSError:
        return None
    return dict(found)


def _framing(processor: dict[str, Any], model_type: str) -> tuple[float, CropMode]:
    """Read which share a crop keeps, and whether pictures are stretched before it."""
    size = processor.get("size") or {}
    if isinstance(size, int):
        size = {"height": size, "width": size}
    stretched = "height" in size if size else model_type not in _COVERING
    mode: CropMode = "squash" if stretched else "center"
    crop = processor.get("crop_size")
    if not processor.get("do_center_crop") or not isinstance(crop, dict):
        return 1.0, mode
    scaled = size.get("shortest_edge") or size.get("height")
    return float(crop["height"] / scaled) if scaled else 1.0, mode
