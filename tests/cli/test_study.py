"""``fastreduce study …`` on the real digits: one model, trained for one epoch, goes through every command."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")

import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from fastreduce.cli.app import app
from fastreduce.cli.options import UserError
from fastreduce.cli.study import study
from fastreduce.cli.study_options import Changes, changed_protocol, make_backbone, make_recipe, make_teacher
from fastreduce.cli.study_running import training_errors
from fastreduce.study._lock import hold
from fastreduce.study.data import open_data
from fastreduce.study.protocol import Backbone, Protocol, protocol_for
from fastreduce.study.recipe import DIGITS, _teacher
from tests.study.test_data import write_imagenet

TOPK = ("--method", "topk", "--keep-rate", "0.5")
top = typer.Typer(cls=app.info.cls)
top.add_typer(study, name="study")


def run(*arguments):
    return CliRunner().invoke(top, ["study", *map(str, arguments)])


def one_line(done, *arguments):
    """Return what the one line on stderr says."""
    assert done.exit_code == 2, (arguments, done.output, done.exception)
    assert isinstance(done.exception, SystemExit), (arguments, done.exception)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def refused(*arguments):
    return one_line(run(*arguments), *arguments)


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
    assert done.stderr.splitlines()[0] == "no --checkpoint is given: the training starts from random weights"
    assert [line.split(" (")[0] for line in done.stderr.splitlines()[1:]] == ["training"]  # a line a phase
    assert refused("train", "--method", "topk", "--keep-rate", 0.7, *options).count("another training") == 1
    return folder / "topk" / "model.safetensors"


@pytest.fixture(scope="module")
def alone(folder, weights):
    """Write the same weights with nothing that says what they are of."""
    (folder / "alone").mkdir()
    return Path(shutil.copy(weights, folder / "alone"))


def test_a_model_goes_through_all_commands(folder, weights, alone):
    history = json.loads((weights.parent / "training.json").read_text())
    assert history["description"]["protocol"]["clip_norm"] == 1
    trained = history["epochs"][0]
    judged = run("evaluate", weights.parent, "--ema", "--rounds", 3, "--cpu")
    assert judged.exit_code == 0, judged.output
    found = json.loads(judged.stdout)
    assert found["accuracy"] == pytest.approx(trained["ema_accuracy"])
    assert found["accuracy"] != pytest.approx(trained["accuracy"])
    assert found["tokens"] == [32.0, 16.0, 8.0]
    assert found["rounds"] == 3
    unknown = ("--dataset", "digits", "--method", "radial-l1", "--keep-rate", "0.5")
    for name, source, options in (("topk", weights.parent, ()), ("radial", alone, unknown)):
        done = run("record", source, folder / "recorded" / f"{name}.safetensors", *options, "--cpu")
        assert done.exit_code == 0, done.output
    recordings = [folder / "recorded" / f"{name}.safetensors" for name in ("topk", "radial")]
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


def test_what_contradicts_the_training_is_refused(folder, weights, tmp_path):
    for command in (("evaluate", weights), ("record", weights.parent, tmp_path / "r.safetensors")):
        for options, named, held in (
            (("--method", "evit"), "--method evit", "topk"),
            (("--method", "none"), "--method none", "topk"),
            (("--keep-rate", 0.7), "--keep-rate 0.7", "0.5"),
            (("--model", "deit_tiny_patch16_224"), "--model deit_tiny_patch16_224", "vit_tiny_patch16_224"),
            (("--dataset", "coco"), "--dataset coco", "digits"),
        ):
            said = refused(*command, *options)
            assert f"{named} contradicts {weights.parent / 'training.json'}, which says {held};" in said
    said = refused("evaluate", weights, "--root", folder)
    assert f"leave --root {folder} out" in said
    agreeing = ("--dataset", "digits", "--model", "vit_tiny_patch16_224", "--method", "Topk", "--keep-rate", 0.5)
    done = run("record", weights, tmp_path / "r.safetensors", *agreeing, "--cpu")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("topk vit_tiny_patch16_224 0.5: 602 images")


def test_weights_of_which_nothing_is_known(alone, weights):
    said = refused("evaluate", alone)
    assert f"nothing is known of {alone}, which has no training.json beside it: give --dataset, --method" in said
    assert "give --method (or --method none)" in refused("evaluate", alone, "--dataset", "digits")
    assert "give --model" in refused("evaluate", alone, "--dataset", "coco", *TOPK)
    done = run("evaluate", alone, "--dataset", "digits", *TOPK, "--rounds", 3, "--cpu")
    assert done.exit_code == 0, done.output
    held = json.loads((weights.parent / "training.json").read_text())["epochs"][0]["accuracy"]
    assert json.loads(done.stdout)["accuracy"] == pytest.approx(held)
    unreduced = run("evaluate", alone, "--dataset", "digits", "--method", "none", "--rounds", 3, "--cpu")
    assert json.loads(unreduced.stdout)["tokens"] == []
    assert "does not fit" in refused("evaluate", alone, "--dataset", "digits", "--method", "sit", "--keep-rate", 0.5)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "1", '{"description": 3}', '{"description": {}}', '{"description": {"data": {"name": "mnist"}}}',
     "[" * 100_000, '{"description": {"data": {"name": "digits", "image_size": "x", "classes": 1},'
     ' "backbone": {"name": "a", "options": 3}, "reduction": null}}'],
)  # fmt: skip
def test_a_history_that_no_training_wrote(alone, tmp_path, text):
    shutil.copy(alone, tmp_path)
    (tmp_path / "training.json").write_text(text)
    assert "training.json is not the history of a training: " in refused("evaluate", tmp_path)


def _not_weights(folder):
    Image.new("RGB", (8, 8)).save(folder / "photo.jpg")
    return folder / "photo.jpg"


def _refusals(folder, weights):
    """Return what is refused before torch is imported, and what the line says."""
    photo, out = _not_weights(folder), ("--out", folder / "refused")
    (folder / "not-nuswide").mkdir(exist_ok=True)
    return [
        (("run", "--methods", "topk,foo", *out), "'foo'"),
        (("run", "--methods", "", *out), "--methods got ''"),
        (("run", "--keep-rate", "1.5", *out), "got 1.5"),
        (("run", "--keep-rate", "a", *out), "got 'a'"),
        (("run", "--keep-rate", "nan", *out), "got nan"),
        (("run", "--dataset", "svhn", *out), "unknown data set 'svhn'; expected one of digits, imagenet"),
        (("run", "--dataset", "imagenet", "--root", "/nope", *out), "--root /nope: there is no such folder"),
        (("run", "--dataset", "imagenet", "--root", photo, *out), "photo.jpg: it is a file, not a folder"),
        (("run", "--dataset", "imagenet", *out), "imagenet needs --root"),
        (("run", "--dataset", "nuswide", "--root", folder / "not-nuswide", *out), "it has no nus_wid_data.csv"),
        (("run", "--root", folder, *out), "digits comes with scikit-learn"),
        (("run", "--seed", -1, *out), "seed must be from 0 to 2^63 - 1, got -1"),
        (("run", "--seed", 2**63, *out), "seed must be from 0 to 2^63 - 1"),
        (("run", "--jobs", 0, *out), "--jobs must be at least 1, got 0"),
        (("run", "--backbone-epochs", 0, *out), "--backbone-epochs must be at least 1, got 0"),
        (("run", "--checkpoint", weights, "--backbone-epochs", 2, *out), "--backbone-epochs 2"),
        (("run", "--model", "deit_tiny_patch16_224", *out), "--model deit_tiny"),
        (("run", "--checkpoint", photo, *out), "photo.jpg is not a .safetensors or torch.save file of weights"),
        (("run", "--checkpoint", folder, *out), "is a folder; give a file"),
        (("run", "--checkpoint", "nowhere.pt", *out), "--checkpoint nowhere.pt: no such file"),
        (("run", "--capacities", "width-25", *out), "unknown capacity 'width-25'; expected width-24, none"),
        (("run", "--quick", "--dataset", "coco", *out), "coco needs --root"),
        (("run", "--out", photo), "is a file, not a folder"),
        (("run", "--out", photo / "below"), "cannot be written" if os.name == "nt" else "is a file, not a folder"),
        (("run", "--out", ""), "--out got ''"),
        (("run", "--out", "/proc/nothing"), "cannot be written"),
        (("run", "--lr", "nan", *out), "lr must be finite, got nan"),
        (("run", "--epochs", "-3", *out), "got -3"),
        (("train", "--method", "topk-l1", "--keep-rate", 0.5, *out), "'topk-l1'"),
        (("train", "--keep-rate", 0.5, *out), "--keep-rate 0.5 alone"),
        (("train", "--method", "topk", *out), "--method topk alone"),
        (("train", "--method", "none", "--keep-rate", 0.5, *out), "--keep-rate 0.5 alone"),
        (("train", "--dataset", "mnist", *out), "'mnist'"),
        (("train", "--mixed-precision", "fp8", *out), "'fp8'"),
        (("train", "--validate-every", -1, *out), "--validate-every must be at least 0, got -1"),
        (("train", "--checkpoint-every", -1, *out), "--checkpoint-every must be at least 0, got -1"),
        (("train", "--teacher-checkpoint", weights, *out), "a teacher is for --distillation"),
        (("train", "--teacher-checkpoint", photo, *out), "not a .safetensors or torch.save file"),
        (("train", "--model", "deit_smal_patch16_224", *out), "did you mean 'deit_small_patch16_224'?"),
        (("train", "--pretrained", *out), "--pretrained needs --model"),
        (("evaluate", "nowhere.safetensors"), "nowhere.safetensors is neither a file of weights nor a folder"),
        (("evaluate", photo), "photo.jpg is not a .safetensors or torch.save file of weights"),
        (("evaluate", folder, "--ema"), "model_ema.safetensors is missing"),
        (("evaluate", folder), "model.safetensors is missing; has the training ended?"),
        (("evaluate", weights, "--rounds", 2), "--rounds must be at least 3, got 2"),
        (("evaluate", weights, "--dtype", "float8"), "--dtype must be float32, float16, bfloat16, got 'float8'"),
        (("evaluate", weights, "--batch-size", 0), "--batch-size must be at least 1, got 0"),
        (("evaluate", weights, "--batch-size", 10**12), "--batch-size must be below"),
        (("evaluate", weights, "--workers", -1), "--workers must be at least 0, got -1"),
        (("evaluate", weights, "--method", "evit"), "--method evit contradicts"),
        (("record", weights, weights), "it would be lost"),
        (("record", weights, folder), "is a folder, not a file"),
        (("record", weights, ""), "OUT got ''"),
        (("compare", folder), "it is a folder; give a file"),
        (("compare", "nowhere"), "recording nowhere: there is no such file"),
        (("compare", photo, "--axis", "colour"), "unknown axis 'colour'"),
        (("compare", photo, "--out", folder), "is a folder, not a file"),
    ]


def test_every_refusal_names_what_was_given(folder, weights, alone):
    before = sorted(path for path in folder.rglob("*") if path.name not in ("photo.jpg", "not-nuswide"))
    for arguments, words in _refusals(folder, weights):
        assert words in refused(*arguments), arguments
    after = sorted(path for path in folder.rglob("*") if path.name not in ("photo.jpg", "not-nuswide"))
    assert after == before  # nothing is written


def test_refusals_do_not_wait_for_torch(folder, weights):
    lines = [[str(word) for word in arguments] for arguments, _ in _refusals(folder, weights)]
    script = (
        "import json, sys\n"
        "from fastreduce import cli\n"
        "from fastreduce.cli.study_running import EXTRA\n"
        "EXTRA.clear()\n"
        "from fastreduce.cli.app import app\n"
        "from fastreduce.cli.study import study\n"
        "from typer.testing import CliRunner\n"
        "app.add_typer(study, name='study')\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    done = CliRunner().invoke(app, ['study', *line])\n"
        "    assert done.exit_code == 2, (line, done.output)\n"
        "    assert isinstance(done.exception, SystemExit), (line, done.exception)\n"
        "    assert not {'torch', 'timm', 'numpy', 'accelerate'} & {*sys.modules}, line\n"
    )
    done = subprocess.run([sys.executable, "-c", script, json.dumps(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_only_the_work_finds(folder, weights):
    out = ("--out", folder / "found")
    (folder / "nus_wid_data.csv").write_text('a.jpg,"[1,2",train\n')
    photos = ("train", "--dataset", "nuswide", "--root", folder)
    assert "nuswide needs a trained backbone: --pretrained or --checkpoint" in refused(*photos, *out)
    assert "line 1: '[1,2'" in refused(*photos, "--checkpoint", weights, *out)
    assert "words.json is not a recording" in refused("compare", _words(folder))
    assert "no head for the classes of digits" in refused("train", "--distillation", "soft", *out)
    assert "resnet18 is a ResNet" in refused("train", "--model", "resnet18", *out)
    assert not (folder / "found").exists()


def test_help_needs_no_extra(monkeypatch):
    monkeypatch.setattr("fastreduce.cli.study_running.EXTRA", {"no_such_package": "such"})
    for arguments in ((), ("--help",), ("run", "--help"), ("train", "--help"), ("evaluate", "--help")):
        done = run(*arguments)
        assert done.exit_code == 0, done.output
        assert "Usage" in done.stdout
    assert 'such missing; pip install "fastreduce[study]"' in refused("run")


def test_an_unknown_backend_is_said_at_once(monkeypatch, folder):
    monkeypatch.setenv("FASTREDUCE_BACKEND", "bogus")
    assert "FASTREDUCE_BACKEND='bogus'; expected one of 'auto', 'triton', 'reference'" in refused(
        "run", "--out", folder
    )


def test_a_folder_that_another_process_has(tmp_path):
    with hold(tmp_path, lambda holder: None):
        for command in ("run", "train"):
            said = refused(command, "--out", tmp_path)
            assert f"{tmp_path} is in use by process {os.getpid()}: wait for it, or give another --out" in said


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_says_how_to_go_on(monkeypatch, tmp_path, how, code):
    def stopped(*arguments, **options):
        os.kill(os.getpid(), how)
        raise AssertionError("went on")

    monkeypatch.setattr("fastreduce.study.run.run_study", stopped)
    before = signal.getsignal(signal.SIGTERM)
    done = run("run", "--cpu", "--out", tmp_path)
    assert done.exit_code == code
    assert done.stderr == f"stopped; what is trained stays in {tmp_path}, and the same command goes on from there\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_command_that_is_stopped_ends_at_once():
    """Python's work at its end, seconds for torch on a busy machine, is left out; output is not."""
    code = (
        "import atexit, typer; from fastreduce.cli.app import app; from fastreduce.cli import main\n"
        "atexit.register(print, 'taken apart')\n"
        "@app.command()\ndef other(code: int):\n    print('partial')\n    raise typer.Exit(code)\nmain()"
    )
    for number, printed in ((130, "partial\n"), (143, "partial\n"), (2, "partial\ntaken apart\n")):
        done = subprocess.run([sys.executable, "-c", code, "other", str(number)], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (number, printed)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FloatingPointError("the loss became nan"), "the loss became nan"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "fewer --workers need less memory"),
        (MemoryError(), "there is too little memory"),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory"), "a smaller --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "there is too little memory"),
        (OSError(28, "No space left on device", "x"), "No space left on device"),
    ],
)
def test_troubles_of_a_training_are_one_line(monkeypatch, tmp_path, error, said):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("fastreduce.study.run.run_study", fail)
    assert said in refused("run", "--cpu", "--out", tmp_path)


