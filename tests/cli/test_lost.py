"""Fidelity in ``compare`` and ``plan``: right values, and verdicts that follow; pretrained weights out of reach."""

import io
import json
import re

import pytest
import torch
from PIL import Image

import fastreduce
from fastreduce import draw
from fastreduce.cli.compare import _save_tradeoff
from fastreduce.cli.lost import choose, print_losses
from fastreduce.cli.screen import Page
from fastreduce.integrations import hub
from fastreduce.integrations.timm import create_model, input_config
from fastreduce.quality import paired_accuracy
from fastreduce.quality.images import folder_images
from fastreduce.speed import verdicts
from fastreduce.speed.advice import advice
from tests.helpers.commands import run, words

MODEL = "test_vit"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make photographs in as many class folders as a checkpoint's head has, and that checkpoint."""
    from fastreduce.pictures import sample_photos

    root = tmp_path_factory.mktemp("pictures")
    photos = list(sample_photos().values())
    for number, name in enumerate(("ant", "bee", "cow")):
        (root / "photos" / name).mkdir(parents=True)
        for index in range(2):
            photo = photos[(number + index) % len(photos)]().resize((200, 180), Image.Resampling.BICUBIC)
            photo.save(root / "photos" / name / f"{index}.png")
    torch.manual_seed(3)
    model = create_model(MODEL, num_classes=3)
    torch.save(model.state_dict(), root / "weights.pth")
    return root, model.eval()


@pytest.fixture(scope="module")
def compared(folder, tmp_path_factory):
    root, _ = folder
    out = tmp_path_factory.mktemp("compare")
    done = run(
        *("compare", "--model", MODEL, "--batch", "1", "--rounds", "1", "--methods", "topk,tome", "--keep-rate", "0.5"),
        *("--random", "--images", root / "photos", "--image-count", "5", "--at-least", "0.2"),
        *("--out", out, "--json", out / "result.json"),
    )
    assert done.exit_code == 0, done.output
    return done, json.loads((out / "result.json").read_text()), out


def test_fidelity_is_that_of_the_function(compared, folder):
    """The command's figures are those of fastreduce.fidelity, on the same model and pictures."""
    _, result, _ = compared
    torch.manual_seed(10)
    model = create_model(MODEL).eval()
    images = folder_images(str(folder[0] / "photos"), 1000)
    rows = [images.names.index(name) for name in _taken(images, 5)]
    fastreduce.patch(model, "topk", keep_rate=0.5)
    found = fastreduce.fidelity(model, images.tensor(input_config(model), rows))
    row = next(row for row in result["methods"] if row["method"] == "topk")
    for measure in ("agreement", "pooled_cosine", "patch_cosine", "patch_cosine_last", "kl"):
        assert row["fidelity"][measure]["mean"] == pytest.approx(found.mean(measure), abs=1e-5), measure
    assert row["fidelity"]["images"] == result["fidelity"]["images"] == 5


def _taken(images, count):
    import numpy as np

    return [images.names[row] for row in np.random.default_rng(7).permutation(len(images))[:count]]


def test_the_table_and_the_choice(compared):
    done, result, _ = compared
    topk = next(row for row in result["methods"] if row["method"] == "topk")
    line = f"topk 0.5 {topk['speedup']:.2f} {topk['fidelity']['agreement']['mean']:.3f}"
    assert line in words(done)
    assert "Accuracy is not measured: 3 class folders for a head of 1000 classes" in words(done)
    assert "say nothing about a trained model" in words(done)
    fast = [row for row in result["methods"] if row["speedup"] > 1 and row["fidelity"]["pooled_cosine"]["mean"] >= 0.2]
    best = max(fast, key=lambda row: row["speedup"], default=None)
    assert (result["fidelity"]["chosen"] or {}).get("label") == (best and best["label"])


