"""``fastreduce study evaluate --official``: the paper's checkpoints, as files of their layout that are made here."""

import argparse

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("typer")

from PIL import Image

from fastreduce.study import official as published
from fastreduce.study.data import open_data
from fastreduce.study.official import choose_file, parse_name
from fastreduce.study.protocol import Backbone, Reduction

from .test_study import refused, run

NAMES = {
    "topk_small_patch16_224-3_6_9-_0.9": ("small", Reduction("topk", 0.9, (3, 6, 9))),
    "evit_tiny_patch16_224-3_6_9-_0.25": ("tiny", Reduction("evit", 0.25, (3, 6, 9))),
    "dyvit_base_patch16_224-2_5-_0.7.pth": ("base", Reduction("dynamicvit", 0.7, (2, 5))),
    "imagenet/tome_small_patch16_224-3_6_9-_0.5/best_checkpoint.pth": ("small", Reduction("tome", 0.5, (3, 6, 9))),
    "sinkhorn_small-0.5": ("small", Reduction("sinkhorn", 0.5, (3, 6, 9))),
    "deit_small_patch16_224_local": ("small", None),
    "heuristic_small_patch16_224-l1-3_6_9-_0.5": (
        "small",
        Reduction("radial", None, (3, 6, 9), {"norm": "l1", "schedule": "contiguous"}),
    ),
    "heuristic_small_patch16_224-linf-not_contiguous-3_6_9-_0.5": (
        "small",
        Reduction("radial", 0.5, (3, 6, 9), {"norm": "linf", "schedule": "stages"}),
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    found = parse_name(name)
    size, reduction = NAMES[name]
    assert (found.backbone, found.reduction) == (Backbone(f"deit_{size}_patch16_224"), reduction)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_small_patch16_224", "names no published checkpoint"),
        ("topk_small_patch16_224", "must be one number, like -_0.9 at its end; found none"),
        ("topk_small_patch16_224-3_6_9-_0.9_0.5", "found 0.9, 0.5"),
        ("heuristic_small_patch16_224-l1-sub", "whose keep rate must be one number"),
        ("", "names no published checkpoint"),
    ],
)
def test_names_that_say_too_little(name, words):
    with pytest.raises(ValueError, match=words):
        parse_name(name)


