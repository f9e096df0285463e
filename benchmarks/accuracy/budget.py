"""Compute of training and healing, in multiply-adds, so that budgets can be compared.

    forward pass     what `cost` counts for one image
    training step    3 forward passes an image: the backward pass counts two
    healing step     1 forward pass of the teacher and 3 of the student an image

The block stage of healing runs the student's converted blocks alone; it is counted as
if it ran the whole student, so healing never does more than is counted. The forward
passes of a refit are counted too; its matrix products are few beside them. Measuring
on held-out images counts nothing, in either.
"""

from __future__ import annotations

from torch import nn

from manyheads import cost

__all__ = ["REFIT_PASSES", "healing_work", "images_within", "training_work"]

# A refit runs both models up to each of six blocks, and every block four times more:
# below eight forward passes an image, which is what is counted.
REFIT_PASSES = 8


def training_work(model: nn.Module, images: int) -> int:
    """Count training on this many images, each seen once."""
    return 3 * cost(model).flops * images


def healing_work(
    student: nn.Module, teacher: nn.Module, images: int, looked_at: int = 0
) -> int:
    """Count healing steps on this many images, and images both models only look at."""
    taught, learned = cost(teacher).flops, cost(student).flops
    return (taught + 3 * learned) * images + (taught + learned) * looked_at


def images_within(
    student: nn.Module, teacher: nn.Module, work: float, passes: int, looked_at: int
) -> int:
    """Say on how many images healing of so many passes stays within this work."""
    left = work - healing_work(student, teacher, 0, looked_at)
    return int(left // (passes * healing_work(student, teacher, 1)))
