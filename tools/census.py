"""Ask of every model that timm registers whether it can be converted, or why not.

    python -m tools.census              writes docs/families.md
    python -m tools.census pvt_v2 eva   asks these families again
    python -m tools.census --preview    asks `preview` itself, costs and all, in
                                        twenty minutes of a core; writes its line

Every model is built on the meta device, without weights, and asked with one recipe per
mechanism. `tests/test_census.py` asks again, family by family, and compares.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
from torch import nn

import manyheads as mh
from manyheads.conversion import Preview
from manyheads.errors import NothingToConvert, SwapRefused, UnknownHost
from manyheads.hosts import find_host
from manyheads.surgery import plan_swaps

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
RECIPES = {
    "Hydra": mh.Recipe(mh.Swap(attention=mh.Hydra())),
    "Interactive": mh.Recipe(mh.Swap(attention=mh.Interactive())),
    "Hallucinated": mh.Recipe(mh.Swap(attention=mh.Hallucinated())),
    "Compact": mh.Recipe(mh.Swap(ffn=mh.Compact())),
}
_START, _END = "<!-- census: begin -->", "<!-- census: end -->"
_ASKED, _TOLD = "<!-- previewed: begin -->", "<!-- previewed: end -->"


@dataclass(frozen=True)
class Finding:
    """What one model answers.

    Attributes:
        paths: Attention layers that would be swapped; empty for a refused model.
        answers: "yes" or "no" per recipe.
        reasons: Every "no" in words, and what is left alone by rule.
        outputs: Output matrices of feed-forward layers that would be swapped.
    """

    paths: tuple[str, ...]
    answers: tuple[str, ...]
    reasons: tuple[str, ...]
    outputs: tuple[str, ...] = ()


def families() -> dict[str, list[str]]:
    """Group timm's registered models by the file that defines them."""
    grouped: dict[str, list[str]] = {}
    for name in timm.list_models():
        package, _, module = timm.model_entrypoint(name).__module__.rpartition(".")
        if package != "timm.models":
            continue  # somebody else's, registered with timm: this package's own, too
        grouped.setdefault(module, []).append(name)
    return dict(sorted(grouped.items()))


def examine(model: nn.Module) -> Finding:
    """Ask one model with every recipe; only named refusals are answers."""
    try:
        host, sites = find_host(model)
    except UnknownHost as refusal:
        return Finding((), ("no",) * len(RECIPES), (refusal.found,))
    answers, reasons = [], []
    for name, recipe in RECIPES.items():
        try:
            operations = plan_swaps(model, sites, recipe)
        except (SwapRefused, NothingToConvert) as refusal:
            answers.append("no")
            reasons.append(f"{name}: {refusal.found.partition(' (at ')[0]}")
            continue
        answers.append("yes")
        exempt = {op.left_alone for op in operations if op.left_alone}
        reasons += [f"{name}: {reason} (in some blocks)" for reason in sorted(exempt)]
    left_alone = sorted({w.rpartition(" at ")[0] for w in host.left_alone(model)})
    reasons += [f"left alone, linear already: {layer}" for layer in left_alone]
    paths = tuple(site.attention_path for site in sites)
    outputs = tuple(site.ffn_path for site in sites if site.ffn_path)
    return Finding(paths, tuple(answers), tuple(reasons), outputs)


def rows_of(family: str, findings: Iterable[tuple[str, Finding]]) -> list[str]:
    """Give a family's lines of the table, one per different answer."""
    grouped: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for name, finding in findings:
        grouped.setdefault((finding.answers, finding.reasons), []).append(name)
    return [
        f"| {family} | {len(names)} | `{names[0]}` | {' | '.join(answers)} | "
        f"{'; '.join(reasons)} |"
        for (answers, reasons), names in grouped.items()
    ]


def walk(names: Iterable[str]) -> Iterator[tuple[str, Finding]]:
    """Build models one after the other, on the meta device, and ask them."""
    for name in names:
        yield name, examine(timm.create_model(name, device="meta"))


def table_on(page: str) -> list[str]:
    """Read the generated lines out of the page."""
    table = page.partition(_START)[2].partition(_END)[0]
    return [line for line in table.splitlines() if line.startswith("|")]


