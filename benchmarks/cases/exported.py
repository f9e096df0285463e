"""The case of exported files: what is saved must still be saved in another runtime."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.kinds import Entry, ExportedCase
from benchmarks.targets import Target
from manyheads import Compact, Hallucinated, Hydra, Interactive, Recipe, Swap

__all__ = ["EXPORTED", "SMOKE_EXPORTED"]


def _in_all(swap: Swap, label: str) -> Entry:
    return Entry(label=f"{label} in all blocks", recipe=Recipe(swap))


_HYDRA = _in_all(Swap(attention=Hydra()), "Hydra()")
_INTERACTIVE = _in_all(Swap(attention=Interactive()), "Interactive()")
_HALLUCINATED = _in_all(Swap(attention=Hallucinated()), "Hallucinated()")
_BOTH = _in_all(
    Swap(attention=Hallucinated(), ffn=Compact()), "Hallucinated() + Compact()"
)


def _ratio(*entries: Entry, size: str, at_most: float) -> Target:
    """Bound the time beside that of softmax; all of these have fewer FLOPs."""
    kinds = entries[0].label.partition("(")[0].lower()
    return Target(
        name=f"{kinds}_{size}",
        says="time over softmax's as ONNX files, "
        + ", ".join(entry.label for entry in entries)
        + f", {size}",
        rows={"name": tuple(e.label for e in entries), "image_size": size},
        column="ratio.median",
        at_most=at_most,
    )


# At most as long where it is small. Where it is large, well below: half for what is
# linear in the tokens, and the share of the FLOPs, rounded up, for what is not.
_TARGETS = (
    _ratio(_HYDRA, size="224x224", at_most=1.0),
    _ratio(_INTERACTIVE, size="224x224", at_most=1.0),
    _ratio(_HALLUCINATED, _BOTH, size="224x224", at_most=1.0),
    _ratio(_HYDRA, size="1080x1920", at_most=0.5),
    _ratio(_INTERACTIVE, size="1080x1920", at_most=0.5),
    _ratio(_HALLUCINATED, _BOTH, size="1080x1920", at_most=0.8),
)

EXPORTED = ExportedCase(
    name="exported_deit_small",
    gate=("tests/test_exporting.py",),
    budget_s=480.0,
    extra=True,
    architecture="deit_small_patch16_224",
    entries=(
        Entry(label="softmax"),
        _HYDRA,
        _INTERACTIVE,
        _HALLUCINATED,
        _BOTH,
    ),
    sizes=((224, 224), (1080, 1920)),
    targets=_TARGETS,
)
SMOKE_EXPORTED = replace(
    EXPORTED,
    name="smoke_exported",
    rounds=2,
    budget_s=2.0,
    architecture="deit_tiny_patch16_224",
    arguments=(("img_size", 32), ("depth", 2), ("embed_dim", 48)),
    entries=EXPORTED.entries[:2],
    sizes=((32, 32), (40, 64)),
    targets=(),
)
