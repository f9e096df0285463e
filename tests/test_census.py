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
REFUSALS = (UnknownHost, SwapRefused, NothingToConvert)
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
    findings = []
    for name in FAMILIES[family]:
        model = timm.create_model(name, device="meta")
        finding = census.examine(model)
        findings.append((name, finding))
        for mechanism, answer in zip(census.RECIPES, finding.answers, strict=True):
            if answer == "no":  # which preview says before it counts, so all are asked
                with pytest.raises(REFUSALS):
                    mh.preview(model, census.RECIPES[mechanism])
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


# The whole preview, costs included, of one model per line of the table that says yes.
SUPPORTED = [
    "crossvit_9_240",
    "csatv2",
    "deepseek_vit_412m_enc",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "mobilevit_xxs",
    "naflexvit_base_patch16_gap",
    "naflexvit_base_patch16_map",
    "nextvit_small",
    "pit_ti_224",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "test_vit",
    "test_vit3",
    "vit_pe_core_tiny_patch16_384",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
]


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_preview_shows_the_blocks_or_says_why_not(name: str) -> None:
    _, problems = census.previewed(timm.create_model(name, device="meta"))
    assert not problems


def test_a_model_of_every_line_that_says_yes_is_previewed() -> None:
    of = {name: family for family, names in FAMILIES.items() for name in names}
    lines = sorted(of[name] for name in census.examples_on(PAGE))
    assert sorted(of[name] for name in SUPPORTED) == lines


@pytest.mark.slow
@pytest.mark.parametrize("name", census.examples_on(PAGE))
def test_every_line_that_says_yes_can_be_previewed(name: str) -> None:
    test_a_preview_shows_the_blocks_or_says_why_not(name)


def test_the_page_tells_of_a_whole_run_of_previews() -> None:
    """Written by `python -m tools.census --preview`; the table moved if this fails."""
    assert census.previewed_line(*census.answers_on(PAGE)) in PAGE


def test_a_preview_reports_what_is_left_alone_by_rule() -> None:
    model = timm.create_model("crossvit_tiny_240", device="meta")
    shown = mh.preview(model, census.RECIPES["Hydra"])
    assert len(shown.left_alone) == 1
    assert "class attention (CrossAttention) at" in str(shown)
