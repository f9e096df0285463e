"""Records of the accuracy study: one file a cell and seed, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cases import CASES, Case
from benchmarks.records import write_once

__all__ = ["FORMAT", "VERSION", "OtherCase", "is_recorded", "path_of", "read", "write"]

FORMAT, VERSION = "manyheads.accuracy", 1


class OtherCase(Exception):
    """A cell is recorded, but with other settings than it has now."""


def path_of(folder: Path, name: str, seed: int) -> Path:
    """Say where the record of a cell lies."""
    return folder / f"{name}-seed{seed}.json"


def is_recorded(folder: Path, case: Case, seed: int) -> bool:
    """Say whether a cell is recorded, with the settings that it has now.

    Raises:
        OtherCase: It is recorded with other settings.
    """
    path = path_of(folder, case.name, seed)
    if not path.is_file():
        return False
    recorded = json.loads(path.read_text(encoding="utf-8"))["case"]
    wanted = json.loads(json.dumps(case.to_json()))
    if recorded != wanted:
        differing = [key for key in wanted if recorded.get(key) != wanted[key]]
        raise OtherCase(
            f"{path.name} was recorded with another {', '.join(differing)}. Move it "
            "away to run the cell again, or give another --out."
        )
    return True


def write(record: dict[str, Any], folder: Path) -> Path:
    """Write a record, whole or not at all; one that is there stays.

    Raises:
        FileExistsError: The cell is recorded.
    """
    name = path_of(folder, record["case"]["name"], record["seed"]).name
    return write_once(record, folder, [name])


def read(folder: Path) -> list[dict[str, Any]]:
    """Read all records, in the order in which the cells are run."""
    order = {case.name: number for number, case in enumerate(CASES)}
    found = [
        json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")
    ]
    return sorted(
        found,
        key=lambda r: (
            order.get(r["case"]["name"], len(order)),
            r["case"]["name"],
            r["seed"],
        ),
    )