def test_the_page_is_one_file_with_everything_in_it(compared):
    _, result, out = compared
    page = (out / "index.html").read_text()
    assert not re.search(r"(?:src|href)=[\"']?(?!data:)[a-z/]", page), "nothing is fetched from elsewhere"
    data = json.loads(re.search(r"const run = (.*);\n", page)[1].replace("<\\/", "</"))
    assert [method["label"] for method in data["methods"]] == ["topk", "tome"]
    (setting,) = data["methods"][0]["settings"]
    assert [stage["name"] for stage in setting["stages"]] == ["input", "block 1", "block 3", "block 4"]
    assert all(stage["picture"].startswith("data:image/jpeg;base64,") for stage in setting["stages"])
    assert len({stage["picture"] for stage in setting["stages"]}) == 4
    row = result["methods"][0]
    assert setting["measures"]["patch_cosine"] == row["fidelity"]["patch_cosine"]["mean"]
    assert data["headline"] == "pooled_cosine"
    with Image.open(out / "speed-up-and-fidelity.png") as picture:
        assert picture.size[0] > 1000


def test_labels_that_fit_give_accuracy(folder, tmp_path):
    """The head of the checkpoint has three classes, that of the model's name 1,000, and there are three folders."""
    root, model = folder
    done = run(
        *("plan", "--model", MODEL, "--batch", "1", "--rounds", "5", "--keep-rate", "0.5", "--no-pictures"),
        *("--checkpoint", root / "weights.pth", "--images", root / "photos", "--at-most-lost", "100"),
        *("--json", tmp_path / "result.json"),
    )
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "result.json").read_text())
    accuracy = result["rates"][0]["fidelity"]["accuracy"]
    images = folder_images(str(root / "photos"), 3)
    with torch.no_grad():
        right = model(images.tensor(input_config(model))).argmax(1) == torch.tensor(images.labels)
    assert accuracy["images"] == 6
    assert accuracy["before"] == pytest.approx(right.float().mean().item())
    assert f"{100 * accuracy['before']:.1f} unreduced" in words(done)
    assert result["fidelity"]["wanted"] == "at most 100 points of accuracy lost"


def test_a_loss_of_nothing_has_no_sign():
    page, row = Page(io.StringIO()), {"speedup": 1.5, "fidelity": {}}
    same = fastreduce.Fidelity({"pooled_cosine": torch.ones(10)}, paired_accuracy([True] * 10, [True] * 10))
    row["fidelity"] = same.summary()
    about = {"images": 10, "source": "of 10 in x", "labels": "labels: 2 classes"}
    print_losses(page, {"fidelity": about, "random_weights": False}, [("topk 0.5", row)], batch=16)
    page.write()
    printed = " ".join(page.stream.getvalue().split())
    assert "topk 0.5 1.50 1.000 1.000 100.0 0.0 -30.8 to 30.8" in printed
    assert "as fast as the unreduced model at batch 16." in printed


@pytest.mark.parametrize("command", ["compare", "plan", "tune"])
@pytest.mark.parametrize("content", [b"no picture", None])
def test_a_picture_that_cannot_be_read_is_one_line(folder, tmp_path, command, content):
    """None stands for the first half of a picture."""
    whole = next((folder[0] / "photos").rglob("*.png")).read_bytes()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "whole.png").write_bytes(whole)
    (tmp_path / "photos" / "broken.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
    quick = ("--model", MODEL, "--random", "--batch", "1", "--rounds", "1", "--methods", "topk", "--no-pictures")
    rates = () if command == "tune" else ("--keep-rate", "0.5")
    done = run(command, *quick, *rates, "--images", tmp_path / "photos", "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert "broken.png cannot be read as an image" in done.stderr
    assert "Traceback" not in done.output


def test_points_of_accuracy_need_labels(folder):
    done = run("plan", "--model", MODEL, "--random", "--images", folder[0] / "photos", "--at-most-lost", "1")
    assert done.exit_code == 2
    assert "--at-most-lost needs labels" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--images nowhere", "there is no folder 'nowhere'"),
        ("--at-least 1.5", "at-least must lie in (0, 1], got 1.5"),
        ("--at-least 0.9 --at-most-lost 1 --images .", "either --at-least or --at-most-lost"),
        ("--at-most-lost 1", "--at-most-lost needs --images"),
        ("--image-count 0", "image-count must be positive, got 0"),
        ("--model hf:google/vit --random", "would be downloaded"),
    ],
)
def test_wrong_input_gets_one_line(arguments, message):
    done = run("compare", *arguments.split())
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def _seconds(**ratios):
    base = [1.0] * 6
    return {"unreduced": base, "control": base, **{float(rate): [1 / by] * 6 for rate, by in ratios.items()}}