def test_a_mistake_in_the_code_is_no_message(monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr("fastreduce.study.run.run_study", fail)
    assert isinstance(run("run", "--cpu", "--out", tmp_path).exception, RuntimeError)


class Worked(Exception):
    """A command line that was good enough to begin with."""


_VALUES = (
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "3",
        "0.5",
        "1.5",
        "nan",
        "inf",
        "1e400",
        "9" * 30,
        "\0",
        "é\udcff",
        "[/]",
        "[red]",
        "a|b",
    ),
    *("none", "topk", "ToMe", "radial_l1", "topk,,tome", ",", "digits", "coco", "imagenet", "float16", "soft", "hard"),
    *("deit_small_patch16_224", "hf_hub:x/y", "../..", "/", "/dev/null", "/dev/full", "/proc", "x" * 300, "--", "-h"),
)
_OPTIONS = {
    "run": "dataset root quick model checkpoint pretrained methods keep-rate capacities backbone-epochs jobs seed out "
    "epochs lr batch-size ema asymmetry warmup-epochs distillation teacher teacher-checkpoint workers",
    "train": "dataset root model checkpoint pretrained method keep-rate seed out validate-every epochs mixup drop-path "
    "mixed-precision teacher",
    "evaluate": "dataset root model method keep-rate ema batch-size rounds dtype workers",
    "record": "dataset root model method keep-rate ema batch-size workers",
    "compare": "axis out",
}
_FLAGS = ("quick", "pretrained")


