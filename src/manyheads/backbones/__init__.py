"""Backbones of our own; importing this registers them with timm.

import manyheads.backbones
model = timm.create_model("ivit_tiny", num_classes=10)
"""

from manyheads.backbones.ivit import IVit, ivit_base, ivit_small, ivit_tiny

__all__ = ["IVit", "ivit_base", "ivit_small", "ivit_tiny"]
