"""``fastreduce export``: what it refuses in one line, and what it writes and says."""

import dataclasses
import importlib
import io
import json

import pytest
import timm
import torch
from typer.testing import CliRunner

import fastreduce
from fastreduce.cli.app import app
from fastreduce.cli.screen import Page
from fastreduce.integrations.timm import create_model
from fastreduce.speed.settings import ExportSettings
from tests.helpers.inputs import seeded

RUNNER = CliRunner()
WRONG = {
    "no ending": (["--out", "model"], r"--out must end in .onnx (onnx), .xml (openvino), .pt2 (pt2), got 'model'"),
    "another ending": (["--out", "model.onnx", "--to", "pt2"], "--out must end in .pt2 (pt2), got 'model.onnx'"),
    "unknown format": (["--out", "model.onnx", "--to", "onx"], "unknown format 'onx'; did you mean 'onnx'?"),
    "unknown method": (["--out", "model.pt2", "--method", "topq"], "unknown method 'topq'; did you mean 'topk'?"),
    "several methods": (["--out", "model.pt2", "--method", "topk,tome"], "export takes one method, got 'topk,tome'"),
    "keep rate": (["--out", "model.pt2", "--keep-rate", "2"], "keep_rate must lie in (0, 1], got 2"),
    "rounds": (["--out", "model.pt2", "--rounds", "-1"], "rounds must not be negative, got -1"),
    "batch": (["--out", "model.pt2", "--batch", "0"], "batch must be positive, got 0"),
    "no config": (["--out", "model.pt2", "--config", "none.json"], "there is no file 'none.json'"),
    "config and method": (["--out", "a.pt2", "--config", "x", "--method", "topk"], "give either --config or --method"),
    "config and rate": (["--out", "a.pt2", "--config", "x", "--keep-rate", "1"], "give either --config or --keep-rate"),
    "config and blocks": (["--out", "a.pt2", "--config", "x", "--at", "1"], "give either --config or --at"),
    "config and option": (["--out", "a.pt2", "--config", "x", "--method-option", "y=1"], "or --method-option"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_line(name, tmp_path, monkeypatch):
    arguments, message = WRONG[name]
    monkeypatch.chdir(tmp_path)
    done = RUNNER.invoke(app, ["export", *arguments])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_configuration_that_is_none(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"keep_rate": 1}')
    with pytest.raises(ValueError, match="names no method"):
        ExportSettings(out="model.pt2", config=str(file)).check()


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("fastreduce.speed.settings.find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(ValueError, match=r'--to onnx needs onnxscript: pip install "fastreduce\[deploy\]"'):
        ExportSettings(out="model.onnx").check()


def test_the_format_follows_the_ending():
    for ending, name in ((".onnx", "onnx"), (".xml", "openvino"), (".pt2", "pt2")):
        assert ExportSettings(out=f"model{ending}").format == name
    assert dataclasses.replace(ExportSettings(), method="radial").variant == "radial-l2"


@pytest.mark.parametrize("source", ["checkpoint", "config", "random"])
def test_trained_layers_are_exported(tmp_path, monkeypatch, source):
    """With --config, they were left out of the file without a word."""
    written = []

    def write(model, images, file, to):
        written.append((model, images))
        raise RuntimeError("not written in this test")

    monkeypatch.setattr("fastreduce.deploy.export", write)
    trained = create_model("test_vit")
    fastreduce.patch(trained, "dynamicvit", keep=[60, 30], at=(1, 3))
    for parameter in trained.reducers.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=seeded(2)))
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    fastreduce.save_config(trained, tmp_path / "config.json")
    weights = ["--random", "--seed", "10"]
    if source == "checkpoint":
        weights = ["--checkpoint", str(tmp_path / "weights.pth")]
    if source != "config":
        (tmp_path / "config.safetensors").unlink()
    config, out = ["--config", str(tmp_path / "config.json")], ["--out", str(tmp_path / "x.onnx")]
    done = RUNNER.invoke(app, ["export", "--model", "test_vit", *weights, *config, *out])
    assert "not written in this test" in done.stderr, done.output
    ((model, images),) = written
    mine, theirs = model.reducers.state_dict(), trained.reducers.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in theirs.items()) == (source != "random")
    if source == "checkpoint":
        with torch.no_grad():
            assert torch.equal(model(images), trained.eval()(images))


def test_random_layers_are_said():
    page = Page(io.StringIO())
    found = {"runtime": "x", "images": 8, "wrong": 0, "decisions": 10, "difference": 0.0, "relative": 0.0}
    result = {
        **{"file": "x.onnx", "bytes": 1, "weights": "pretrained weights", "config": {"method": "sit"}},
        **{"fidelity": {**found, "same_class": 8}, "image": "flower.jpg", "speeds": [], "faithful": True},
    }
    command = importlib.import_module("fastreduce.cli.export")  # the package has the function under this name
    for layers in ("random", "checkpoint", "config", None):
        page = Page(io.StringIO())
        command._print(page, {**result, "layers": layers})
        page.write()
        said = "The layers of sit have random weights" in " ".join(page.stream.getvalue().split())
        assert said == (layers == "random")


def test_an_onnx_file_held_against_eager_mode(tmp_path, monkeypatch):
    def create(name, **options):
        return timm.create_model(name, depth=1, **options)  # an export takes a second for every thirty nodes

    monkeypatch.setattr("fastreduce.speed.models.create_model", create)
    pytest.importorskip("onnxruntime", reason="the file is run by onnxruntime")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"method": "evit", "keep_rate": 0.5, "at": [0]}))
    out, result = tmp_path / "new" / "model.onnx", tmp_path / "result.json"
    arguments = ["--model", "test_vit", "--config", str(config), "--out", str(out), "--rounds", "1", "--batch", "1"]
    threads = torch.get_num_threads()
    done = RUNNER.invoke(app, ["export", *arguments, "--json", str(result)])
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    found = json.loads(result.read_text())
    assert found["config"]["method"] == "evit"
    assert found["fidelity"]["wrong"] == 0
    assert found["fidelity"]["decisions"] > 0
    assert found["fidelity"]["relative"] < 1e-5
    assert found["bytes"] == out.stat().st_size
    assert len(found["speeds"]) == 1
    said = " ".join(done.stdout.split())
    assert "0 of " in said
    assert "decisions differ; largest difference" in said
    assert "both exported the same way, 1 round batch" in said
    assert "times as fast" in said
