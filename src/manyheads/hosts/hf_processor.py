"""What transformers' image processors say about the images a model wants."""

from __future__ import annotations

from typing import Any

from manyheads.hosts.base import ImageInput
from manyheads.hosts.hf_names import STATISTICS

__all__ = ["PROCESSOR_FILE", "input_of", "processor_of"]

PROCESSOR_FILE = "preprocessor_config.json"
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
    return ImageInput(
        channels=channels,
        size=size,
        mean=mean if len(mean) == channels else (sum(mean) / len(mean),) * channels,
        std=std if len(std) == channels else (sum(std) / len(std),) * channels,
        interpolation=_RESAMPLING.get(processor.get("resample", 3), "bicubic"),
        crop=_crop_share(processor),
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


def _crop_share(processor: dict[str, Any]) -> float:
    crop, size = processor.get("crop_size"), processor.get("size")
    if not processor.get("do_center_crop") or not isinstance(crop, dict):
        return 1.0
    shortest = (size or {}).get("shortest_edge") or (size or {}).get("height")
    return float(crop["height"] / shortest) if shortest else 1.0
