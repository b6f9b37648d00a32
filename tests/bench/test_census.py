"""Census of timm's isotropic vision transformers that are reduced: the number is kept."""

import pytest
import timm

from bench import census

REFUSED = ("cait_", "convit_", "gemma4_", "samvit_", "vit_dwee", "vit_dlittle", "vit_dpwee")


def test_names_by_family():
    names = census.isotropic()
    assert len(names) >= 300 or timm.__version__ < "1.0.20"
    assert census.isotropic("deit_*") == [name for name in names if name.startswith("deit_")]
    assert census.checkpoints("deit_small_patch16_224") == 1


# Of every module and kind of block one; ``python -m bench.census`` tries them all: 302 of 326 in timm 1.0.31.
@pytest.mark.parametrize(
    "name",
    [
        *(
            "vit_small_patch16_dinov3",
            "eva02_tiny_patch14_224",
            "vit_pe_core_tiny_patch16_384",
            "beit_base_patch16_224",
        ),
        *("vit_relpos_small_patch16_224", "vit_base_patch16_xp_224", "vit_small_patch16_18x2_224"),
        *("naflexvit_base_patch16_gap", "qwen3_vit_88m", "deit_tiny_distilled_patch16_224", "vit_tiny_r_s16_p8_224"),
        *("cait_xxs24_224", "convit_tiny", "vit_dwee_patch16_reg1_gap_256"),
    ],
)
def test_one_of_every_kind(name):
    if name not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {name}")
    reason = census.outcome(name)
    assert (reason is None) == (not name.startswith(REFUSED)), reason
    assert reason is None or "cannot be reduced: " in reason


def test_it_is_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["census", "--pattern", "vit_tiny_patch16_2*", "--refused"])
    assert census.main() == 0
    assert "1 of 1 names (100.0%)" in capsys.readouterr().out
