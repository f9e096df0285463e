"""Image sources: a folder, a dataset, tensors, or the digits of scikit-learn."""

from manyheads.data.bundled import Digits, digits
from manyheads.data.source import Batch, Images, ImageSource, image_source, mix

__all__ = [
    "Batch",
    "Digits",
    "ImageSource",
    "Images",
    "digits",
    "image_source",
    "mix",
]
