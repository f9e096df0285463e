"""Turns records into Markdown; a new kind of record is one more line in `RENDERERS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.render.cells import Record
from benchmarks.render.core import render_core
from benchmarks.render.demo import render_demo
from benchmarks.render.layer import render_layer
from benchmarks.render.model import render_models

__all__ = ["RENDERERS", "render"]

# How a record is shown, by its kind; the demo's has a format of its own.
RENDERERS: dict[str, Callable[[Record], str]] = {
    "core": render_core,
    "layer": render_layer,
    "model": render_models,
    "demo": render_demo,
}


def render(records: Sequence[Record]) -> str:
    """Give the Markdown of some records, one table for each."""
    if not records:
        return "Not recorded yet."
    return "\n\n".join(RENDERERS[_kind(record)](record) for record in records)


def _kind(record: Record) -> str:
    return "demo" if record["format"] == "manyheads.demo" else str(record["kind"])
