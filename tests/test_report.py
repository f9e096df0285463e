"""report: one page from a run's JSON, looked at in a real browser if there is one."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import manyheads as mh
from manyheads.errors import DataError
from manyheads.report import report
from tests.helpers import tiny_vit

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome")
     if (found := shutil.which(name))),
    None,
)  # fmt: skip
in_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium"
)


def _run(folder: Path, **changes: Any) -> Path:
    """A run as the demo records it, with its pictures beside it."""
    recipe = mh.Recipe(mh.Swap(blocks=[1, 2], attention=mh.Hydra()))
    costs = {"parameters": 306_000, "flops": 22_000_000, "latency_ms": 2.0}
    run = {
        "title": "A tiny run",
        "rows": [
            {"model": "softmax", "accuracy_before": 0.981, "peak_mib": 100.0} | costs,
            {
                "model": "Hydra <b>&",
                "accuracy_before": 0.981,
                "accuracy_swapped": 0.4,
                "accuracy_healed": 0.97,
                "peak_mib": None,
            }
            | costs
            | {"latency_ms": 2.5, "flops": 11_000_000},
        ],
        "large": [
            {"model": model, "image_size": [size, size], "latency_ms": ms}
            for model, size, ms in [
                ("softmax", 224, 60.0),
                ("Hydra", 224, 50.0),
                ("softmax", 1024, 3000.0),
                ("Hydra", 1024, 900.0),
            ]
        ],
        "converted": mh.preview(tiny_vit(), recipe).to_json(),
        "figures": [{"file": "maps.png", "caption": "Maps of block 1"}],
        "conditions": {"torch": "2.15", "machine": {"threads": 1}},
    } | changes
    Image.new("RGB", (800, 300), "orange").save(folder / "maps.png")
    (folder / "run.json").write_text(json.dumps(run))
    return folder


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    path = report(_run(tmp_path))
    assert path == tmp_path / "report.html"
    page = path.read_text()
    for fact in ("A tiny run", "98.1 %", "40.0 %", "97.0 %", "0.011 (0.50)"):
        assert fact in page, fact
    assert "machine.threads" in page
    assert "blocks.1" in page
    assert "Maps of block 1" in page
    tags = _Tags(page)
    addresses = [a.get(key) for _, a in tags.found for key in ("src", "href")]
    assert all(a is None or a.startswith("data:") for a in addresses)
    assert "http" not in re.sub(r'content="[^"]*"|http-equiv', "", page)
    assert all(image["alt"] for image in tags.of("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in tags.of("svg"))


def test_losses_are_marked_and_stay_in_the_table(tmp_path: Path) -> None:
    page = report(_run(tmp_path)).read_text()
    assert re.search(r'2\.50 \(1\.25\) <span class="loss"', page)
    assert re.search(r'97\.0 % <span class="loss"', page)
    assert not re.search(r'0\.011 \(0\.50\) <span class="loss"', page)


def test_names_from_the_file_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = {"rows": [{"model": evil}], "title": evil, "conditions": {evil: evil}}
    page = report(_run(tmp_path, **run)).read_text()
    assert evil not in page
    assert page.count("&lt;script&gt;") >= 4


def test_what_was_not_recorded_is_said_to_be_missing(tmp_path: Path) -> None:
    nothing = {"converted": None, "large": [], "figures": [], "conditions": {}}
    page = report(_run(tmp_path, **nothing)).read_text()
    for what in ("block by block", "latency at several sizes", "maps", "conditions"):
        assert f"Not recorded in this run: {what}" in page


def test_numbers_that_are_none_count_as_not_recorded(tmp_path: Path) -> None:
    odd = {"flops": math.nan, "latency_ms": math.inf, "peak_mib": "much"}
    sized = [{"model": m, "image_size": [64, 64], "latency_ms": x}
             for m, x in (("a", 0.0), ("b", -3.0), ("c", 2.0))]  # fmt: skip
    run = {"rows": [{"model": "a"} | odd, {"model": "b", "flops": 1e9}], "large": sized}
    page = report(_run(tmp_path, **run)).read_text()
    assert not re.search(r">\W*(nan|inf)\b", page)
    assert "c: 2 at 64" in page
    assert "a: 0" not in page


def test_further_pictures_are_taken_along(tmp_path: Path) -> None:
    Image.new("RGB", (5, 5)).save(tmp_path / "more.jpg")
    path = tmp_path / "page.html"
    run = _run(tmp_path) / "run.json"
    report(run, path, figures={"One more": tmp_path / "more.jpg"})
    assert "data:image/jpeg;base64," in path.read_text()


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"rows": None, "large": None, "converted": None}, "none of rows, large"),
        ({"rows": [1]}, "'rows' is no list of models"),
        ({"large": [{"model": "a"}]}, r"row 0 has image_size=None.*\[height, width\]"),
        ({"large": [{"model": "a", "image_size": [0, 9]}]}, r"image_size=\[0, 9\]"),
        ({"converted": [1]}, r"'converted' is not what preview"),
        ({"converted": {"rows": ["x"]}}, r"'converted' is not what preview"),
        ({"converted": {"rows": [{"parameters": 5}]}}, "row 0 has parameters=5, "),
        (
            {"converted": {"rows": [{}, {"flops": [1, None]}]}},
            r"row 1 has flops=\[1, N",
        ),
        (
            {"converted": {"rows": [{"flops": [1, 2, 3]}]}},
            r"row 0 has flops=\[1, 2, 3\]",
        ),
        ({"figures": "maps.png"}, "'figures' is no list of objects"),
        ({"figures": [{"file": "../x.png"}]}, r"'\.\./x\.png' is not beside it"),
        ({"figures": [{"file": "absent.png"}]}, r"absent\.png.*cannot be read"),
        ({"figures": [{"file": "run.json"}]}, r"no \.png or \.jpg"),
    ],
)
def test_a_run_that_cannot_be_shown_is_named(
    changes: dict[str, Any], facts: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=facts):
        report(_run(tmp_path, **changes))
    assert not (tmp_path / "report.html").exists()


def test_files_that_are_not_there_or_no_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither run\.json nor demo\.json"):
        report(tmp_path)
    with pytest.raises(DataError, match=r"absent\.json.*cannot be read"):
        report(tmp_path / "absent.json")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        report(tmp_path)
    with pytest.raises(DataError, match="cannot be written"):
        report(_run(tmp_path), tmp_path / "absent" / "page.html")


def _browse(page: Path, *options: str, width: int = 1280) -> tuple[str, str]:
    """Open a page in a real browser; give its document and what its console said."""
    assert CHROMIUM is not None
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    size = f"--window-size={width},2400"
    done = subprocess.run(
        [CHROMIUM, *common, profile, size, *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(said)


def _with_script(page: Path, script: str) -> Path:
    text = page.read_text().replace("</body>", f"<script>{script}</script></body>")
    copied = page.with_name("scripted.html")
    copied.write_text(text)
    return copied


@in_browser
def test_in_a_browser_tables_sort_both_ways_without_console_errors(
    tmp_path: Path,
) -> None:
    page = report(_run(tmp_path))
    script = (
        "const t=[...document.querySelectorAll('table')].find("
        "t=>t.caption.textContent.startsWith('Ratio to the first model'));"
        "const b=t.querySelectorAll('thead button')[4];const seen=[];"
        "for(let i=0;i<2;i++){b.click();seen.push([...t.tBodies[0].rows].map("
        "r=>parseFloat(r.cells[4].dataset.key)).join(' ')"
        "+' '+b.parentElement.getAttribute('aria-sort'))}"
        "document.title=seen.join(' | ');"
    )
    document, said = _browse(_with_script(page, script), "--dump-dom")
    assert said == ""
    assert (
        "<title>50 60 900 3000 ascending | 3000 900 60 50 descending</title>"
        in document
    )


@in_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_spills_over_the_side(width: int, tmp_path: Path) -> None:
    page = report(_run(tmp_path))
    script = "document.title='wide '+document.documentElement.scrollWidth;"
    inner = _with_script(page, script)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="{inner.name}" style="width:{width}px;height:2000px;border:0">'
        "</iframe><script>onload=()=>{document.title='spill '"
        "+frames[0].document.title}</script>"
    )
    document, said = _browse(
        frame, "--dump-dom", "--allow-file-access-from-files", width=1400
    )
    assert said == ""
    found = re.search(r"<title>spill wide (\d+)</title>", document)
    assert found, document[:300]
    assert int(found[1]) <= width


@in_browser
@pytest.mark.parametrize(
    ("scheme", "dark"), [(0, True), (1, False)], ids=["dark", "light"]
)
def test_in_a_browser_the_page_follows_light_and_dark(
    scheme: int, dark: bool, tmp_path: Path
) -> None:
    page = report(_run(tmp_path))
    shot = tmp_path / "shot.png"
    _, said = _browse(
        page,
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--screenshot={shot}",
    )
    assert said == ""
    with Image.open(shot) as picture:
        grey = picture.convert("L")
        corner = grey.getpixel((4, 4))
        assert isinstance(corner, int)
        assert (corner < 64) is dark
        low, high = grey.crop((0, 0, 1280, 300)).getextrema()
        assert high - low > 150, "text stands out from the ground"
