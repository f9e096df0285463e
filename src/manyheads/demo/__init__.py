"""The main job end to end on handwritten digits, what it found, and its picture."""

from manyheads.demo.findings import Demo, DemoRow, LargeRow
from manyheads.demo.run import demo

__all__ = ["Demo", "DemoRow", "LargeRow", "demo"]
