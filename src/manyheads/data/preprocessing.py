"""From a picture or a tensor to what the model is fed, fixed or augmented.

An augmented image is a function of its seed, so that a run that starts again, or that
another process shares, sees the same images.
"""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from manyheads.data.augmentation import Augmentation
from manyheads.data.photographs import frame, normalise
from manyheads.data.seeds import seeded
from manyheads.hosts import ImageInput

__all__ = ["Preprocessing"]


class Preprocessing:
    """The model's own preprocessing of evaluation, or an augmented one.

    Args:
        wanted: What the model's library recorded.
    """

    def __init__(self, wanted: ImageInput) -> None:
        self.wanted = wanted

    def picture(
        self, picture: Image.Image, seed: int | None, augmentation: Augmentation
    ) -> Tensor:
        """Make the tensor; with a seed, always the same augmented one."""
        if seed is None:
            return normalise(frame(picture, self.wanted), self.wanted)
        from manyheads.data.changes import for_pictures

        change, finish = for_pictures(self.wanted, augmentation)
        if augmentation.crop_area is None:
            picture = frame(picture, self.wanted)
        with seeded(seed):
            ready: Tensor = finish(normalise(change(picture), self.wanted))
        return ready

    def tensor(
        self, image: Tensor, seed: int | None, augmentation: Augmentation
    ) -> Tensor:
        """Give a preprocessed image, augmented at its own size if there is a seed."""
        if seed is None or image.ndim != 3 or not image.is_floating_point():
            return image  # whoever stacks it says what is wrong
        from manyheads.data.changes import for_tensors

        size = (image.shape[1], image.shape[2])
        change, finish = for_tensors(size, self.wanted.interpolation, augmentation)
        with seeded(seed):
            ready: Tensor = finish(change(image).clone())
        return ready
