"""Photographs: folders with and without labels, and the pictures of the libraries."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastreduce.quality.images import folder_images, sample_images

CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.5, 0.25, 0.2),
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def _folder(root, names, colour=(255, 102, 51)):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), colour).save(path)
    return str(root)


def test_pictures_are_normalised(tmp_path):
    images = folder_images(_folder(tmp_path, ["a.png", "b.jpg", "deep/c.webp"]))
    assert images.names == ("a.png", "b.jpg", "deep/c.webp")
    assert not images.labels
    tensor = images.tensor(CONFIG, [0])
    assert tensor.shape == (1, 3, 32, 32)
    wanted = [(1 - 0.5) / 0.5, (0.4 - 0.4) / 0.25, (0.2 - 0.3) / 0.2]
    assert tensor[0, :, 5, 5].tolist() == pytest.approx(wanted, abs=1e-6)
    assert [len(batch[0]) for batch in images.batches(CONFIG, 2)] == [2, 1]


@pytest.mark.parametrize(
    ("folders", "classes", "labels", "words"),
    [
        (("cat", "dog"), 2, (0, 1), "2 classes, folders in their order"),
        (("cat", "dog"), 3, (), "2 class folders for a head of 3 classes"),
        (("cat", "dog"), 0, (), "no head"),
        (("2", "10"), 11, (10, 2), "folder names"),
        (("2", "10"), 5, (), "indices up to 10, and the head has 5 classes"),
        (("2", "x"), 5, (), "2 class folders for a head of 5 classes"),
        (("1", "2"), 2, (0, 1), "2 classes, folders in their order"),
        # Torchvision and timm sort these in two ways.
        (("c1", "c2", "c10"), 3, (), "c10 stands before c2 by letters"),
        (("Zebra", "ant"), 2, (), "Zebra stands before ant by letters"),
        (("1", "2", "10"), 3, (), "name the folders by class index"),
        (("n01440764", "n01484850"), 1000, (0, 2), "ImageNet"),
        (("n01440764", "n99999999"), 1000, (), "n99999999 is none of ImageNet's classes for a head of 1000 classes"),
        (("n01440764", "n01484850"), 10, (), "do not fit a head of 10 classes"),
    ],
)
def test_class_folders_give_labels_that_fit_the_head(tmp_path, folders, classes, labels, words):
    images = folder_images(_folder(tmp_path, [f"{name}/x.png" for name in folders]), classes)
    assert images.labels == labels
    assert words in images.note
    batch = next(images.batches(CONFIG))
    assert len(batch) == (2 if labels else 1)
    if labels:
        assert batch[1].tolist() == list(labels)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("x.png", "y.png"), "no class folders, so no labels"),
        (("x.png", "cat/x.png", "dog/x.png"), "1 picture outside class folders, x.png first, so no labels"),
        (("x.png", "y.png", "cat/x.png"), "2 pictures outside class folders, x.png first, so no labels"),
    ],
)
def test_pictures_outside_class_folders_are_said(tmp_path, names, words):
    images = folder_images(_folder(tmp_path, names), 2)
    assert (images.labels, images.note) == ((), words)


def test_a_class_without_a_picture_keeps_its_index(tmp_path):
    (tmp_path / "ant").mkdir()
    images = folder_images(_folder(tmp_path, ["bee/x.png", "cow/x.png"]), 3)
    assert images.labels == (1, 2)


def test_hidden_folders_are_no_classes(tmp_path):
    """Counted as one, an editor's folder would shift every label."""
    names = ["bee/x.png", "cow/x.png", "cow/.y.png", ".ipynb_checkpoints/x.png"]
    images = folder_images(_folder(tmp_path, names), 2)
    assert images.names == ("bee/x.png", "cow/x.png")
    assert images.labels == (0, 1)


def test_most_takes_pictures_from_everywhere(tmp_path):
    names = [f"{number:02}.png" for number in range(10)]
    assert folder_images(_folder(tmp_path, names), most=3).names == ("00.png", "03.png", "06.png")


def test_wrong_folders_are_said(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        folder_images(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="no picture"):
        folder_images(str(tmp_path))


def test_photographs_of_the_libraries():
    one, two = sample_images(1), sample_images(2)
    assert two.names[: len(one)] == one.names
    assert len(two) == 2 * len(one)
    tensor = two.tensor(CONFIG, [0, 1, len(one)])
    assert len({float(image.mean()) for image in tensor}) == 3
    assert torch.equal(tensor[:2], one.tensor(CONFIG, [0, 1]))
    assert np.isfinite(tensor.numpy()).all()
    with pytest.raises(ValueError, match="between 1 and 4, got 0"):
        sample_images(0)
