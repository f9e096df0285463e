"""Every model that timm registers is converted or refused with a reason."""

from __future__ import annotations

import re

import pytest
import timm
from tools import census

import manyheads as mh
from manyheads.errors import NothingToConvert, SwapRefused, UnknownHost
from tests.hosts import laws

FAMILIES = census.families()
PAGE = census.PAGE.read_text(encoding="utf-8")
# Words of paths where attention-like or mlp-like layers are something else.
ELSEWHERE = {
    "attn_pool",
    "head",
    "head_dist",
    "se",
    "cpb_mlp",
    "rel_pos",
    "pos_embed",
    "rope",
    "norm",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_as_its_page_says(family: str) -> None:
    findings = list(census.walk(FAMILIES[family]))
    for name, finding in findings:
        for path in (*finding.paths, *finding.outputs):
            assert not ELSEWHERE & set(path.split(".")), f"{name}: {path}"
        assert "yes" in finding.answers or finding.reasons, name
    written = [row for row in census.table_on(PAGE) if row.startswith(f"| {family} |")]
    assert census.rows_of(family, findings) == written, (
        "run `python -m tools.census` and look at what changed"
    )


def test_the_page_has_all_models_and_no_others() -> None:
    rows = census.table_on(PAGE)[2:]
    counted: dict[str, int] = {}
    for row in rows:
        family, count = (cell.strip() for cell in row.split("|")[1:3])
        counted[family] = counted.get(family, 0) + int(count)
    assert counted == {family: len(names) for family, names in FAMILIES.items()}
    assert sum(counted.values()) > 1300


def test_every_no_has_a_reason() -> None:
    for row in census.table_on(PAGE)[2:]:
        *answers, reason = (cell.strip() for cell in row.split("|")[4:-1])
        assert "no" not in answers or reason, row


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "windowed, with a relative bias"),
        ("hiera_tiny_224", "windowed"),
        ("beit_base_patch16_224", "relative bias"),
        ("vit_relpos_small_patch16_224", "relative bias"),
        ("cait_xxs24_224", "class attention is linear in tokens"),
        ("xcit_nano_12_p16_224", "channel attention is linear in tokens"),
        ("vit_base_patch16_xp_224", "parallel block"),
        ("resnet18", "convolutional"),
        ("mixer_s32_224", "fixed matrices"),
        ("sequencer2d_s", "recurrent"),
        ("caformer_s18", "feature maps"),
    ],
)
@pytest.mark.parametrize("mechanism", census.RECIPES)
def test_refusals_name_the_reason(name: str, reason: str, mechanism: str) -> None:
    model = timm.create_model(name, device="meta")
    with pytest.raises(UnknownHost, match=re.escape(reason)):
        mh.preview(model, census.RECIPES[mechanism])


def test_identity_holds_where_layers_sit_inside_a_convolutional_network() -> None:
    for name in ("csatv2", "mobilevit_xxs"):
        laws.identity_law(laws.randomise(timm.create_model(name)))


@pytest.mark.parametrize(
    "name",
    [
        "crossvit_tiny_240",
        "csatv2",
        "mobilevit_xxs",
        "naflexvit_base_patch16_gap",
        "pit_ti_224",
    ],
)
def test_landmarks_are_refused_where_rows_and_columns_are_not_known(name: str) -> None:
    model = timm.create_model(name, device="meta")
    with pytest.raises(SwapRefused, match="no rows and columns that are known"):
        mh.preview(model, census.RECIPES["Interactive"])


# The whole preview, costs included, of one model per kind of supported model.
SUPPORTED = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch16_dinov3",
    "naflexvit_base_patch16_gap",
    "crossvit_tiny_240",
    "pit_ti_224",
    "mobilevit_xxs",
    "csatv2",
    "qwen3_vit_88m",
]


@pytest.mark.parametrize("mechanism", census.RECIPES)
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_preview_shows_the_blocks_or_says_why_not(name: str, mechanism: str) -> None:
    model = timm.create_model(name, device="meta")
    finding = census.examine(model)
    if finding.answers[list(census.RECIPES).index(mechanism)] == "no":
        with pytest.raises((SwapRefused, NothingToConvert)):
            mh.preview(model, census.RECIPES[mechanism])
        return
    shown = mh.preview(model, census.RECIPES[mechanism])
    assert mechanism in str(shown)
    assert {row.path for row in shown.rows} <= {
        path.rpartition(".")[0] for path in finding.paths
    }


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", census.RECIPES)
@pytest.mark.parametrize("name", census.examples_on(PAGE))
def test_every_line_that_says_yes_can_be_previewed(name: str, mechanism: str) -> None:
    test_a_preview_shows_the_blocks_or_says_why_not(name, mechanism)


def test_a_preview_reports_what_is_left_alone_by_rule() -> None:
    model = timm.create_model("crossvit_tiny_240", device="meta")
    shown = mh.preview(model, census.RECIPES["Hydra"])
    assert len(shown.left_alone) == 1
    assert "class attention (CrossAttention) at" in str(shown)