def test_the_file_of_a_name():
    files = ["README.md", "IM/topk_small_patch16_224-3_6_9-_0.9.pth", "NAB/topk_small_patch16_224-3_6_9-_0.9.pth"]
    name = "topk_small_patch16_224-3_6_9-_0.9"
    assert choose_file(name, files, "imagenet") == files[1]
    assert choose_file("topk_small_0.9", files, "nabirds") == files[2]
    assert choose_file(files[2], files, "imagenet") == files[2]
    with pytest.raises(ValueError, match="has several checkpoints"):
        choose_file(name, files, "coco")
    with pytest.raises(ValueError, match=r"has no checkpoint 'topk_small_0\.5'"):
        choose_file("topk_small_0.5", files, "imagenet")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Make validation images alone, in two classes."""
    root = tmp_path_factory.mktemp("imagenet")
    torch.manual_seed(0)
    for label in ("n01", "n02"):
        (root / "val" / label).mkdir(parents=True)
        for number in range(3):
            pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / "val" / label / f"{number}.png")
    return root


def write_official(path, reduction, ema_best):
    """Write a checkpoint as the released code does: its names, two sets, arguments -> the model that counts."""
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = Backbone("deit_tiny_patch16_224").build(2)
        models.append(model if reduction is None else reduction.apply(model))
    sets = [{name.removeprefix("reducers."): value for name, value in model.state_dict().items()} for model in models]
    torch.save({"model": sets[0], "model_ema": sets[1], "ema_best": ema_best, "args": argparse.Namespace(lr=1)}, path)
    return models[ema_best].eval()


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_a_published_checkpoint_beside_the_unreduced_model(root, tmp_path):
    file = tmp_path / "dyvit_tiny_patch16_224-3_6_9-_0.5.pth"
    model = write_official(file, Reduction("dynamicvit", 0.5, (3, 6, 9)), True)
    plain = write_official(tmp_path / "deit.pth", None, False)
    options = ("--dataset", "imagenet", "--root", root, "--rounds", 3, "--batch-size", 6, "--workers", 0, "--cpu")
    done = run("evaluate", "--official", file, "--checkpoint", tmp_path / "deit.pth", *options)
    assert done.exit_code == 0, done.output
    data = open_data("imagenet", root, train=False)
    images, labels = map(torch.stack, zip(*(data.val[index] for index in range(6)), strict=True))
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    rows = {words[0]: words for words in lines if words[0] in ("unreduced", "dynamicvit-0.5")}
    for name, one, tokens in (("unreduced", plain, ["all"]), ("dynamicvit-0.5", model, ["98,", "49,", "24"])):
        with torch.no_grad():
            right = 100 * (one(images).argmax(1) == labels).double().mean().item()
        assert rows[name][1] == f"{right:.2f}"
        assert rows[name][3 : 3 + len(tokens)] == tokens
        assert float(rows[name][-2]) > 0
    assert rows["unreduced"][-1] == "1.00"
    assert float(rows["dynamicvit-0.5"][-3]) < float(rows["unreduced"][-3])


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_without_a_hub(root, tmp_path, monkeypatch):
    """The published accuracy stands; of the unreduced model, whose weights cannot be had, the speed alone."""
    file = tmp_path / "topk_tiny_patch16_224-3_6_9-_0.5.pth"
    write_official(file, Reduction("topk", 0.5, (3, 6, 9)), False)
    options = ("--dataset", "imagenet", "--root", root, "--rounds", 3, "--batch-size", 6, "--workers", 0, "--cpu")
    done = run("evaluate", "--official", file, *options)
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if "unreduced (random weights)" in line)
    assert line.split()[3:5] == ["–", "–"]
    assert "timm's weights cannot be had" in " ".join(done.stdout.split())

    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", unreachable)
    words = refused("evaluate", "--official", "topk_tiny_patch16_224-3_6_9-_0.5", *options)
    assert "there is no file 'topk_tiny_patch16_224-3_6_9-_0.5' here, and joakimbh/TokenReduction" in words


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_a_file_from_the_hub(root, tmp_path, monkeypatch):
    file = tmp_path / "topk_tiny_patch16_224-3_6_9-_0.5.pth"
    write_official(file, Reduction("topk", 0.5, (3, 6, 9)), False)
    listed = argparse.Namespace(siblings=[argparse.Namespace(rfilename=f"ImageNet/{file.name}")])
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda self, repo, timeout: listed)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *given: asked.append(given) or str(file))
    assert published.find_on_hub("topk_tiny-0.5", "imagenet") == (file, f"ImageNet/{file.name}")
    assert asked == [("joakimbh/TokenReduction", f"ImageNet/{file.name}")]


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_what_does_not_go_together_is_refused(root, tmp_path):
    file = tmp_path / "dyvit_tiny_patch16_224-3_6_9-_0.5.pth"
    write_official(file, Reduction("topk", 0.5, (3, 6, 9)), False)
    given = ("--dataset", "imagenet", "--root", root)
    for arguments, words in (
        (("evaluate", "--official", file, *given, "--workers", 0), "score_predictor"),  # a Top-K's weights
        (("evaluate", "--official", file), "--official needs --dataset"),
        (("evaluate", "--official", file, *given, "--method", "topk"), "leave --method out"),
        (("evaluate", "--official", "who_knows", *given), "names no published checkpoint"),
        (("evaluate", *given), "give WEIGHTS, or --official NAME"),
    ):
        assert words in refused(*arguments), arguments
