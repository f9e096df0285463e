"""Exported files: writing each form, opening it again, comparing it to its model."""

from manyheads.artifacts.files import Artifact, Card, Target, open_artifact

__all__ = ["Artifact", "Card", "Target", "open_artifact"]
