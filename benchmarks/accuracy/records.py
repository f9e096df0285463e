"""Records of the accuracy study: one file a cell and seed, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cases import CASES, Case
from benchmarks.records import write_once

__all__ = [
    "FORMAT",
    "VERSION",
    "OtherCase",
    "OtherWeights",
    "is_recorded",
    "path_of",
    "read",
    "require_one_teacher",
    "require_recorded_weights",
    "write",
]

FORMAT, VERSION = "manyheads.accuracy", 1
_WHY = (
    "The same training gives the same bits only with the same processor, number of "
    "threads and versions; cells of different models cannot be compared."
)


class OtherCase(Exception):
    """A cell is recorded, but with other settings than it has now."""


class OtherWeights(Exception):
    """A model was made again and came out otherwise than the records say."""


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


def require_recorded_weights(
    folder: Path, case: Case, seed: int, weights: str, saved: Path
) -> None:
    """See that the saved model of a cell is the one of its record, if it has one.

    Raises:
        OtherWeights: It is another.
    """
    path = path_of(folder, case.name, seed)
    if not path.is_file():
        return
    recorded = json.loads(path.read_text(encoding="utf-8"))["weights"]
    if recorded != weights:
        raise OtherWeights(
            f"{saved} has weights {weights}, and {path.name} was recorded with weights "
            f"{recorded}. {_WHY} Put the recorded model in its place, or give another "
            "--out and record every cell of this seed again."
        )


def require_one_teacher(folder: Path, case: Case, seed: int, weights: str) -> None:
    """See that all records of a seed stand on one teacher.

    Raises:
        OtherWeights: A record names another teacher than this one.
    """
    for path in sorted(folder.glob(f"{case.setting.name}-*-seed{seed}.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        # Where pictures are larger, the teacher was resized before it was measured.
        taught = None if "size" in record["case"] else record["teacher_weights"]
        if taught not in (None, weights):
            raise OtherWeights(
                f"the teacher of seed {seed} has weights {weights}, and {path.name} "
                f"stands on a teacher with weights {taught}. {_WHY} Bring that teacher "
                "back, or give another --out and record every cell of this seed again."
            )


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
