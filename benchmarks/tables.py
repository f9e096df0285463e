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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.records import FORMAT as STUDY
from benchmarks.accuracy.records import read as read_study
from benchmarks.accuracy.table import accuracy_table, healing_table
from benchmarks.cases import targets_of
from benchmarks.records import FORMAT, RESULTS, date, newest, read_records
from benchmarks.render import render
from benchmarks.render.cells import Record
from benchmarks.render.targets import render_all_targets

__all__ = ["TABLES", "Table", "main", "of_cases", "of_kinds", "of_study", "rewrite"]

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Table:
    """What stands between the comments of one name.

    Attributes:
        select: Picks the records to show out of all that there are.
        render: Writes them; must say something where there are none.
    """

    select: Callable[[Sequence[Record]], list[Record]]
    render: Callable[[Sequence[Record]], str] = render


def of_cases(*prefixes: str) -> Table:
    """Show the newest record of each machine and case whose name begins like this."""

    def select(records: Sequence[Record]) -> list[Record]:
        return newest(
            [
                record
                for record in records
                if record["format"] == FORMAT
                and record["case"]["name"].startswith(prefixes)
            ]
        )

    return Table(select=select)


def of_kinds(*kinds: str) -> Table:
    """Show the newest record of each machine and case of these kinds."""

    def select(records: Sequence[Record]) -> list[Record]:
        return newest(
            [
                record
                for record in records
                if record["format"] == FORMAT and record["kind"] in kinds
            ]
        )

    return Table(select=select)


def of_study(render: Callable[[Sequence[Record]], str]) -> Table:
    """Show what a renderer takes of the accuracy study's cells, in one table."""

    def select(records: Sequence[Record]) -> list[Record]:
        return [record for record in records if record["format"] == STUDY]

    return Table(select=select, render=render)


def _newest_demo(records: Sequence[Record]) -> list[Record]:
    demos = [r for r in records if r["format"] == "manyheads.demo"]
    return sorted(demos, key=date)[-1:]


def _with_targets(records: Sequence[Record]) -> list[Record]:
    cases = newest([r for r in records if r["format"] == FORMAT])
    return [record for record in cases if targets_of(record["case"]["name"])]


# A new table is one more line; the name is what the comments say.
TABLES: dict[str, Table] = {
    "accuracy": of_study(accuracy_table),
    "blocks": of_cases("hallucinated_block_"),
    "compact": of_cases("hallucinated_deit_"),
    "core": of_cases("hydra_core_"),
    "demo": Table(select=_newest_demo),
    "exported": of_kinds("exported"),
    "gpu": of_cases("gpu_"),
    "hallucinated": of_cases("hallucinated_core_", "hallucinated_attention_"),
    "healing": of_study(healing_table),
    "interactive": of_cases("interactive_"),
    "ivit": of_cases("ivit_"),
    "models": of_cases("hydra_deit_"),
    "peers": of_cases("peers_"),
    "scaling": of_cases("scaling_"),
    "wide": of_cases("wide_values_"),
    "targets": Table(select=_with_targets, render=render_all_targets),
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
    records = [*read_records(results), *read_study(results / "accuracy")]
    stale = []
    for path in [root / "README.md", *sorted(root.glob("docs/**/*.md"))]:
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        try:
            fresh = rewrite(text, records)
        except KeyError as error:
            known = ", ".join(sorted(TABLES))
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


def rewrite(text: str, records: Sequence[Record]) -> str:
    """Put fresh tables between the comments of a text.

    Raises:
        KeyError: A comment names no table.
    """

    def fresh(block: re.Match[str]) -> str:
        table = TABLES[block["name"]]
        shown = table.render(table.select(records))
        return f"{block['open']}\n{shown}\n\n{block['close']}"

    return _BLOCK.sub(fresh, text)


if __name__ == "__main__":
    sys.exit(main())
