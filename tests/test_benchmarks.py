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
import torch
from benchmarks import run
from benchmarks.cases import CASES, SMOKE
from benchmarks.kinds import COPY, GIVEN, Case, CoreCase, LayerCase, WideCase
from benchmarks.measure import fit, growth, measure
from benchmarks.measure.wide import SOFTMAX, WHOLE, mixed_wide
from benchmarks.peers import LAYERS, TextbookHydra, make_layer
from benchmarks.records import is_again, read_records, write_record
from benchmarks.render import RENDERERS, render
from torch.nn import functional as F

from manyheads.attention.hydra import hydra_attention
from tests.benchmark_records import core_record

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
    assert f"{len(SMOKE)} of {len(SMOKE)} cases in " in done.stdout
    return folder


def test_a_smoke_run_records_one_case_of_each_kind(smoke: Path) -> None:
    records = {record["kind"]: record for record in read_records(smoke)}
    kinds = {"core", "layer", "model", "scaling", "wide"}
    assert set(records) == kinds == _kinds_of_cases()
    # The last record holds the seconds of the whole run.
    of_cases = sum(record["wall_s"] for record in records.values())
    whole = max(record["run_s"] for record in records.values())
    assert whole >= of_cases - 0.5
    for record in records.values():
        assert record["conditions"]["weights"] == "random"
        assert record["conditions"]["threads"] == 1
        assert record["run_s"] >= record["wall_s"] > 0
        assert str(ROOT) not in json.dumps(record)
        assert render([record]).startswith("|")
    forms = {row["form"]: row for row in records["core"]["rows"]}
    known = {"Softmax()", COPY, "Hydra()", GIVEN, "text-book Hydra"}
    assert set(forms) == known | {"Hydra() with maps"}
    for form in known - {COPY, GIVEN}:
        assert forms[form]["share_of_matmul_rate"]["median"] > 0
    shown = render([records["core"]])
    assert "missed !: copy rate of Hydra()" in shown
    labels = [row["form"] for row in records["layer"]["rows"]]
    assert labels == [
        "softmax",
        "softmax again",
        "hallucinated",
        "with maps",
        "text-book Hydra",
    ]
    names = [row["name"] for row in records["model"]["rows"]]
    assert names == ["softmax", "Hydra in all blocks"]
    assert all(row["peak_mib"] > 0 for row in records["model"]["rows"])
    assert "padded to 48x64" in render([records["model"]])


def test_what_is_not_tried_stays_in_the_table_with_its_reason(smoke: Path) -> None:
    record = next(r for r in read_records(smoke) if r["kind"] == "scaling")
    stopped, done = record["rows"]
    assert stopped["problem"] == "not tried above 5 tokens"
    assert "| softmax: not tried above 5 tokens |" in render([record])
    assert done["peak_mib"] > done["extra_mib"] >= 0
    assert done["us_per_token"] == pytest.approx(1e3 * done["ms"]["median"] / 13)


def _kinds_of_cases() -> set[str]:
    return {kind for kind in RENDERERS if kind in map(run.kind_of, CASES)}


def test_record_names_carry_case_hardware_and_month(smoke: Path) -> None:
    for path in smoke.iterdir():
        assert re.fullmatch(r"smoke_\w+_[a-z0-9-]+-1-threads_\d{6}\.json", path.name)


