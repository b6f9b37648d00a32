"""``fastreduce study …`` on the real digits: one model, trained for one epoch, goes through every command."""

import csv
import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")

import typer
from typer.testing import CliRunner

from fastreduce.commands import app
from fastreduce.study.recipe import DIGITS
from fastreduce.study_commands import _backbone, _recipe, study

TOPK = ("--method", "topk", "--keep-rate", "0.5")
top = typer.Typer(cls=app.info.cls)
top.add_typer(study, name="study")


def run(*arguments):
    return CliRunner().invoke(top, ["study", *map(str, arguments)])


def refused(*arguments):
    """What the one line on stderr says."""
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def weights(folder):
    options = ("--epochs", 1, "--batch-size", 256, "--cpu", "--out", folder / "topk")
    done = run("train", *TOPK, *options)
    assert done.exit_code == 0, done.output
    assert "top1" in done.stdout
    assert refused("train", "--method", "topk", "--keep-rate", 0.7, *options).count("another training") == 1
    return folder / "topk" / "model.safetensors"


def test_a_model_goes_through_all_commands(folder, weights):
    judged = run("evaluate", weights, *TOPK, "--cpu")
    assert judged.exit_code == 0, judged.output
    found = json.loads(judged.stdout)
    assert found["tokens"] == [32.0, 16.0, 8.0]
    for name, options in (("topk", TOPK), ("radial", ("--method", "radial-l1", "--keep-rate", "0.5"))):
        done = run("record", weights, folder / f"{name}.safetensors", *options, "--cpu")
        assert done.exit_code == 0, done.output
    recordings = [folder / f"{name}.safetensors" for name in ("topk", "radial")]
    done = run("compare", *recordings, "--out", folder / "new" / "c.csv")
    assert done.exit_code == 0, done.output
    assert {path.name for path in (folder / "new").iterdir()} == {"c.csv", "c-correlations.csv", "c-depth.csv"}
    with open(folder / "new" / "c.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["method_a"] for row in rows] == ["topk", "radial_l1"]
    assert float(rows[0]["accuracy_a"]) == pytest.approx(found["accuracy"]["top1"], abs=1e-4)
    assert 0 < float(rows[0]["iou_3"]) < 1
    assert "differ in keep_rate alone: topk" in refused("compare", *recordings, "--axis", "keep_rate")
    assert "'colour'" in refused("compare", *recordings, "--axis", "colour")


def test_every_refusal_names_what_was_given(folder, weights):
    out = ("--out", folder / "refused")
    assert "'foo'" in refused("run", "--methods", "topk,foo", *out)
    assert "got 1.5" in refused("run", "--keep-rate", "1.5", *out)
    assert "'topk-l1'" in refused("train", "--method", "topk-l1", "--keep-rate", 0.5, *out)
    assert "--keep-rate 0.5 alone" in refused("train", "--keep-rate", 0.5, *out)
    assert "'mnist'" in refused("train", "--dataset", "mnist", *out)
    assert "/nowhere/train" in refused("train", "--dataset", "imagenet", "--root", "/nowhere", *out)
    assert "imagenet needs a trained backbone" in refused("run", "--dataset", "imagenet", *out)
    assert "nowhere.safetensors" in refused("evaluate", "nowhere.safetensors")
    assert "does not fit" in refused("evaluate", weights, "--method", "sit", "--keep-rate", 0.5)
    (folder / "nus_wid_data.csv").write_text('a.jpg,"[1,2",train\n')
    assert "line 1: '[1,2'" in refused("train", "--dataset", "nuswide", "--root", folder, *out)
    assert "words.json is not a recording" in refused("compare", _words(folder))
    assert not (folder / "refused").exists()


def _words(folder):
    (folder / "words.json").write_text("{}")
    return folder / "words.json"


def test_a_part_of_the_study_is_made_as_in_the_whole():
    backbone = _backbone("digits", None, None, False)
    part = _recipe("digits", False, ["dpcknn", "radial"], ["0.25"], None, None, 0, backbone)
    assert all(one in DIGITS.reductions for one in part.reductions)
    assert [one.variant for one in part.reductions] == ["dpcknn", "radial_l2"]
