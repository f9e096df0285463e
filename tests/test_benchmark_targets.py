"""Targets: which rows they mean, what meets them, and that each can be met at all."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from benchmarks.cases import CASES, targets_of
from benchmarks.cases.exported import EXPORTED
from benchmarks.cases.gpu import BOTH, FORWARD, GPU_CASES
from benchmarks.kinds import (
    COPY,
    GIVEN,
    Case,
    CoreCase,
    ExportedCase,
    LayerCase,
    ModelCase,
)
from benchmarks.kinds import ScalingCase as Scaling
from benchmarks.render.targets import render_all_targets, target_lines
from benchmarks.targets import Target, judge, read_reasons

from tests.benchmark_records import core_record

_WITH_TARGETS = [case for case in (*CASES, *GPU_CASES, EXPORTED) if case.targets]


def _target(**changes: Any) -> Target:
    told: dict[str, Any] = {
        "name": "copy_rate",
        "says": "copy rate",
        "rows": {"form": ("Hydra()", GIVEN), "num_tokens": 1024},
        "column": "share_of_copy_rate.median",
        "at_least": 0.6,
    }
    return Target(**told | changes)


def test_the_worst_row_decides_and_a_miss_shows_its_cause() -> None:
    reasons = {"hydra_core_d8": {"copy_rate": "page faults"}}
    (verdict,) = judge(core_record(), [_target()], reasons)
    assert verdict.outcome == "missed"
    assert verdict.value == 0.5
    assert verdict.where == "Hydra(), N = 1,024"
    assert verdict.reason == "page faults"
    (verdict,) = judge(core_record(), [_target(at_least=0.5)], reasons)
    assert (verdict.outcome, verdict.reason) == ("hit", "")


def test_an_upper_bound_is_held_against_the_largest_value() -> None:
    with pytest.raises(ValueError, match="either"):
        _target(at_most=1.0)
    target = Target(
        name="growth",
        says="",
        rows={"form": ("Hydra()", COPY)},
        column="growth",
        at_most=1.1,
    )
    (verdict,) = judge(core_record(), [target], {})
    assert (verdict.outcome, verdict.value) == ("missed", 1.3)


def test_a_target_of_which_nothing_is_recorded_says_so() -> None:
    (verdict,) = judge(core_record(), [_target(rows={"form": "Hydra"})], {})
    assert verdict.outcome == "not measured"
    assert verdict.value is None


def test_tables_carry_the_targets_of_the_case() -> None:
    record = core_record(name="hydra_core_d768")
    record["rows"] = [row | {"num_tokens": 4096} for row in record["rows"]]
    record["rows"][2]["share_of_copy_rate"]["median"] = 0.25
    (told,) = target_lines(record)
    missed, hit = told.removeprefix("Targets:\n\n").splitlines()
    assert missed.startswith("- missed !: copy rate of Hydra()")
    assert "0.25, at least 0.5 (Hydra(), N = 4,096)" in missed
    assert hit.startswith("- hit: ")
    whole = render_all_targets([record])
    assert "| hydra_core_d768 |" in whole
    assert "| missed ! |" in whole
    assert target_lines(core_record()) == []


@pytest.mark.parametrize("case", _WITH_TARGETS, ids=lambda case: str(case.name))
def test_every_target_means_rows_that_its_case_will_have(case: Case) -> None:
    for target in case.targets:
        column = target.column.partition(".")[0]
        meant = [row for row in _rows(case) if target.picks(row) and column in row]
        assert meant, target
        for key, wanted in target.rows.items():
            if isinstance(wanted, tuple):
                assert {row[key] for row in meant} == set(wanted)


def test_every_cause_belongs_to_a_target() -> None:
    for case, causes in read_reasons().items():
        known = {target.name for target in targets_of(case)}
        assert set(causes) <= known
        assert all(causes.values())


def _rows(case: Case) -> list[dict[str, Any]]:
    """Give rows like those that measuring would give, without numbers."""
    if isinstance(case, CoreCase):
        forms = [*map(repr, case.specs), GIVEN, FORWARD, BOTH]
        columns = ("to_softmax", "share_of_copy_rate")
        rows = [
            {"form": form, "num_tokens": n} | dict.fromkeys(columns)
            for form, n in product(forms, case.num_tokens)
        ]
        return rows + _fits(forms)
    assert isinstance(case, LayerCase | ModelCase | Scaling | ExportedCase)
    labels = [entry.label for entry in case.entries]
    columns = ("ratio", "speedup", "promise_kept", "peak_mib")
    if isinstance(case, LayerCase):
        rows = [
            {"form": label, "num_tokens": 1 + grid[0] * grid[1], "batch_size": batch}
            | dict.fromkeys(columns)
            for label, grid, batch in product(labels, case.grids, case.batch_sizes)
        ]
        return rows + _fits(labels)
    inputs = case.inputs if isinstance(case, ModelCase) else case.sizes
    rows = [
        {"name": label, "image_size": list(size[:2]), "batch_size": [*size, 1][2]}
        | dict.fromkeys(columns)
        for label, size in product(labels, inputs)
    ]
    return rows + (_fits(labels) if isinstance(case, Scaling) else [])


def _fits(forms: list[str]) -> list[dict[str, Any]]:
    columns = ("growth", "memory_growth")
    return [{"form": form, column: 1.0} for form in forms for column in columns]