@st.composite
def _command_lines(draw):
    command = draw(st.sampled_from(sorted(_OPTIONS)))
    value = st.sampled_from([*_VALUES, "@weights", "@folder", "@photo", "@alone"])
    line = [command, *draw(st.lists(value, min_size=command not in ("run", "train"), max_size=2))]
    for option in draw(st.lists(st.sampled_from(_OPTIONS[command].split()), max_size=4)):
        line.append(f"--{option}")
        if option not in _FLAGS and (option != "ema" or command in ("run", "train")):
            line += [draw(value) for _ in range(3 if option == "asymmetry" else 1)]
    return line


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
@given(line=_command_lines())
def test_no_command_line_ends_in_a_traceback(line, folder, weights, alone):
    """Whatever is given is taken, or refused in one line; what would work is stopped where it begins."""
    named = {"@weights": weights, "@folder": folder, "@photo": _not_weights(folder), "@alone": alone}

    def work(*arguments, **options):
        raise Worked

    there = sorted(folder.rglob("*"))
    with pytest.MonkeyPatch.context() as patches:
        patches.chdir(folder)
        for name in (
            "run.run_study",
            "train.train",
            "record.record_images",
            "evaluate.evaluate",
            "record.open_recording",
        ):
            patches.setattr(f"fastreduce.study.{name}", work)
        done = run(*(named.get(word, word) for word in line))
    if not isinstance(done.exception, Worked) and done.exit_code != 0:
        one_line(done, *line)
    assert sorted(folder.rglob("*")) == there