def test_the_fastest_that_keeps_enough_is_recommended():
    seconds = _seconds(**{"0.9": 1.2, "0.7": 1.5, "0.5": 1.9})
    assert verdicts.judge(8, seconds)["recommended"] == 0.9
    assert verdicts.judge(8, seconds, {0.9, 0.7})["recommended"] == 0.7
    assert verdicts.judge(8, seconds, set())["recommended"] is None
    row = verdicts.judge(8, seconds, {0.9, 0.7})
    lines = " ".join(advice([row], {0.9, 0.7}, "fidelity at least 0.99"))
    assert "reduce, with keep rate 0.7, the fastest with fidelity at least 0.99: 1.50 times as fast" in lines
    assert "costs accuracy" not in lines
    slow = verdicts.judge(8, _seconds(**{"0.9": 1.0, "0.5": 1.9}), {0.9})
    lines = " ".join(advice([slow], {0.9}, "fidelity at least 0.99"))
    assert "keep rate 0.5 would pay, but only 0.9 has fidelity at least 0.99" in lines
    lines = " ".join(advice([verdicts.judge(8, seconds, set())], set(), "fidelity at least 0.99"))
    assert "no keep rate has fidelity at least 0.99" in lines


def test_choose():
    rows = [{"speedup": speed, "name": name} for speed, name in ((1.2, "a"), (1.9, "b"), (1.5, "c"), (0.9, "d"))]
    assert choose(rows, lambda row: row["name"] in "acd")["name"] == "c"
    assert choose(rows, lambda row: row["name"] == "d") is None


def test_pretrained_weights_are_tried_once_and_missed_in_one_line(monkeypatch):
    asked = []
    monkeypatch.setattr(
        hub, "_hub_trouble", lambda seconds: asked.append(seconds) or "the hub cannot be reached: no route"
    )
    done = run(
        *("compare", "--model", MODEL, "--batch", "1", "--rounds", "1", "--methods", "topk", "--keep-rate", "0.5"),
        *("--no-pictures", "--no-fidelity"),
    )
    assert done.exit_code == 0, done.output
    assert asked == [5.0]
    notes = [line for line in done.stderr.splitlines() if line.startswith("note:")]
    assert notes == ["note: pretrained weights cannot be had (the hub cannot be reached: no route), so they are random"]
    assert "random weights (seed 10)" in done.stdout


def test_demanded_weights_are_tried_once_too(monkeypatch):
    """The hub's own client tries again for a minute."""
    from huggingface_hub import constants

    offline = []

    def create(name, **_):
        offline.append(constants.HF_HUB_OFFLINE)
        raise OSError("nothing in the cache")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("fastreduce.speed.models.create_model", create)
    monkeypatch.setattr(hub, "_hub_trouble", lambda seconds: "the hub cannot be reached: no route")
    done = run("compare", "--model", MODEL, "--pretrained", "--no-pictures")
    assert done.exit_code == 2, done.output
    assert done.stderr.splitlines()[-1] == (
        "error: the pretrained weights 'test_vit' cannot be had: the hub cannot be reached: no route"
    )
    assert offline == [True]
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch):
    """A name server that hangs has no time limit of its own."""
    import threading
    import time

    from huggingface_hub import constants

    released = threading.Event()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def hang(*_, **__):
        released.wait(20)
        raise OSError("too late")

    monkeypatch.setattr(hub.urllib.request, "urlopen", hang)
    start = time.perf_counter()
    assert hub._hub_trouble(0.05) == "the hub did not answer within 0.05 seconds"
    assert time.perf_counter() - start < 10
    released.set()


@pytest.mark.parametrize("chosen", [None, {"label": "topk", "keep_rate": 0.5}])
def test_the_plot_tells_of_a_ring_where_there_is_one(monkeypatch, tmp_path, chosen):
    notes = []
    monkeypatch.setattr(draw, "save_tradeoff", lambda *given: notes.append(given[4]))
    about = {"images": 2, "wanted": "fidelity at least 0.99", "chosen": chosen}
    result = {"methods": [], "fidelity": about, "model": "m", "weights": "w", "batch": 1}
    _save_tradeoff(result | {"environment": {"device_name": "d"}}, tmp_path / "tradeoff.png")
    ring = "" if chosen is None else "; ring: the fastest with fidelity at least 0.99"
    assert notes == [f"keep rates beside the points; 2 images{ring}"]
