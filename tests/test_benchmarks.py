"""The benchmark runner and the tables: what is recorded, refused and generated.

No test looks at how long anything takes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import run, tables
from benchmarks.cases import CASES, SMOKE
from benchmarks.kinds import Case, CoreCase
from benchmarks.measure import COPY, GIVEN, growth
from benchmarks.records import newest, read_records, write_record
from benchmarks.render import render

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of one smoke run, in a process of its own."""
    folder = tmp_path_factory.mktemp("results")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--smoke", "--out", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("a smoke run") == len(SMOKE)
    return folder


def _record(
    name: str = "hydra_core_d8", date: str = "2026-11-03", **changes: Any
) -> Any:
    record = {
        "format": "manyheads.benchmark",
        "version": 1,
        "kind": "core",
        "case": {"name": name, "dim": 8, "num_heads": 2, "batch_size": 1},
        "rows": [
            _core_row("Softmax()", None, 1.0),
            _core_row(COPY, 1.0, None),
            _core_row("Hydra()", 0.5, 1.25),
            _core_row(GIVEN, 0.75, None),
        ],
        "growth": {"Hydra()": 1.3, COPY: 1.0},
        "conditions": {
            "date": date,
            "device": "cpu",
            "device_name": "A (R) Chip",
            "threads": 2,
            "dtype": "float32",
            "torch": "2.15",
        },
    }
    return record | changes


def _core_row(form: str, share: float | None, to_softmax: float | None) -> Any:
    def around(value: float | None) -> Any:
        return value and {"median": value, "lower": value, "upper": value}

    return {
        "form": form,
        "num_tokens": 1024,
        "rounds": 30,
        "ms": around(2.0),
        "share_of_copy_rate": around(share),
        "to_softmax": around(to_softmax),
        "page_faults": 5000 if form == "Hydra()" else 0,
    }


def test_a_smoke_run_records_one_case_of_each_kind(smoke: Path) -> None:
    records = {record["kind"]: record for record in read_records(smoke)}
    assert set(records) == {"core", "layer", "model"}
    for record in records.values():
        assert record["conditions"]["weights"] == "random"
        assert record["conditions"]["threads"] == 1
        assert str(ROOT) not in json.dumps(record)
        assert render([record]).startswith("|")
    forms = {row["form"] for row in records["core"]["rows"]}
    assert forms == {"Softmax()", COPY, "Hydra()", GIVEN}
    names = [row["name"] for row in records["model"]["rows"]]
    assert names == ["softmax", "Hydra in all blocks"]
    assert "padded to 48x64" in render([records["model"]])


def test_record_names_carry_case_hardware_and_month(smoke: Path) -> None:
    for path in smoke.iterdir():
        assert re.fullmatch(r"smoke_\w+_[a-z0-9-]+-1-threads_\d{6}\.json", path.name)


def test_no_record_is_ever_overwritten(tmp_path: Path) -> None:
    first = write_record(_record(), tmp_path)
    before = first.read_bytes()
    second = write_record(_record(growth={}), tmp_path)
    third = write_record(_record(), tmp_path)
    assert first.read_bytes() == before
    stem = "hydra_core_d8_a-chip-2-threads_202611"
    assert [first.name, second.name, third.name] == [
        f"{stem}.json",
        f"{stem}_2.json",
        f"{stem}_3.json",
    ]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_record_that_is_no_json_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan"):
        write_record(_record(growth={"Hydra()": float("nan")}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_red_tests_take_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert 1 == 2\n", encoding="utf-8")
    case: Case = replace(SMOKE[0], name="red_case", gate=(str(red),))
    out = tmp_path / "results"
    code = run.main(["--case", "red_case", "--out", str(out)], cases=[case])
    assert code == 1
    assert not out.exists()
    told = capsys.readouterr()
    assert told.out == ""
    assert "red_case: its tests fail" in told.err
    assert "assert 1 == 2" in told.err


def test_an_unknown_case_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        run.main(["--case", "hydra_core"])
    assert left.value.code == 2
    assert "hydra_core_d768" in capsys.readouterr().err


def test_cases_have_names_of_their_own_and_gates_that_exist() -> None:
    names = [case.name for case in (*CASES, *SMOKE)]
    assert len(set(names)) == len(names)
    for case in (*CASES, *SMOKE):
        assert re.fullmatch(r"[a-z0-9_]+", case.name)
        assert case.gate
        assert all((ROOT / path).is_file() for path in case.gate)


def test_the_issue_s_token_counts_are_measured() -> None:
    cores = {c.dim: c for c in CASES if isinstance(c, CoreCase) and "hydra" in c.name}
    for dim, heads in ((768, 12), (384, 6)):
        assert cores[dim].num_heads == heads
        wanted = (197, 577, 1024, 2048, 4096, 8160, 16384)
        assert cores[dim].num_tokens == wanted


def test_growth_is_the_slope_from_1024_tokens_up() -> None:
    rows = [
        {"form": "x", "num_tokens": n, "ms": {"median": 3e-5 * n**1.5}}
        for n in (1024, 2048, 8160)
    ]
    rows.append({"form": "x", "num_tokens": 197, "ms": {"median": 99.0}})
    assert growth(rows) == {"x": pytest.approx(1.5)}
    assert growth(rows[:1]) == {}


def test_losing_cells_stay_in_and_are_marked() -> None:
    table = render([_record()])
    hydra = next(line for line in table.splitlines() if "| Hydra() |" in line)
    assert "| 1.25 ! | 0.8 | 0.50 |" in hydra
    assert "Hydra() 1.30 !" in table
    assert "copy 1.00," in table or "copy 1.00." in table
    assert "Hydra() at N = 1,024 (5,000)" in table
    assert "A (R) Chip, 2 threads, torch 2.15, 2026-11-03" in table


def test_the_newest_record_of_each_case_and_machine_is_shown() -> None:
    old, new = _record(date="2026-10-01"), _record(date="2026-11-02")
    other = _record(name="hydra_core_d9", date="2025-01-01")
    assert newest([new, old, other]) == [new, other]
    assert tables.TABLES["core"].select([new, old, other]) == [new, other]
    assert tables.TABLES["models"].select([new, old, other]) == []
    assert tables.of_kinds("core").select([new, old, other]) == [new, other]


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
        "| 3 (0.75) | 12 (1.20 !) | not measured |"
    ) in table
    assert "| 1080x1920 | Hydra | 22 (1.00) | 200,000 (0.25) | 225 (0.25)" in table
    assert "digits. 2 threads, 2026-11-05." in table


def test_tables_are_written_once_and_then_up_to_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    write_record(_record(), results)
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
