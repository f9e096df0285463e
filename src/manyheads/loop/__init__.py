"""The one optimisation loop of healing and training, and what a run is made of."""

from manyheads.loop.logs import progress_bar
from manyheads.loop.run import Run
from manyheads.loop.stages import RunOptions, Stage, StageRecord

__all__ = ["Run", "RunOptions", "Stage", "StageRecord", "progress_bar"]
