"""``fastreduce study …`` on the real digits: one model, trained for one epoch, goes through every command."""

import csv
import dataclasses
import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")

import torch
import typer
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from fastreduce.commands import UserError, app
from fastreduce.study.data import open_data
from fastreduce.study.protocol import Backbone, Protocol, protocol_for
from fastreduce.study.recipe import DIGITS, _teacher
from fastreduce.study_commands import _backbone, _changed, _Changes, _recipe, _taught_by, _training_errors, study

from .test_study_data import write_imagenet

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
    options = ("--epochs", 1, "--batch-size", 256, "--clip-norm", 1, "--ema", 0.5, "--cpu", "--out", folder / "topk")
    done = run("train", *TOPK, *options)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("top1") == 2
    assert "model_ema.safetensors" in done.stdout
    assert refused("train", "--method", "topk", "--keep-rate", 0.7, *options).count("another training") == 1
    return folder / "topk" / "model.safetensors"


def test_a_model_goes_through_all_commands(folder, weights):
    history = json.loads((weights.parent / "training.json").read_text())
    assert history["description"]["protocol"]["clip_norm"] == 1
    trained = history["epochs"][0]
    judged = run("evaluate", weights.parent, *TOPK, "--ema", "--rounds", 2, "--cpu")
    assert judged.exit_code == 0, judged.output
    found = json.loads(judged.stdout)
    assert found["accuracy"] == pytest.approx(trained["ema_accuracy"])
    assert found["accuracy"] != pytest.approx(trained["accuracy"])
    assert found["tokens"] == [32.0, 16.0, 8.0]
    radial = ("--method", "radial-l1", "--keep-rate", "0.5")
    for name, source, options in (("topk", weights.parent, TOPK), ("radial", weights, radial)):
        done = run("record", source, folder / f"{name}.safetensors", *options, "--cpu")
        assert done.exit_code == 0, done.output
    recordings = [folder / f"{name}.safetensors" for name in ("topk", "radial")]
    done = run("compare", *recordings, "--out", folder / "new" / "c.csv")
    assert done.exit_code == 0, done.output
    assert {path.name for path in (folder / "new").iterdir()} == {"c.csv", "c-correlations.csv", "c-depth.csv"}
    with open(folder / "new" / "c.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["method_a"] for row in rows] == ["topk", "radial_l1"]
    assert float(rows[0]["accuracy_a"]) == pytest.approx(trained["accuracy"]["top1"], abs=1e-4)
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
    assert "'fp8'" in refused("train", "--mixed-precision", "fp8", *out)
    assert "no head for the classes of digits" in refused("train", "--distillation", "soft", *out)
    assert "a teacher is for --distillation" in refused("train", "--teacher-checkpoint", weights, *out)
    assert "resnet18 is a ResNet" in refused("train", "--model", "resnet18", *out)
    assert "--backbone-epochs 2" in refused("run", "--checkpoint", weights, "--backbone-epochs", 2, *out)
    assert "--model deit_tiny" in refused("run", "--model", "deit_tiny_patch16_224", *out)
    assert "model_ema.safetensors is missing" in refused("evaluate", folder, "--ema")
    assert "got 0" in refused("evaluate", weights, *TOPK, "--rounds", 0)
    assert not (folder / "refused").exists()


def _words(folder):
    (folder / "words.json").write_text("{}")
    return folder / "words.json"


def test_a_part_of_the_study_is_made_as_in_the_whole():
    backbone = _backbone("digits", None, None, False)
    part = _recipe("digits", False, ["dpcknn", "radial"], ["0.25"], 0, backbone, None, {})
    assert all(one in DIGITS.reductions for one in part.reductions)
    assert [one.variant for one in part.reductions] == ["dpcknn", "radial_l2"]


def test_every_field_of_a_protocol_is_an_option():
    names = [{field.name for field in dataclasses.fields(kind)} for kind in (_Changes, Protocol)]
    assert names[0] | {"seed"} == names[1]
    given = {"asymmetry": (2.0, 1.0, 0.0), "ema": 0.0, "distillation": "hard", "workers": 2}
    changed = _changed(Protocol(), {**given, "epochs": 6})
    assert changed == dataclasses.replace(Protocol(), **{**given, "ema": None}, epochs=6, warmup_epochs=4)
    assert _changed(protocol_for("digits"), {"ema": 0.9, "warmup_epochs": 1}).warmup_epochs == 1


def test_the_backbone_of_a_study_has_epochs_of_its_own():
    recipe = _recipe("digits", False, None, None, 3, DIGITS.backbone, 12, {"epochs": 4, "lr": 0.1})
    assert recipe.training == dataclasses.replace(DIGITS.training, epochs=12, warmup_epochs=1, seed=3)
    assert recipe.fine_tuning == dataclasses.replace(DIGITS.fine_tuning, epochs=4, warmup_epochs=0, seed=3, lr=0.1)


def test_teachers(folder, weights):
    student = Backbone("deit_small_patch16_224", pretrained=True)
    assert _taught_by(None, None, student) is None
    assert _taught_by("deit_base_patch16_224", None, student) == Backbone("deit_base_patch16_224", pretrained=True)
    assert _taught_by(None, weights, student) == Backbone("deit_small_patch16_224", checkpoint=weights)
    recipe = dataclasses.replace(DIGITS, teacher=_taught_by(None, weights, DIGITS.backbone))
    model = next(recipe.models)
    assert _teacher(recipe, folder, model, 10) is None
    recipe = dataclasses.replace(recipe, fine_tuning=_changed(recipe.fine_tuning, {"distillation": "soft"}))
    assert torch.equal(_teacher(recipe, folder, model, 10).head.weight, load_file(weights)["head.weight"])
    with pytest.raises(ValueError, match="cannot teach: it has no head for 9 classes"):
        _teacher(recipe, folder, model, 9)


def test_an_image_that_a_worker_cannot_read_is_named(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "val" / "n01" / "0.jpg").write_bytes(b"no image")
    broken = open_data("imagenet", tmp_path, image_size=8).val
    with pytest.raises(UserError, match=r"^[^\n]*val/n01/0\.jpg cannot be read as an image"), _training_errors():
        list(DataLoader(broken, num_workers=1))
