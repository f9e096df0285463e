"""The script behind the causes of missed targets names every step of both layers."""

from __future__ import annotations

import pytest
from benchmarks.attention_steps import main


def test_it_tells_the_steps_of_both_layers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dim", "384", "--tokens", "20", "--rounds", "2"])
    first, second = capsys.readouterr().out.split("hallucinated, probabilities: ")
    assert first.startswith("softmax: ")
    assert "fused attention" in first
    for step in ("projections", "scores", "softmax", "mixing", "blends", "copies"):
        assert f"  {step} " in second