def test_no_record_is_ever_overwritten(tmp_path: Path) -> None:
    first = write_record(core_record(), tmp_path)
    before = first.read_bytes()
    second = write_record(core_record(growth={}), tmp_path)
    third = write_record(core_record(), tmp_path)
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
        write_record(core_record(growth={"Hydra()": float("nan")}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_red_tests_take_no_time_and_stop_no_other_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red, green = tmp_path / "test_red.py", tmp_path / "test_green.py"
    red.write_text("def test_red():\n    assert 1 == 2\n", encoding="utf-8")
    green.write_text("def test_green():\n    pass\n", encoding="utf-8")
    cases: list[Case] = [
        replace(SMOKE[0], name="red_case", gate=(str(red),)),
        replace(SMOKE[0], name="green_case", gate=(str(green),), peers=()),
    ]
    out = tmp_path / "results"
    assert run.main(["--out", str(out)], cases=cases) == 1
    assert [record["case"]["name"] for record in read_records(out)] == ["green_case"]
    told = capsys.readouterr()
    assert "red_case" not in told.out
    assert "red_case: its tests fail, so no time is taken" in told.err
    assert "assert 1 == 2" in told.err
    assert "not recorded: red_case" in told.err


def test_a_green_test_file_runs_once_in_a_run(tmp_path: Path) -> None:
    counted, test = tmp_path / "count", tmp_path / "test_counted.py"
    test.write_text(
        f"def test_counted():\n    open({str(counted)!r}, 'a').write('x')\n",
        encoding="utf-8",
    )
    case = replace(SMOKE[0], gate=(str(test),))
    gate = run.Gate()
    assert gate.passes(case)
    assert gate.passes(replace(case, name="another"))
    assert counted.read_text(encoding="utf-8") == "x"


def test_only_the_same_case_machine_and_code_are_skipped() -> None:
    old = core_record()
    old["conditions"]["git"] = "0" * 40
    here = dict(old["conditions"])
    case = dict(old["case"])
    assert is_again(old, case, here)
    assert not is_again(old, case | {"dim": 16}, here)
    changes = {"git": "1" * 40, "threads": 4, "torch": "2.16", "settings": {"A": "1"}}
    for key, other in changes.items():
        assert not is_again(old, case, here | {key: other})
    changed = f"{'0' * 40} with local changes"
    old["conditions"]["git"] = changed
    assert not is_again(old, case, here | {"git": changed})
    assert not is_again(old, case, here | {"git": None})


def test_the_quick_set_leaves_room_for_tests_and_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    quick = [case for case in CASES if not case.extra]
    # Ten minutes in all; some 150 s go into gates, 150 s into memory and warming up.
    assert sum(case.budget_s for case in quick) <= 300
    assert {run.kind_of(case) for case in quick} == {"core", "layer", "model"}
    assert run.main(["--list"]) == 0
    told = capsys.readouterr().out
    assert all(case.name in told for case in quick)
    assert "scaling_deit_small" not in told
    assert run.main(["--list", "--all"]) == 0
    told = capsys.readouterr().out
    assert all(case.name in told for case in CASES)


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


def test_growth_is_fitted_to_each_batch_size_and_to_memory() -> None:
    rows: list[dict[str, Any]] = [
        {
            "form": "x",
            "num_tokens": n,
            "batch_size": batch,
            "ms": {"median": float(n**batch)},
            "extra_mib": 2.0 * n if batch == 1 else None,
        }
        for n in (1025, 4097)
        for batch in (1, 2)
    ]
    assert fit(rows) == {
        "growth": {"x": pytest.approx(1.0), "x, batch 2": pytest.approx(2.0)},
        "memory_growth": {"x": pytest.approx(1.0)},
    }
    assert fit([{"name": "a model"}]) == {}


@pytest.mark.parametrize("name", LAYERS)
def test_peers_take_the_tokens_that_ours_take(name: str) -> None:
    x = torch.randn(2, 17, 24)
    assert make_layer(name, x, 2)(x).shape == x.shape


def test_the_text_book_form_is_hydra() -> None:
    layer = TextbookHydra(24).eval()
    x = torch.randn(2, 17, 24)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    mixed = layer.proj(hydra_attention(q, k, v))
    torch.testing.assert_close(layer(x), mixed)


@pytest.mark.slow
def test_peak_memory_of_a_core_is_measured_where_it_is_asked_for() -> None:
    case = SMOKE[0]
    assert isinstance(case, CoreCase)
    small = replace(case, memory=(64,), peers=(), with_maps=())
    rows = measure(small, torch.device("cpu"))
    measured = [row for row in rows if row.get("extra_mib") is not None]
    assert {row["form"] for row in measured} == {"Softmax()", "Hydra()"}
    assert {row["num_tokens"] for row in measured} == {64}


def test_the_promise_is_saved_time_over_saved_flops() -> None:
    case = SMOKE[0]
    assert isinstance(case, CoreCase)
    small = replace(case, num_tokens=(64,), peers=(), with_maps=())
    by_form = {row["form"]: row for row in measure(small, torch.device("cpu"))}
    softmax, hydra = by_form["Softmax()"], by_form["Hydra()"]
    assert softmax["flops"] == 2 * 64 * 64 * 48
    assert softmax["promise_kept"] is None
    saved = 1 - hydra["flops"] / softmax["flops"]
    kept = (1 - hydra["to_softmax"]["median"]) / saved
    assert hydra["promise_kept"] == pytest.approx(kept)


def test_the_ways_to_mix_wide_values_are_timed_and_the_picked_ones_named() -> None:
    case = next(c for c in CASES if c.name == "wide_values_d768")
    assert isinstance(case, WideCase)
    assert {N for N, B in case.sizes if B == 1} == {197, 577, 2048, 8160}
    assert {B for _, B in case.sizes} == {1, 8}
    small = replace(case, dim=48, num_heads=4, sizes=((17, 2),), rounds=2, memory=())
    rows = {row["form"]: row for row in measure(small, torch.device("cpu"))}
    assert set(rows) == {SOFTMAX, "chunked", "padded", "calls", WHOLE}
    serves = {form: row["serves"] for form, row in rows.items() if row["serves"]}
    assert serves == {"chunked": "gradients, masks, cross_map", WHOLE: "inference"}
    pairs = 17 * 17 * 12
    assert rows[SOFTMAX]["flops"] == rows["padded"]["flops"] == 8 * pairs
    assert rows["chunked"]["flops"] == rows[WHOLE]["flops"] == 6 * pairs
    assert rows["chunked"]["promise_kept"] is not None
    assert rows["padded"]["promise_kept"] is None


def test_all_ways_to_mix_wide_values_do_the_same_work() -> None:
    packed = torch.randn(3, 2, 9, 4, 12, dtype=torch.float64)
    q, k, v = packed
    one = mixed_wide("chunked", packed)
    for form in ("padded", "calls"):
        torch.testing.assert_close(mixed_wide(form, packed), one)
    # Two values for each real head, one of them where another head's would be.
    halves = [x[:, :, :2].transpose(1, 2) for x in (q, k)]
    by_torch = F.scaled_dot_product_attention(*halves, v[:, :, ::2].transpose(1, 2))
    torch.testing.assert_close(one[..., :12], by_torch.transpose(1, 2))


@pytest.mark.slow
def test_compiled_layers_are_timed_after_compilation() -> None:
    case = SMOKE[1]
    assert isinstance(case, LayerCase)
    rows = measure(
        replace(case, compiled=True, entries=case.entries[:2]), torch.device("cpu")
    )
    assert [row["compiled"] for row in rows] == [True, True]
    assert all(row["compile_s"] > 0 for row in rows)
