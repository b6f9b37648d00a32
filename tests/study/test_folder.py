"""Labelled pictures in folders and tar files, and a study of them: off the shelf, and with a backbone of its own."""

import copy
import dataclasses
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

pytest.importorskip("accelerate")
pytest.importorskip("typer")

from safetensors.torch import load_file, save_file

from fastreduce.cli.study_options import make_recipe, parse_model_options
from fastreduce.integrations.timm import patch
from fastreduce.study import layouts as reading
from fastreduce.study import run as running
from fastreduce.study.data import Augmentation, Crops, Shifts, open_data
from fastreduce.study.protocol import Backbone, Reduction, augmentation_for
from fastreduce.study.recipe import CIFAR10, without_training
from fastreduce.study.train import train
from tests.cli.test_study import refused, run

from .test_train import BACKBONE, PLAIN, few_digits

CLASSES = ("cat", "dog10", "dog9")
SMALL = ("patch_size=4", "embed_dim=16", "depth=4", "num_heads=2")


def pixels(label, number, size=16):
    """Make a picture of one colour, which JPEG keeps."""
    return np.full((size, size, 3), 40 + 60 * label + 5 * number, np.uint8)


def write_folders(root, counts=(("train", 4), ("test", 3)), size=16):
    for split, count in counts:
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(pixels(label, number, size)).save(root / split / name / f"{number}.png")


def write_tars(source, target):
    target.mkdir()
    for split in ("train", "test"):
        with tarfile.open(target / f"{split}.tar", "w") as tar:
            tar.add(source / split, split)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_folders(root)
    return root


@pytest.fixture(scope="module")
def tars(root, tmp_path_factory):
    target = tmp_path_factory.mktemp("packed") / "tars"
    write_tars(root, target)
    return target


def everything(data, **options):
    return [torch.cat(parts) for parts in zip(*DataLoader(data.val, batch_size=4, **options), strict=True)]


def test_folders_and_tar_files_are_one_data_set(root, tars):
    packed, loose = (open_data("folder", place, image_size=16, augmentation=Crops(padding=0)) for place in (tars, root))
    for data in (packed, loose):
        assert (data.name, len(data.train), len(data.val), data.num_classes) == ("folder", 12, 9, 3)
        # natural order: dog9 before dog10
        assert data.classes == ("cat", "dog9", "dog10")
        images, labels = everything(data)
        assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        colours = (images * torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]) * 255
        wanted = [
            40 + 60 * CLASSES.index(data.classes[label]) + 5 * number for label in range(3) for number in range(3)
        ]
        assert torch.allclose(colours.mean((1, 2, 3)), torch.tensor(wanted, dtype=torch.float32), atol=0.6)
    # every process has files of its own
    forked = everything(packed, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(forked[0], everything(packed)[0])
    assert torch.equal(pickle.loads(pickle.dumps(packed)).val[8][0], packed.val[8][0])


def test_a_tar_file_for_each_class(root, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for name in CLASSES:
            with tarfile.open(tmp_path / split / f"{name}.tar", "w") as tar:
                for path in sorted((root / split / name).iterdir()):
                    tar.add(path, path.name)
    data = open_data("folder", tmp_path, image_size=16)
    assert data.classes == ("cat", "dog9", "dog10")
    assert sorted(data.val.labels.tolist()) == [0] * 3 + [1] * 3 + [2] * 3
    for picture, label in zip(data.val.sources, data.val.labels.tolist(), strict=True):
        wanted = [pixels(CLASSES.index(data.classes[label]), number) for number in range(3)]
        assert any(np.array_equal(np.asarray(picture), one) for one in wanted)


def test_crops_are_shifted_and_mirrored(tmp_path):
    """Every crop of a padded picture is a reflected, shifted copy: it has the picture's pixels."""
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8).repeat(3).reshape(8, 8, 3)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(ramp).save(tmp_path / split / "a" / "0.png")
    data = open_data("cifar10", tmp_path, image_size=8, augmentation=Crops(2, (0.0,) * 3, (1.0,) * 3))
    plain = (data.val[0][0] * 255).round()
    assert torch.equal(plain[0], torch.arange(64.0).view(8, 8))
    torch.manual_seed(0)
    seen = {tuple((data.train[0][0] * 255).round()[0].flatten().tolist()) for _ in range(200)}
    assert 40 < len(seen) <= 50  # 5 x 5 places, mirrored or not
    reflected = np.pad(ramp[..., 0], 2, mode="reflect")
    places = [reflected[row : row + 8, column : column + 8] for row in range(5) for column in range(5)]
    assert seen <= {tuple(map(float, one.flatten())) for place in places for one in (place, place[:, ::-1])}


def test_malformed_folders(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has none of train, train\.tar"):
        open_data("folder", tmp_path)
    write_folders(tmp_path, (("train", 1), ("val", 1)))
    (tmp_path / "val" / "dog9" / "0.png").rename(tmp_path / "val" / "0.png")
    with pytest.raises(ValueError, match=r"must hold a folder of images for each class; 0\.png is in none"):
        open_data("folder", tmp_path)
    (tmp_path / "val" / "0.png").unlink()
    with pytest.raises(ValueError, match="must hold the same classes; only one has 'dog9'"):
        open_data("folder", tmp_path)
    assert open_data("folder", tmp_path, train=False).classes == ("cat", "dog10")
    (tmp_path / "more").mkdir()
    for name, content in (("train.tar", b"no archive"), ("test.tar", b"\0" * 1024)):
        (tmp_path / "more" / name).write_bytes(content)
    for name in ("train.tar", "test.tar"):
        with pytest.raises(ValueError, match=f"{name} must hold a folder of images for each class") as error:
            open_data("folder", tmp_path / "more", train=name == "train.tar")
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="folder is augmented by Augmentation or Crops, got Shifts"):
        open_data("folder", root, augmentation=Shifts())


def draw(root, names):
    for name in names:
        for split in ("train", "val"):
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(1, 1)).save(root / split / name)