def _words(folder):
    (folder / "words.json").write_text("{}")
    return folder / "words.json"


def test_a_part_of_the_study_is_made_as_in_the_whole():
    backbone = make_backbone("digits", None, None, False)
    part = make_recipe("digits", False, ["dpcknn", "radial"], ["0.25"], 0, backbone, None, {})
    assert all(one in DIGITS.reductions for one in part.reductions)
    assert [one.variant for one in part.reductions] == ["dpcknn", "radial_l2"]


def test_every_field_of_a_protocol_is_an_option():
    names = [{field.name for field in dataclasses.fields(kind)} for kind in (Changes, Protocol)]
    assert names[0] | {"seed"} == names[1]
    given = {"asymmetry": (2.0, 1.0, 0.0), "ema": 0.0, "distillation": "hard", "workers": 2}
    changed = changed_protocol(Protocol(), {**given, "epochs": 6})
    assert changed == dataclasses.replace(Protocol(), **{**given, "ema": None}, epochs=6, warmup_epochs=4)
    assert changed_protocol(protocol_for("digits"), {"ema": 0.9, "warmup_epochs": 1}).warmup_epochs == 1


def test_the_backbone_of_a_study_has_epochs_of_its_own():
    recipe = make_recipe("digits", False, None, None, 3, DIGITS.backbone, 12, {"epochs": 4, "lr": 0.1})
    assert recipe.training == dataclasses.replace(DIGITS.training, epochs=12, warmup_epochs=1, seed=3)
    assert recipe.fine_tuning == dataclasses.replace(DIGITS.fine_tuning, epochs=4, warmup_epochs=0, seed=3, lr=0.1)


