"""Tables generated from records: what is shown, marked, chosen and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import tables
from benchmarks.records import newest, write_record
from benchmarks.render import render
from benchmarks.render.model import render_models

from tests.benchmark_records import core_record


def test_losing_cells_stay_in_and_are_marked() -> None:
    table = render([core_record()])
    hydra = next(line for line in table.splitlines() if "| Hydra() |" in line)
    assert "| 1.25 ! | 0.8 | 0.50 |" in hydra
    assert "Hydra() 1.30 !" in table
    assert "copy 1.00," in table or "copy 1.00." in table
    assert "Hydra() at N = 1,024 (5,000)" in table
    assert "A (R) Chip, 2 threads, torch 2.15, 2026-11-03" in table


def test_the_newest_record_of_each_case_and_machine_is_shown() -> None:
    old, new = core_record(date="2026-10-01"), core_record(date="2026-11-02")
    other = core_record(name="hydra_core_d9", date="2025-01-01")
    assert newest([new, old, other]) == [new, other]
    assert tables.TABLES["core"].select([new, old, other]) == [new, other]
    assert tables.TABLES["models"].select([new, old, other]) == []
    assert tables.of_kinds("core").select([new, old, other]) == [new, other]


def test_the_same_code_under_other_settings_is_shown_beside() -> None:
    def record(date: str, git: str, **settings: str) -> dict[str, Any]:
        found = core_record(date=date)
        found["conditions"] |= {"git": git, "settings": settings}
        return found

    kept = {"MALLOC_MMAP_MAX_": "0"}
    superseded = record("2026-11-01", "1" * 40)
    plain, new = record("2026-11-02", "2" * 40), record("2026-11-03", "2" * 40, **kept)
    earlier = record("2026-11-01", "2" * 40, **kept)
    assert newest([new, superseded, plain, earlier]) == [plain, new]
    assert "torch 2.15, MALLOC_MMAP_MAX_=0, 2026-11-03" in render([new])
    # Nobody knows what uncommitted code was.
    changed = [record(f"2026-11-0{day}", "3 with local changes") for day in (4, 5)]
    assert newest([*changed, plain, new]) == changed[1:]


def test_every_table_can_be_placed_before_anything_is_recorded() -> None:
    for table in tables.TABLES.values():
        assert table.render(table.select([])) == "Not recorded yet."


def test_a_size_that_a_model_cannot_take_is_told_in_its_row() -> None:
    record = core_record(
        case={"name": "ivit_x", "architecture": "a", "compiled": False},
        rows=[
            {
                "name": "a",
                "image_size": [224, 224],
                "batch_size": 1,
                "rounds": 3,
                "latency_ms": 2.0,
                "latency_quartiles_ms": [1.0, 3.0],
                "ratio": 1.0,
                "ratio_quartiles": [1.0, 1.0],
                "flops": 10**9,
                "parameters": 10**6,
            },
            {
                "name": "b",
                "image_size": [224, 224],
                "batch_size": 1,
                "rounds": 0,
                "problem": "takes multiples of 32",
            },
        ],
    )
    told = render_models(record)
    assert "| 224x224 | 1 | b: takes multiples of 32 | - |" in told
    assert "3 rounds" in told


_DEMO: dict[str, Any] = {
    "format": "manyheads.demo",
    "version": 1,
    "rows": [
        {
            "model": "softmax",
            "accuracy_before": 0.9,
            "accuracy_swapped": None,
            "accuracy_healed": None,
            "parameters": 2_000_000,
            "flops": 4_000_000,
            "latency_ms": 10.0,
            "peak_mib": 100.0,
        },
        {
            "model": "Hydra",
            "accuracy_before": 0.9,
            "accuracy_swapped": 0.1,
            "accuracy_healed": 0.81,
            "parameters": 2_000_000,
            "flops": 3_000_000,
            "latency_ms": 12.0,
            "peak_mib": None,
        },
    ],
    "large": [
        {
            "model": name,
            "image_size": [1080, 1920],
            "parameters": 22_000_000,
            "flops": flops,
            "latency_ms": latency,
            "peak_mib": 1000.0,
        }
        for name, flops, latency in (("DeiT-S", 8e11, 900.0), ("Hydra", 2e11, 225.0))
    ],
    "conditions": {"data": "digits", "machine": {"date": "2026-11-05", "threads": 2}},
}


def test_the_demo_s_ratios_are_to_its_first_row() -> None:
    table = render([_DEMO])
    assert (
        "| Hydra | 90.0 % (1.00) | 10.0 % (0.11 !) | 81.0 % (0.90 !) | 2 (1.00) "
        "| 3 (0.75) | 12 (1.20 !) | - |"
    ) in table
    assert "| 1080x1920 | Hydra | 22 (1.00) | 200,000 (0.25) | 225 (0.25)" in table
    assert "digits. 2 threads, 2026-11-05." in table


def test_tables_are_written_once_and_then_up_to_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    write_record(core_record(), results)
    (results / "demo_a-chip_202611.json").write_text(json.dumps(_DEMO))
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "deep" / "page.md"
    page.parent.mkdir(parents=True)
    readme.write_text("Top\n\n<!-- table: demo -->\nold\n<!-- /table -->\n\nEnd\n")
    page.write_text(
        "<!-- table: core -->\n<!-- /table -->\n<!-- table: models -->\n"
        "<!-- /table -->\n"
    )
    assert tables.main(["--check"], root=tmp_path, results=results) == 1
    assert "README.md: stale" in capsys.readouterr().out
    assert "old" in readme.read_text()
    assert tables.main([], root=tmp_path, results=results) == 0
    assert readme.read_text().startswith("Top\n\n<!-- table: demo -->\n\n| model |")
    assert readme.read_text().endswith("<!-- /table -->\n\nEnd\n")
    assert "Not recorded yet." in page.read_text()
    assert tables.main(["--check"], root=tmp_path, results=results) == 0


def test_a_table_without_a_name_we_know_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("<!-- table: corn -->\n<!-- /table -->\n")
    assert tables.main([], root=tmp_path, results=tmp_path) == 2
    told = capsys.readouterr().err
    assert "'corn'" in told
    assert "core" in told