def pack(root, target):
    """Make a tar file of every split, of members with a leading dot."""
    target.mkdir()
    for split in ("train", "val"):
        with tarfile.open(target / f"{split}.tar", "w") as tar:
            tar.add(root / split, ".")
    return target


def test_every_sort_of_picture_counts_and_nothing_hidden(tmp_path):
    draw(
        tmp_path, ["cat/1.png", "cat/2.webp", "dog/1.bmp", "dog/2.TIFF", "dog/.3.png", ".saved/1.png", "dog/.old/4.png"]
    )
    for place in (tmp_path, pack(tmp_path, tmp_path / "packed")):
        data = open_data("folder", place, image_size=16)
        assert data.classes == ("cat", "dog")
        assert data.val.labels.tolist() == [0, 0, 1, 1]
        assert len({round(data.val[index][0].sum().item()) for index in range(4)}) == 1
    assert open_data("imagenet", tmp_path, image_size=16).classes == ("cat", "dog")
    assert len(open_data("imagenet", tmp_path, image_size=16).val) == 4


@pytest.mark.parametrize("names", [("cat/a/1.png", "dog/a/1.png"), ("cat/1.png", "cat/a/1.png", "dog/1.png")])
def test_a_class_that_may_be_two_is_refused(tmp_path, names):
    draw(tmp_path, names)
    for place in (tmp_path, pack(tmp_path, tmp_path / "packed")):
        with pytest.raises(ValueError, match=r"the class of (cat|dog)/a/1\.png may be '(cat|dog)' or 'a'"):
            open_data("folder", place)


def test_a_picture_beside_the_class_folders_of_a_tar_file_is_said(tmp_path):
    draw(tmp_path, ("cat/1.png", "2.png"))
    with pytest.raises(ValueError, match=r"must hold a folder of images for each class; 2\.png is in none"):
        open_data("folder", pack(tmp_path, tmp_path / "packed"))


def test_classes_that_differ_in_case_or_zeros_have_one_order(tmp_path):
    names = ("a1", "a01", "A1", "b")
    draw(tmp_path, [f"{name}/1.png" for name in names])
    for place in (tmp_path, pack(tmp_path, tmp_path / "packed")):
        assert open_data("folder", place).classes == ("A1", "a01", "a1", "b")


def test_a_damaged_member_is_named(root, tmp_path):
    write_tars(root, tmp_path / "tars")
    data = open_data("folder", tmp_path / "tars", image_size=16)
    content = (tmp_path / "tars" / "test.tar").read_bytes()
    (tmp_path / "tars" / "test.tar").write_bytes(content.replace(b"\x89PNG", b"\x89PNK"))
    with pytest.raises(ValueError, match=r"test\.tar/test/cat/0\.png cannot be read as an image"):
        data.val[0]


@pytest.mark.parametrize("wrong", [{"mean": (0.5,)}, {"std": (1.0, 1.0, 0.0)}, {"padding": -1}])
def test_crops_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Crops(**wrong)


