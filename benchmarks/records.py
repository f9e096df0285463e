"""Recorded results: how they are named, written once, and found again."""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = [
    "FORMAT",
    "RESULTS",
    "VERSION",
    "date",
    "hardware",
    "is_again",
    "newest",
    "read_records",
    "settings",
    "write_once",
    "write_record",
]

RESULTS = Path(__file__).parent / "results"
FORMAT, VERSION = "manyheads.benchmark", 1


def write_record(record: dict[str, Any], folder: Path) -> Path:
    """Write a record under its case, hardware and month; never over another one.

    The file appears whole or not at all, and a taken name gets a number.
    """
    stem = f"{record['case']['name']}_{hardware(record)}_{_month(record)}"
    again = (f"{stem}_{number}.json" for number in itertools.count(2))
    return write_once(record, folder, itertools.chain([f"{stem}.json"], again))


def write_once(record: dict[str, Any], folder: Path, names: Iterable[str]) -> Path:
    """Write a record, whole or not at all, under the first name that is free.

    Raises:
        FileExistsError: All names are taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    handle, scratch = tempfile.mkstemp(prefix=".", suffix=".json", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).chmod(0o644)
        for name in names:
            # A link, unlike a rename, refuses a name that is taken.
            with suppress(FileExistsError):
                os.link(scratch, folder / name)
                return folder / name
    finally:
        Path(scratch).unlink(missing_ok=True)
    raise FileExistsError(f"{folder}: a record of that name is there, and stays")


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read all records of the folder, oldest name first."""
    return [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    ]


def newest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the latest record of each case on each hardware, in the order of cases.

    Beside it stay those that measured the same code under other settings of memory and
    threads: the latest of each.
    """
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for record in sorted(records, key=date):
        latest[_subject(record)] = record
    beside = {
        (*_subject(record), settings(record)): record
        for record in sorted(records, key=date)
        if _code(record) == _code(latest[_subject(record)])
    }
    return [beside[key] for key in sorted(beside)]


def settings(record: dict[str, Any]) -> str:
    """Tell a record's settings of memory and threads; empty where there are none."""
    told = record["conditions"].get("settings") or {}
    return ", ".join(f"{name}={value}" for name, value in told.items())


def is_again(old: dict[str, Any], case: dict[str, Any], here: dict[str, Any]) -> bool:
    """Say whether measuring a case would only repeat a record.

    It would if the case is the same, the machine, its threads and torch are, and the
    code is: the same commit, with nothing changed since.

    Args:
        old: The record.
        case: The case as a record tells it.
        here: The conditions now.
    """
    if old["format"] != FORMAT or not here["git"] or " " in here["git"]:
        return False
    there = old["conditions"]
    same = ("git", "device_name", "threads", "torch", "dtype", "settings")
    return old["case"] == case and all(there.get(k) == here.get(k) for k in same)


def date(record: dict[str, Any]) -> str:
    """Give the ISO date of a record; empty where it has none."""
    conditions = record.get("conditions", {})
    return str(conditions.get("date") or conditions.get("machine", {}).get("date", ""))


def hardware(record: dict[str, Any]) -> str:
    """Name the hardware in a way that fits into a file name."""
    conditions = record["conditions"]
    name = str(conditions["device_name"])
    if conditions["device"] == "cpu":
        name += f" {conditions['threads']} threads"
    name = re.sub(r"\((?:R|TM)\)", "", name)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _subject(record: dict[str, Any]) -> tuple[str, str]:
    """Name what was measured, and on what."""
    return record["case"]["name"], hardware(record)


def _code(record: dict[str, Any]) -> str:
    """Name the code that was measured; one that was changed is like no other."""
    commit = str(record["conditions"].get("git") or "")
    return date(record) if " " in commit or not commit else commit


def _month(record: dict[str, Any]) -> str:
    return date(record)[:7].replace("-", "")
