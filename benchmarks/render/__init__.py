"""Turns records into Markdown; a new kind of record is one more line in `RENDERERS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.render.cells import Record
from benchmarks.render.core import render_core
from benchmarks.render.demo import render_demo
from benchmarks.render.exported import render_exported
from benchmarks.render.layer import render_layer
from benchmarks.render.model import render_models
from benchmarks.render.scaling import render_scaling
from benchmarks.render.targets import target_lines
from benchmarks.render.wide import render_wide

__all__ = ["RENDERERS", "render"]

# How a record is shown, by its kind; the demo's has a format of its own.
RENDERERS: dict[str, Callable[[Record], str]] = {
    "core": render_core,
    "wide": render_wide,
    "layer": render_layer,
    "model": render_models,
    "scaling": render_scaling,
    "exported": render_exported,
    "demo": render_demo,
}


def render(records: Sequence[Record]) -> str:
    """Give the Markdown of some records, one table for each, its targets below."""
    if not records:
        return "Not recorded yet."
    return "\n\n".join(
        part
        for record in records
        for part in (RENDERERS[_kind(record)](record), *_targets(record))
    )


def _targets(record: Record) -> list[str]:
    return target_lines(record) if "case" in record else []


def _kind(record: Record) -> str:
    return "demo" if record["format"] == "manyheads.demo" else str(record["kind"])
