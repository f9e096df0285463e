"""Measurements: what is recorded, what stays untouched, what is refused.

No test looks at how long anything takes.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from manyheads import Hydra, Recipe, Swap, bench, convert, cost
from manyheads.errors import InvalidOption, UnknownHost
from manyheads.gauges.machine import conditions
from manyheads.gauges.memory import (
    Memory,
    give_back_freed,
    measure_memory,
    resident_bytes,
)
from manyheads.gauges.rates import Matmul, kept_promise
from manyheads.gauges.stopwatch import race, ratios, spread
from manyheads.geometry import Geometry
from tests.helpers import tiny_vit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    teacher = tiny_vit()
    return teacher, convert(teacher, Recipe(Swap(attention=Hydra())))


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_each_model_has_a_row_with_its_counts_and_ratios(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    found = bench(*pair, rounds=4, memory=False, batch_size=2, progress=False)
    assert (found.rounds, found.rounds_asked, found.batch_size) == (4, 4, 2)
    assert found.image_size == (32, 32)
    for row, model in zip(found.rows, pair, strict=True):
        assert row.flops == cost(model).flops
        assert row.parameters == cost(model).num_parameters
        low, high = row.latency_quartiles_ms
        assert 0 < low <= row.latency_ms <= high
        assert row.throughput == pytest.approx(2e3 / row.latency_ms)
        assert row.ratio_quartiles[0] <= row.ratio <= row.ratio_quartiles[1]
        assert row.share_of_matmul_rate > 0
    saved = 1 - found.rows[1].flops / found.rows[0].flops
    assert found.rows[1].promise_kept == pytest.approx(
        (1 - found.rows[1].ratio) / saved
    )
    assert found.rows[0].promise_kept is None
    shown = str(found)
    assert "of the promise" in shown
    assert f"  {found.rows[1].share_of_matmul_rate:.2f}  " in shown
    assert found.rows[0].ratio == 1
    assert found.rows[0].ratio_quartiles == (1, 1)
    assert found.warnings == ()


def test_the_default_names_say_what_is_in_a_model(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    found = bench(*pair, pair[1], rounds=1, memory=False, progress=False)
    assert [row.name for row in found.rows] == [
        "VisionTransformer with 3 Softmax()",
        "VisionTransformer with 3 Hydra()",
        "VisionTransformer with 3 Hydra() #2",
    ]


def test_json_holds_all_of_it_and_the_conditions(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    found = bench(*pair, rounds=2, memory=False, names=["a", "b"], progress=False)
    again = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert again == found.to_json()
    assert (again["format"], again["version"]) == ("manyheads.bench", 1)
    assert [row["name"] for row in again["rows"]] == ["a", "b"]
    machine = again["conditions"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert machine["device"] == "cpu"
    assert machine["dtype"] == "float32"
    assert "not known" in machine["weights"]
    assert {"date", "cpu", "python", "timm", "manyheads", "git", "command"} <= {
        *machine
    }


def test_conditions_tell_what_moves_memory_and_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in set(conditions(torch.device("cpu"), torch.float32)["settings"]):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("LD_PRELOAD", "/some/folder/liballocator.so")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # As scikit-learn does when it is imported.
    monkeypatch.setenv("KMP_INIT_AT_FORK", "FALSE")
    told = conditions(torch.device("cpu"), torch.float32)["settings"]
    assert told == {"LD_PRELOAD": "liballocator.so", "MALLOC_MMAP_MAX_": "0"}


def test_a_size_that_does_not_fill_patches_is_padded_and_said_so(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    before = [_state(model) for model in pair]
    pair[0].train()
    found = bench(*pair, image_size=(36, 64), rounds=1, memory=False, progress=False)
    assert pair[0].training
    pair[0].eval()
    assert found.image_size == (36, 64)
    assert {row.fed_size for row in found.rows} == {(40, 64)}
    assert "36x64, padded to 40x64" in str(found)
    for model, state in zip(pair, before, strict=True):
        assert model.patch_embed.img_size == (32, 32)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_a_slower_or_larger_cell_is_marked() -> None:
    wide = tiny_vit(embed_dim=96)
    text = str(bench(tiny_vit(), wide, rounds=1, memory=False, progress=False))
    cells = next(line for line in text.splitlines() if line.endswith("measured"))
    assert "not measured" in cells
    larger = text.splitlines()[2]
    parameters = (
        f"({cost(wide).num_parameters / cost(tiny_vit()).num_parameters:.2f} !)"
    )
    assert parameters in larger


def test_memory_is_that_of_a_fresh_process() -> None:
    found = bench(tiny_vit(), batch_size=256, rounds=1, progress=False)
    assert found.warnings == ()
    (row,) = found.rows
    assert row.peak_mib is not None
    assert row.extra_mib is not None
    # The hidden layer of the blocks alone: 256 images, 17 tokens, 192 features.
    assert row.extra_mib > 256 * 17 * 192 * 4 / 2**20
    assert row.extra_mib < row.peak_mib


def test_code_that_the_first_call_loads_is_no_memory_of_running() -> None:
    """An operator's first call loads torch's compiler, 42 MiB, if timm has not."""
    geometry = Geometry(
        dim=8, num_heads=2, head_dim=4, num_prefix_tokens=0, grid=None, scale=0.5
    )
    core = Hydra().build(geometry)
    found = measure_memory(core, torch.randn(3, 1, 9, 2, 4), _feed_packed)
    assert isinstance(found, Memory), found
    assert found.extra_mib < 25


def _feed_packed(core: nn.Module, packed: torch.Tensor) -> None:
    core(*packed)


def test_memory_that_was_freed_is_given_back_before_running_is_measured() -> None:
    blocks = [bytes(100_000) for _ in range(2000)]
    kept = blocks[-1]
    del blocks
    before = resident_bytes()
    give_back_freed()
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert before - after > 100 * 2**20
    assert len(kept) == 100_000


def test_memory_that_cannot_be_measured_is_none_with_a_warning() -> None:
    model = tiny_vit()
    model.secret = lambda x: x
    found = bench(model, rounds=1, names=["closed"], progress=False)
    assert found.rows[0].peak_mib is None
    assert found.rows[0].extra_mib is None
    assert len(found.warnings) == 1
    assert "closed" in found.warnings[0]
    assert "another process" in found.warnings[0]
    assert found.warnings[0] in str(found)
    assert "not measured" in str(found)


def test_the_handed_over_file_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing = nn.Sequential(nn.Linear(3, 3))
    reason = measure_memory(failing, torch.zeros(1, 4))
    assert isinstance(reason, str)
    assert "ended with 1" in reason
    assert list(tmp_path.iterdir()) == []


def test_turns_alternate_and_no_round_begins_when_time_is_over() -> None:
    seen: list[str] = []
    laps = race(
        [lambda: seen.append("a"), lambda: seen.append("b")],
        rounds=50,
        budget_s=0.0,
        device=CPU,
    )
    assert [len(lap) for lap in laps] == [3, 3]
    assert "".join(seen) == "aaabbb" + "abbaab"


def test_each_may_be_called_once_before_its_turn() -> None:
    seen: list[str] = []
    race(
        [lambda: seen.append("a"), lambda: seen.append("b")],
        rounds=3,
        budget_s=0.0,
        device=CPU,
        rehearse=True,
    )
    assert "".join(seen) == "aaabbb" + "aabb" + "bbaa" + "aabb"


def test_rates_and_promises_are_held_against_product_and_base() -> None:
    matmul = Matmul(CPU, torch.float32)
    # As many multiply-adds as the product in twice its time: half of its rate.
    found = matmul.share([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], matmul.side**3)
    assert (found.lower, found.median, found.upper) == (0.5, 0.5, 0.5)
    assert kept_promise(0.75, flops=50, base=100) == 0.5
    assert kept_promise(1.5, flops=50, base=100) == -1.0
    assert kept_promise(0.5, flops=100, base=100) is None
    assert kept_promise(0.5, flops=120, base=100) is None


def test_ratios_are_taken_within_rounds() -> None:
    found = ratios([2.0, 40.0, 6.0], [1.0, 10.0, 3.0])
    assert (found.lower, found.median, found.upper) == (2.0, 2.0, 3.0)
    alone = spread([7.0])
    assert (alone.lower, alone.median, alone.upper) == (7.0, 7.0, 7.0)


def test_conditions_name_no_path_of_this_machine() -> None:
    told = json.dumps(conditions(CPU, torch.float32))
    assert str(Path.home()) not in told
    assert str(Path.cwd()) not in told


def test_conditions_name_the_code_that_ran() -> None:
    root = Path(__file__).parents[1]
    ask = ["git", "-C", str(root), "rev-parse", "HEAD"]
    asked = subprocess.run(ask, capture_output=True, text=True, check=False)
    if asked.returncode or not (root / ".git").exists():
        pytest.skip("this is no checkout")
    told = conditions(CPU, torch.float32)["git"]
    assert told.removesuffix(" with local changes") == asked.stdout.strip()


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"batch_size": -2}, "batch_size=-2"),
        ({"image_size": (0, 32)}, "image_size=(0, 32)"),
        ({"names": ["a", "b"]}, "2 different names for 1 models"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], fact: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        bench(tiny_vit(), memory=False, progress=False, **options)
    assert fact in str(caught.value)
    assert caught.value.fix


def test_no_model_or_models_apart_are_refused() -> None:
    with pytest.raises(InvalidOption, match="no model is given"):
        bench()
    with pytest.raises(InvalidOption, match="cpu, meta"):
        bench(tiny_vit(), tiny_vit().to("meta"), progress=False)


def test_a_model_without_a_host_is_refused_by_name() -> None:
    with pytest.raises(UnknownHost, match="Sequential"):
        bench(nn.Sequential(nn.Linear(3, 3)), progress=False)
