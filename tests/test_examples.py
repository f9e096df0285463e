"""Every example runs, offline, in an empty folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import manyheads as mh

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(example: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout


def test_the_recipe_file_in_the_documentation_is_what_the_example_writes() -> None:
    recipe = mh.Recipe.read(EXAMPLES[0].with_name("recipe.json"))
    assert recipe == mh.Recipe(
        mh.Swap(blocks=[10, 11], attention=mh.Hydra()),
        mh.Swap(ffn=mh.Compact(rank=0.5)),
    )