def test_model_options():
    words = ["img_size=32", "weight_init = jax", "qk_norm=true", "class_token=False", "init_values=1e-5"]
    assert parse_model_options(words) == {
        **{"img_size": 32, "weight_init": "jax", "qk_norm": True, "class_token": False, "init_values": 1e-5}
    }
    for wrong in ("img_size", "=3", "img_size=", "num_classes=3", "3=4"):
        with pytest.raises(ValueError, match="--model-option"):
            parse_model_options([wrong])


@pytest.mark.parametrize("word", ["foo=3", "depth=x", "num_heads=0"])
def test_model_options_that_timm_cannot_take(word):
    backbone = Backbone("vit_tiny_patch16_224", parse_model_options(["embed_dim=12", word]))
    with pytest.raises(ValueError, match=f"cannot be had from timm with embed_dim=12, {word.split('=')[0]}="):
        backbone.build(3)


def small_weights(path):
    options = parse_model_options([*SMALL, "img_size=16"])
    model = Backbone("vit_tiny_patch16_224", options).build(3)
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.3)
    save_file(model.state_dict(), path)
    return model


def test_a_study_off_the_shelf(tars, tmp_path, monkeypatch):
    """Methods are taken as they are, on weights that nothing trains: accuracy is the patched model's own."""
    monkeypatch.setattr(running, "_ROUNDS", 3)
    model = small_weights(tmp_path / "w.safetensors")
    options = [word for one in (*SMALL, "img_size=16") for word in ("--model-option", one)]
    command = ("run", "--dataset", "folder", "--root", tars, "--model", "vit_tiny_patch16_224", *options)
    command += ("--checkpoint", tmp_path / "w.safetensors", "--epochs", 0, "--workers", 0, "--cpu", "--jobs", 1)
    scans, read_split = [], reading._read_split
    monkeypatch.setattr(reading, "_read_split", lambda path: scans.append(path) or read_split(path))
    done = run(*command, "--keep-rate", 0.5, "--methods", "topk,tome,dpcknn", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert len(scans) == 4  # for training and for judging, whatever the number of models
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["recipe"]["backbone"]["checkpoint"] == "w.safetensors"
    found = written["models"]
    assert [one["method"] for one in found] == ["none", "topk", "tome", "dpcknn"]
    data = open_data("folder", tars, image_size=16)
    images, labels = everything(data)
    for one in found:
        assert one["images"] == 9
    for method, wanted in (("none", None), ("topk", {}), ("tome", {}), ("dpcknn", {"equal_weight": True})):
        reduced = model if wanted is None else patch(copy.deepcopy(model), method, keep_rate=0.5, **wanted)
        with torch.no_grad():
            right = (reduced(images).argmax(1) == labels).double().mean().item()
        held = next(one for one in found if one["method"] == method)
        assert held["accuracy"]["top1"] == pytest.approx(100 * right)
    weights = load_file(tmp_path / "out" / "models" / "topk-0.5" / "model.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    assert "none of them trained" in (tmp_path / "out" / "report.html").read_text()
    words = refused(*command, "--methods", "sit,topk", "--out", tmp_path / "other")
    assert "--epochs 0 leaves nothing trained, and sit has layers to train" in words


def _untrained():
    return without_training(CIFAR10).reductions


def test_images_are_normalised_as_pretrained_weights_want_them():
    """Off the shelf they would else be judged on other pixels than compare --images shows them."""
    half, imagenet = (0.5,) * 3, Augmentation().mean
    for name, mean in (("vit_small_patch16_224.augreg_in21k_ft_in1k", half), ("deit_small_patch16_224", imagenet)):
        backbone = Backbone(name, pretrained=True)
        for dataset in ("folder", "imagenet", "cifar10"):
            assert augmentation_for(dataset, backbone).mean == mean
            arguments = (dataset, False, ["topk"], ["0.5"], 0, backbone, None, {"epochs": 0})
            assert make_recipe(*arguments).augmentation.mean == mean
        assert augmentation_for("folder", Backbone(name)) == Augmentation()
    further = make_recipe(*("folder", False, ["topk"], ["0.5"], 0, backbone, None, {}), ["deit_tiny_patch16_224"])
    assert [one.name for one in further.capacities] == ["deit_tiny_patch16_224"]
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 want images that are normalised in another way"):
        make_recipe(*("folder", False, ["topk"], ["0.5"], 0, backbone, None, {}), ["vit_tiny_patch16_224"])


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_an_embedded_study_takes_the_pretrained_backbone_that_it_is_given(dataset):
    """It trained its own in silence."""
    backbone = Backbone("vit_tiny_patch16_224", {"img_size": 64}, pretrained=True)
    recipe = make_recipe(dataset, False, ["topk"], ["0.5"], 0, backbone, None, {})
    assert (recipe.backbone, recipe.training) == (backbone, None)
    assert recipe.image_size == (32 if dataset == "digits" else 64)
    assert [one.place for one in recipe.models] == ["unreduced", "topk-0.5"]


def test_off_the_shelf_leaves_out_what_has_to_be_trained():
    left = _untrained()
    assert {one.method for one in left} == {"topk", "evit", "ats", "tome", "kmedoids", "dpcknn", "radial"}
    assert all(one.options["equal_weight"] for one in left if one.method == "dpcknn")
    for one in left:
        assert not any("reducers" in name for name, _ in one.apply(CIFAR10.backbone.build(10)).named_parameters())


def test_layers_are_not_left_untrained(tmp_path):
    nothing = dataclasses.replace(PLAIN, epochs=0, warmup_epochs=0)
    with pytest.raises(ValueError, match="without training the backbone needs a head for the 10 classes of digits"):
        train(few_digits(), BACKBONE, nothing, tmp_path, cpu=True)
    save_file(BACKBONE.build(10).state_dict(), tmp_path / "w.safetensors")
    weights = dataclasses.replace(BACKBONE, checkpoint=tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="sit has layers to train: epochs must be at least 1"):
        train(few_digits(), weights, nothing, tmp_path / "sit", reduction=Reduction("sit", 0.5), cpu=True)


def test_a_backbone_of_its_own(tars, tmp_path, monkeypatch):
    """The command that trains a backbone: Muon, half of the patches dropped in the first epochs, then weights."""
    from fastreduce.study import recipe as recipes
    from fastreduce.study import train as training

    small = Backbone("vit_tiny_patch16_224", parse_model_options([*SMALL, "img_size=32"]))
    monkeypatch.setitem(recipes.EMBEDDED, "cifar10", dataclasses.replace(CIFAR10, backbone=small))
    seen, before = [], training._Trainer.run_epoch

    def counted(trainer, epoch, moved):
        sizes = []
        handle = trainer.model.blocks[0].register_forward_hook(lambda block, given, out: sizes.append(out.shape[1]))
        try:
            return before(trainer, epoch, moved)
        finally:
            handle.remove()
            seen.append({*sizes})

    monkeypatch.setattr(training._Trainer, "run_epoch", counted)
    options = ("--epochs", 5, "--batch-size", 4, "--cpu", "--out", tmp_path / "backbone")
    done = run("train", "--dataset", "cifar10", "--root", tars, *options)
    assert done.exit_code == 0, done.output
    assert seen == [{33}, {33}, {33}, {65}, {65}]  # of 64 patches and a class token
    history = json.loads((tmp_path / "backbone" / "training.json").read_text())
    assert history["description"]["protocol"]["optimizer"] == "muon"
    judged = run("evaluate", tmp_path / "backbone", "--root", tars, "--rounds", 3, "--cpu")
    assert judged.exit_code == 0, judged.output
    assert json.loads(judged.stdout)["accuracy"] == pytest.approx(history["epochs"][-1]["accuracy"])


def test_muon_on_a_cpu_computes_in_float32(tmp_path, monkeypatch):
    from timm.optim import muon

    kinds, before = [], muon.zeropower_via_newtonschulz

    def seen(*arguments, **options):
        found = before(*arguments, **options)
        kinds.append(found.dtype)
        return found

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", seen)
    protocol = dataclasses.replace(PLAIN, epochs=1, optimizer="muon")
    train(few_digits(16), BACKBONE, protocol, tmp_path, cpu=True)
    assert kinds
    assert {*kinds} == {torch.float32}
    assert muon.zeropower_via_newtonschulz is seen


def test_the_normalisation_of_a_training_is_that_of_its_evaluation(tars, tmp_path):
    """The training's history decides, not the default of the data set."""
    data = open_data("folder", tars, image_size=16, augmentation=Crops(0, (0.1, 0.2, 0.3), (2.0, 2.0, 2.0)))
    trained = train(data, BACKBONE, PLAIN, tmp_path / "t", cpu=True)
    done = run("evaluate", tmp_path / "t", "--root", tars, "--rounds", 3, "--cpu", "--workers", 0)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["accuracy"] == pytest.approx(trained.epochs[-1].accuracy)
    assert isinstance(open_data("folder", tars).augmentation, Augmentation)
    words = refused("evaluate", tmp_path / "t", "--root", tars, "--model-option", "img_size=32")
    assert "--model-option img_size=32 contradicts" in words
