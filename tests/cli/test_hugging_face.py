"""Models of transformers in the commands: from a folder, with every method held against the published algorithms."""

import json

import pytest
import torch

import fastreduce
from fastreduce.integrations import hub
from fastreduce.integrations.hf.folders import open_folder
from fastreduce.integrations.hf.images import ImageModel
from fastreduce.quality.outputs import model_outputs
from fastreduce.speed.comparison import Comparison, Settings
from tests.helpers.commands import run

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install fastreduce[hf])")

IMAGE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
IMAGE |= {"image_size": 32, "patch_size": 8}
TEXT = {name: value for name, value in IMAGE.items() if name not in ("image_size", "patch_size")}
TEXT |= {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# name: class, configuration, options of it, what the commands take of it.
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE | {"num_labels": 7}, "ViTForImageClassification"),
    "dinov2": (
        *("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", IMAGE | {"num_labels": 7}),
        "Dinov2WithRegistersForImageClassification",
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", IMAGE | {"num_register_tokens": 2}, "DINOv3ViTModel"),
    "clip": (
        *("CLIPModel", "CLIPConfig", {"vision_config": IMAGE, "text_config": TEXT, "projection_dim": 16}),
        "CLIPVisionModelWithProjection",
    ),
    "siglip": ("SiglipModel", "SiglipConfig", {"vision_config": IMAGE, "text_config": TEXT}, "SiglipVisionModel"),
    "ijepa": ("IJepaForImageClassification", "IJepaConfig", IMAGE | {"num_labels": 7}, "IJepaForImageClassification"),
    "swin": ("SwinModel", "SwinConfig", {"image_size": 32, "depths": [1], "num_heads": [1], "embed_dim": 8}, ""),
    "video": ("VideoMAEForVideoClassification", "VideoMAEConfig", IMAGE | {"num_frames": 4}, ""),
    "bare": ("IJepaModel", "IJepaConfig", IMAGE, ""),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Make a folder with every model, random weights, biases and scales too."""
    root = tmp_path_factory.mktemp("models")
    for name, (kind, configuration, options, _) in MODELS.items():
        torch.manual_seed(0)
        more = {"add_pooling_layer": False} if name == "bare" else {}
        model = getattr(transformers, kind)(getattr(transformers, configuration)(**options), **more)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        model.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", [name for name, known in MODELS.items() if known[3]])
def test_every_method_agrees_with_the_published_algorithm(folders, name):
    given = "hf:" if name == "clip" else ""
    methods = () if name == "vit" else ("topk", "evit", "tome", "kmedoids")
    settings = Settings(model=f"{given}{folders / name}", methods=methods, keep_rates=(0.6,), batch=1, rounds=1)
    comparison = Comparison(settings)
    assert type(comparison.model.model).__name__ == MODELS[name][3]
    assert not comparison.random_weights
    assert not comparison.note
    comparison.check(lambda *_: None)
    # Layers with random weights score tokens nearly alike: another decision than in float64 is no error of the logits.
    far = [entry.label for entry in comparison.entries if comparison.is_far(entry.difference) and not entry.changed]
    assert not far
    assert len(comparison.entries) == (len(methods) or 13)


@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip", "dinov3"])
def test_features_of_an_image_model(folders, name):
    opened = open_folder(folders / name)
    model = ImageModel(opened.model, opened.config)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = model_outputs(model, images)
    with torch.no_grad():
        own = opened.model(pixel_values=images)
    if "num_labels" in MODELS[name][2]:
        assert torch.equal(before.logits, own.logits)
        torch.testing.assert_close(opened.model.classifier(before.pooled.clone()), own.logits)
        assert model.num_classes == 7
    else:
        assert torch.equal(before.pooled, own.pooler_output)
        torch.testing.assert_close(before.patches, own.last_hidden_state[:, model.num_prefix_tokens :])
    assert before.patches.shape == (2, 16, 32)
    fastreduce.patch(model, "topk", keep=(9, 4), at=(1, 2))
    after = model_outputs(model, images)
    assert after.patches.eq(0).all(2).sum(1).tolist() == [12, 12]
    assert not after.patches_last.eq(0).all(2).any()
    fastreduce.unpatch(model)
    assert torch.equal(model_outputs(model, images).pooled, before.pooled)


def test_commands(folders, tmp_path):
    common = ("--batch", "1", "--rounds", "1", "--no-pictures", "--image-count", "2")
    done = run(
        "compare", "--model", f"hf:{folders / 'vit'}", "--methods", "topk", *common, "--json", tmp_path / "c.json"
    )
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["weights"] == "pretrained weights"
    assert {"agreement", "class_cosine", "patch_cosine_last"} <= set(result["methods"][0]["fidelity"])
    done = run("plan", "--model", folders / "clip", "--keep-rate", "0.5", *common)
    assert done.exit_code == 0, done.output
    out = tmp_path / "tune"
    done = run(
        *("tune", "--model", folders / "dinov3", "--methods", "topk,tome", "--batch", "1", "--rounds", "1"),
        *("--image-count", "2", "--speed-up", "1.05", "--no-pictures", "--out", out),
    )
    assert done.exit_code == 0, done.output
    assert set(json.loads((out / "tables.json").read_text())["losses"]) == {"topk", "tome"}


def test_a_checkpoint(folders, tmp_path):
    state = transformers.ViTForImageClassification.from_pretrained(folders / "vit").state_dict()
    changed = {name: value + 1 for name, value in state.items() if name == "classifier.bias"}
    torch.save(changed, tmp_path / "w.pth")
    settings = Settings(model=str(folders / "vit"), checkpoint=str(tmp_path / "w.pth"), methods=("topk",), batch=1)
    comparison = Comparison(settings)
    assert comparison.weights == "checkpoint w.pth"
    assert torch.equal(comparison.model.model.classifier.bias, state["classifier.bias"] + 1)
    torch.save({"classifier.bias": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"'classifier\.bias' is not in it in this shape"):
        Comparison(settings)


@pytest.mark.parametrize("command", ["compare", "plan", "tune"])
def test_a_hub_out_of_reach_is_tried_once(monkeypatch, command):
    asked = []
    monkeypatch.setattr(
        hub, "_hub_trouble", lambda seconds: asked.append(seconds) or "the hub cannot be reached: no route"
    )
    done = run(command, "--model", "hf:nobody/nothing-of-this-name")
    assert done.exit_code == 2
    assert asked == [5.0]
    assert "'hf:nobody/nothing-of-this-name' cannot be had: the hub cannot be reached: no route" in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:./nowhere", "there is no folder './nowhere'"),
        ("empty", "without a config.json"),
        ("broken", "config.json"),
        ("strange", "names 'NoSuchModel', which is no class of transformers"),
        ("weightless", "cannot be loaded"),
        ("timms", "is one of timm"),
        ("swin", "its windows need the full grid"),
        ("video", "takes no plain images"),
        ("bare", "hands out its patches alone"),
    ],
)
def test_wrong_input_gets_one_line(folders, tmp_path, name, words):
    texts = {"broken": "{", "strange": '{"architectures": ["NoSuchModel"], "model_type": "no"}'}
    texts |= {"weightless": (folders / "vit" / "config.json").read_text(), "timms": '{"architecture": "vit"}'}
    (tmp_path / name.rpartition("/")[2]).mkdir()
    if name in texts:
        (tmp_path / name / "config.json").write_text(texts[name])
    place = name if "./" in name else folders / name if name in MODELS else tmp_path / name
    place = f"hf:{place}" if name in ("timms", "weightless") else place
    done = run("compare", "--model", place)
    assert done.exit_code == 2
    assert words in done.stderr
    assert "Traceback" not in done.output
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1


def test_downloads_are_asked_for():
    done = run("export", "--model", "hf:google/vit-base-patch16-224", "--out", "x.onnx")
    assert done.exit_code == 2
    assert "would be downloaded: give --pretrained" in done.stderr
