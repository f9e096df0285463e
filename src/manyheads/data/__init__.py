"""Image sources: folders, tables, archives, the hub, tensors, or embedded digits."""

from manyheads.data.augmentation import Augmentation
from manyheads.data.bundled import Digits, digits
from manyheads.data.opening import Images, image_source
from manyheads.data.seeds import mix
from manyheads.data.source import Batch, ImageSource
from manyheads.data.tables import Table

__all__ = [
    "Augmentation",
    "Batch",
    "Digits",
    "ImageSource",
    "Images",
    "Table",
    "digits",
    "image_source",
    "mix",
]