def test_teachers(folder, weights):
    student = Backbone("deit_small_patch16_224", pretrained=True)
    assert make_teacher(None, None, student) is None
    assert make_teacher("deit_base_patch16_224", None, student) == Backbone("deit_base_patch16_224", pretrained=True)
    assert make_teacher(None, weights, student) == Backbone("deit_small_patch16_224", checkpoint=weights)
    recipe = dataclasses.replace(DIGITS, teacher=make_teacher(None, weights, DIGITS.backbone))
    model = next(recipe.models)
    assert _teacher(recipe, folder, model, 10) is None
    recipe = dataclasses.replace(recipe, fine_tuning=changed_protocol(recipe.fine_tuning, {"distillation": "soft"}))
    assert torch.equal(_teacher(recipe, folder, model, 10).head.weight, load_file(weights)["head.weight"])
    with pytest.raises(ValueError, match="cannot teach: it has no head for 9 classes"):
        _teacher(recipe, folder, model, 9)


def test_an_image_that_a_worker_cannot_read_is_named(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "val" / "n01" / "0.jpg").write_bytes(b"no image")
    broken = open_data("imagenet", tmp_path, image_size=8).val
    with pytest.raises(UserError, match=r"^[^\n]*val/n01/0\.jpg cannot be read as an image"), training_errors():
        list(DataLoader(broken, num_workers=1))
