"""The script behind the causes of missed targets names every step of the layers."""

from __future__ import annotations

import pytest
from benchmarks.layer_steps import main


def test_it_tells_the_steps_of_both_layers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dim", "384", "--tokens", "20", "--rounds", "2"])
    first, second = capsys.readouterr().out.split("hallucinated, probabilities: ")
    assert first.startswith("softmax: ")
    assert "fused attention" in first
    for step in ("linear", "scores", "softmax", "mixing", "blends", "copies"):
        assert f"  {step} " in second


def test_it_tells_both_factors_of_a_compact_layer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--part", "block", "--dim", "384", "--tokens", "20", "--rounds", "1"])
    blocks = capsys.readouterr().out.split("compact at D/2: ")
    assert "linear 1536 to 384 " in blocks[0]
    for step in ("linear 1536 to 192 ", "linear 192 to 384 ", "activation", "norms"):
        assert step in blocks[1]
    assert "rest" in blocks[1]