def examples_on(page: str) -> list[str]:
    """Name the example of every line that says yes to some recipe."""
    cells = [[cell.strip() for cell in row.split("|")] for row in table_on(page)]
    return [row[3].strip("`") for row in cells if "yes" in row[4:-2]]


def previewed(model: nn.Module) -> tuple[tuple[str, ...], list[str]]:
    """Ask `preview` itself with every recipe, and hold it to what the planner says.

    Returns:
        "yes" or "no" per recipe, and whatever is wrong.
    """
    finding = examine(model)
    answers, problems = [], []
    for name, expected in zip(RECIPES, finding.answers, strict=True):
        try:
            shown = mh.preview(model, RECIPES[name])
        except (UnknownHost, SwapRefused, NothingToConvert) as refusal:
            answer, wrong = "no", "" if refusal.found else "refused without a reason"
        except Exception as error:
            answer, wrong = "no", f"{type(error).__name__}: {error}"
        else:
            answer, wrong = "yes", _wrong_with(shown, name, finding)
        if not wrong and answer != expected:
            wrong = f"answered {answer} where the planner says {expected}"
        answers.append(answer)
        problems += [f"{name}: {wrong}"] * bool(wrong)
    return tuple(answers), problems


def _wrong_with(shown: Preview, mechanism: str, finding: Finding) -> str:
    blocks = {path.rpartition(".")[0] for path in finding.paths}
    strange = {row.path for row in shown.rows} - blocks
    swapped = [row for row in shown.rows if row.was != row.becomes]
    if strange:
        return f"these are no blocks: {sorted(strange)}"
    if not any(mechanism in row.becomes for row in swapped):
        return "no block becomes what was asked for"
    if any(min(*row.flops, *row.parameters) <= 0 for row in swapped):
        return "a block costs nothing"
    return ""


def preview_all() -> None:
    """Preview every model with every recipe, and write on the page what was seen."""
    began, models, said, problems = time.monotonic(), 0, [], []
    for family, names in families().items():
        for name in names:
            answers, wrong = previewed(timm.create_model(name, device="meta"))
            models, said = models + 1, [*said, *answers]
            problems += [f"{name}: {each}" for each in wrong]
        passed = time.monotonic() - began
        sys.stderr.write(f"{family}: {models} models, {passed:.0f} s\n")
    told = previewed_line(models, said.count("yes"), said.count("no"))
    sys.stderr.write("\n".join([told, *problems, ""]))
    if problems:
        sys.exit(1)
    _write_between(_ASKED, _TOLD, told)


def previewed_line(models: int, yes: int, no: int) -> str:
    """Say what `preview` answered, for the page."""
    return (
        f"`preview` itself was asked {models:,} x {len(RECIPES)} times: {yes:,} times "
        f"it showed the blocks, {no:,} times it refused with a reason, and the table "
        "says the same of each."
    )


def answers_on(page: str) -> tuple[int, int, int]:
    """Count models, yes and no on the page's table."""
    models = yes = no = 0
    for row in table_on(page)[2:]:
        _, count, _, *answers = (cell.strip() for cell in row.split("|")[1:-2])
        models += int(count)
        yes += int(count) * answers.count("yes")
        no += int(count) * answers.count("no")
    return models, yes, no


def _write_between(start: str, end: str, text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(start)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def main(chosen: list[str]) -> None:
    """Write the table into the page, between its two marks.

    Args:
        chosen: Families to ask again; the others keep the lines they have. All of
            them if none is named. Or `--preview` alone.
    """
    if chosen == ["--preview"]:
        preview_all()
        return
    page = PAGE.read_text(encoding="utf-8")
    head = ["family", "models", "such as", *RECIPES, "why not, what is left alone"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for family, names in families().items():
        if chosen and family not in chosen:
            start = f"| {family} |"
            lines += [row for row in table_on(page) if row.startswith(start)]
            continue
        lines += rows_of(family, walk(names))
        sys.stderr.write(f"{family}\n")
    _write_between(_START, _END, "\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
