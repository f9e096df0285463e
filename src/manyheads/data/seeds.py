"""Seeds: one made out of several, and randomness that is a function of one.

timm draws from Python's and NumPy's global generators, torchvision from torch's. All
three are seeded for the length of one call and given back as they were.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["mix", "seeded"]


def mix(*parts: int | str) -> int:
    """Make one seed out of several numbers and names, all of which matter."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed what draws on the CPU in here; generators of other devices stay alone."""
    torch_cpu = torch.default_generator
    before = random.getstate(), np.random.get_state(), torch_cpu.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch_cpu.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch_cpu.set_state(before[2])
