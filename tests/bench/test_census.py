"""Census of timm's isotropic vision transformers that are reduced: the number is kept."""

import pytest
import timm

from bench import census

REFUSED = ("convit_", "samvit_")


def test_names_by_family():
    names = census.isotropic()
    assert len(names) >= 300 or timm.__version__ < "1.0.20"
    assert census.isotropic("deit_*") == [name for name in names if name.startswith("deit_")]
    assert census.checkpoints("deit_small_patch16_224") == 1


# What ``python -m bench.census --kinds`` prints with timm 1.0.31: one name of every structure, and how many share it.
KINDS = {
    "aimv2_1b_patch14_224": 38,
    "eva_large_patch14_196": 6,
    "beit_base_patch16_224": 7,
    "cait_m36_384": 10,
    "convit_base": 3,
    "deepseek_vit_412m": 2,
    "deepseek_vit_412m_enc": 1,
    "test_vit": 71,
    "deit_base_distilled_patch16_224": 4,
    "eva02_base_patch14_224": 8,
    "eva02_base_patch16_clip_224": 3,
    "eva02_enormous_patch14_clip_224": 1,
    "eva_giant_patch14_224": 3,
    "eva_giant_patch14_clip_224": 1,
    "gemma4_vit_167m": 2,
    "gemma4_vit_167m_enc": 2,
    "naflexvit_base_patch16_gap": 3,
    "naflexvit_base_patch16_map": 2,
    "naflexvit_base_patch16_radio_v3": 4,
    "naflexvit_base_patch16_siglip": 2,
    "naflexvit_huge_patch16_radio_v4": 2,
    "naflexvit_so150m2_patch16_reg1_gap": 1,
    "qwen3_vit_88m": 6,
    "qwen3_vit_88m_enc": 3,
    "samvit_base_patch16": 4,
    "test_vit2": 9,
    "test_vit3": 1,
    "test_vit_relpos": 7,
    "vit_5b_patch16_sapiens2": 1,
    "vit_7b_patch16_dinov3": 12,
    "vit_base_mci_224": 14,
    "vit_base_patch14_reg1_tipsv2": 4,
    "vit_base_patch14_reg4_dinov2": 4,
    "vit_base_patch16_18x2_224": 2,
    "vit_base_patch16_lingbot": 4,
    "vit_base_patch16_radio_v3": 4,
    "vit_base_patch16_reg4_gap_256": 9,
    "vit_base_patch16_rope_224": 12,
    "vit_base_patch16_rope_reg1_gap_256": 3,
    "vit_base_patch16_rpn_224": 1,
    "vit_base_patch16_sapiens2": 1,
    "vit_base_patch16_siglip_224": 16,
    "vit_base_patch16_xp_224": 3,
    "vit_betwixt_patch16_rope_reg4_gap_256": 1,
    "vit_dwee_patch16_reg1_gap_256": 2,
    "vit_dpwee_patch16_reg1_gap_256": 1,
    "vit_giant_patch16_sapiens2": 1,
    "vit_huge_patch16_radio_v4": 2,
    "vit_huge_patch16_sapiens2": 1,
    "vit_large_patch16_sapiens2": 1,
    "vit_pe_core_base_patch16_224": 4,
    "vit_pe_core_gigantic_patch14_448": 1,
    "vit_pe_lang_gigantic_patch14_448": 2,
    "vit_pe_lang_large_patch14_448": 5,
    "vit_pwee_patch16_reg1_gap_256": 1,
    "vit_relpos_base_patch16_cls_224": 2,
    "vit_relpos_base_patch16_clsgap_224": 1,
    "vit_relpos_base_patch16_rpn_224": 4,
    "vit_so150m_patch16_reg4_map_256": 1,
}


def _tries():
    for name in KINDS:
        known = name in timm.list_models()
        yield pytest.param(name, marks=[] if known else pytest.mark.skip(f"timm {timm.__version__} has no {name}"))


@pytest.mark.parametrize("name", list(_tries()))
def test_one_of_every_structure(name):
    reason = census.outcome(name, depth=2)
    assert (reason is None) == (not name.startswith(REFUSED)), reason
    assert reason is None or "cannot be reduced: " in reason


def test_the_share_of_names():
    """At least 94 in 100 names are of a structure that is reduced."""
    reduced = sum(count for name, count in KINDS.items() if not name.startswith(REFUSED))
    assert reduced >= 0.94 * sum(KINDS.values())
    if timm.__version__ == "1.0.31":
        assert sum(KINDS.values()) == len(census.isotropic())
        names = census.isotropic()
        kept = sum(census.checkpoints(name) for name in names if not name.startswith(REFUSED))
        assert kept >= 0.95 * sum(census.checkpoints(name) for name in names)


def test_structures_are_told_apart():
    same = census.kinds(["vit_tiny_patch16_224", "vit_base_patch16_224", "vit_base_patch16_xp_224", "cait_xxs24_224"])
    assert sorted(map(len, same.values())) == [1, 1, 2]


def test_it_is_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["census", "--pattern", "vit_tiny_patch16_2*", "--refused"])
    assert census.main() == 0
    assert "1 of 1 name (100.0%)" in capsys.readouterr().out
