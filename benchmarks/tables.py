"""Writes the tables of the documentation from the records; none is ever typed.

python -m benchmarks.tables             rewrites README.md and docs/
python -m benchmarks.tables --check     says which of them are stale

A table stands between two comments:

    <!-- table: core -->
    <!-- /table -->
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, date, newest, read_records
from benchmarks.render import render

ROOT = Path(__file__).parents[1]

# Which records a table shows: all of those whose case name begins like this.
TABLES = {
    "core": ("hydra_core_",),
    "models": ("hydra_deit_",),
}
_BLOCK = re.compile(
    r"(?P<open><!-- table: (?P<name>\S+) -->\n).*?(?P<close><!-- /table -->)", re.DOTALL
)


def main(
    arguments: Sequence[str] | None = None,
    *,
    root: Path = ROOT,
    results: Path = RESULTS,
) -> int:
    """Write or check; 0 all is well, 1 a file is stale, 2 a table has no such name."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    records = read_records(results)
    stale = []
    for path in [root / "README.md", *sorted(root.glob("docs/**/*.md"))]:
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        try:
            fresh = rewrite(text, records)
        except KeyError as error:
            known = ", ".join(["demo", *TABLES])
            where = path.relative_to(root)
            print(f"{where}: no table {error}; there are {known}", file=sys.stderr)
            return 2
        if fresh != text:
            stale.append(path.relative_to(root))
            if not check:
                path.write_text(fresh, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'stale' if check else 'written'}")
    if check and stale:
        print("Run python -m benchmarks.tables.", file=sys.stderr)
    return int(check and bool(stale))


def rewrite(text: str, records: Sequence[dict[str, Any]]) -> str:
    """Put fresh tables between the comments of a text.

    Raises:
        KeyError: A comment names no table.
    """

    def fresh(block: re.Match[str]) -> str:
        table = render(select(block["name"], records))
        return f"{block['open']}\n{table}\n\n{block['close']}"

    return _BLOCK.sub(fresh, text)


def select(name: str, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose the records that a table shows: the newest of each case and machine."""
    if name == "demo":
        demos = [r for r in records if r["format"] == "manyheads.demo"]
        return sorted(demos, key=date)[-1:]
    prefixes = TABLES[name]
    cases = [r for r in records if r["format"] != "manyheads.demo"]
    return newest([r for r in cases if r["case"]["name"].startswith(prefixes)])


if __name__ == "__main__":
    sys.exit(main())
