"""The study's data sets, as small files in the layouts that they are published in."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastreduce.study.data import Augmentation, Shifts, open_data
from tests.helpers.inputs import rewrite

PLAIN = Augmentation(rand_augment=None, random_erasing=0.0, cutout=0.0)


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (9, 7), 128).save(path)


def write_imagenet(root):
    for split, count in (("train", 2), ("val", 1)):
        for name in ("n02", "n01"):
            for number in range(count):
                write_image(root / split / name / f"{number}.jpg")


def write_nabirds(root):
    (root / "images.txt").parent.mkdir(parents=True, exist_ok=True)
    files = {"a-1": "0817/a.jpg", "b-2": "0817/b.jpg", "c-3": "1002/c.jpg", "d-4": "0295/d.jpg"}
    for file in files.values():
        write_image(root / "images" / file)
    labels = {"a-1": 817, "b-2": 817, "c-3": 1002, "d-4": 295}
    (root / "images.txt").write_text("".join(f"{key} {file}\n" for key, file in files.items()))
    (root / "image_class_labels.txt").write_text("".join(f"{key} {label}\n" for key, label in labels.items()))
    (root / "train_test_split.txt").write_text("a-1 1\nb-2 0\nc-3 1\nd-4 0\n")
    (root / "classes.txt").write_text("0 Birds\n295 Snow Goose (White morph)\n817 Merlin\n1002 Dunlin\n")
    (root / "hierarchy.txt").write_text("295 0\n817 0\n1002 0\n")


def coco_split(split):
    return {
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "images": [{"id": number, "file_name": f"{split}_{number}.jpg"} for number in (7, 5, 9)],
        "annotations": [
            {"image_id": 5, "category_id": 90, "area": 10.0},
            {"image_id": 5, "category_id": 1, "area": 20000.0},
            {"image_id": 5, "category_id": 1, "area": 20.0},
            {"image_id": 9, "category_id": 3, "area": 2000.0},
        ],
    }


def write_coco(root, **changes):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train2014", "val2014"):
        content = {**coco_split(split), **changes.get(split, {})}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for image in content["images"]:
            write_image(root / split / image["file_name"])


NUSWIDE = (
    "filepath,label,split_name\n"
    "images/1.jpg,\"['sky', 'clouds']\",train\n"
    "images/2.jpg,\"['water']\",val\n"
    "images/3.jpg,[],train\n"
)


def write_nuswide(root, text=NUSWIDE):
    for number in (1, 2, 3):
        write_image(root / "images" / f"{number}.jpg")
    (root / "nus_wid_data.csv").write_text(text)


def test_digits():
    data = open_data("digits")
    assert (len(data.train), len(data.val), data.num_classes) == (1195, 602, 10)
    assert data.classes == tuple("0123456789")
    assert not data.multi_label
    # both splits have every class in equal shares, and no image in both
    for digit in range(10):
        assert (data.train.labels == digit).sum() == pytest.approx(2 * int((data.val.labels == digit).sum()), abs=2)
    rows = torch.cat([data.train.sources, data.val.sources]).flatten(1)
    assert len({row.numpy().tobytes() for row in rows}) == 1797
    image, label = data.val[0]
    assert image.shape == (3, 32, 32)
    assert (label.dtype, label.ndim) == (torch.int64, 0)
    assert image.min() == -1
    assert 0.5 < image.max() <= 1
    assert torch.equal(image, data.val[0][0])

    torch.manual_seed(0)
    first, second = data.train[0][0], data.train[0][0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(data.train[0][0], first)
    still = open_data("digits", image_size=16, augmentation=Shifts(0.0, 0.0, 0.0, 0.0)).train
    assert torch.equal(still[0][0], still.sources[0].expand(3, -1, -1) * 2 - 1)


def test_imagenet(tmp_path):
    write_imagenet(tmp_path)
    data = open_data("imagenet", tmp_path, image_size=8)
    assert (len(data.train), len(data.val), data.classes) == (4, 2, ("n01", "n02"))
    images, labels = next(iter(DataLoader(data.train, batch_size=4)))
    assert (images.shape, images.dtype) == ((4, 3, 8, 8), torch.float32)
    assert labels.tolist() == [0, 0, 1, 1]


def test_evaluation_sees_the_middle(tmp_path):
    """224 of 256, as the paper's."""
    write_imagenet(tmp_path)
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[4:60, 20:76] = 255
    for path in (tmp_path / "val").glob("*/*.jpg"):
        Image.fromarray(picture).save(path, quality=100, subsampling=0)
    image = open_data("imagenet", tmp_path, image_size=28).val[0][0]
    white = (torch.ones(3) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(image[:, 2:-2, 2:-2].amin((1, 2)), white, atol=0.05)


def test_nabirds(tmp_path):
    write_nabirds(tmp_path)
    data = open_data("nabirds", tmp_path, image_size=8)
    assert data.classes == ("Snow Goose (White morph)", "Merlin", "Dunlin")
    assert [path.name for path in data.train.sources] == ["a.jpg", "c.jpg"]
    assert data.train.labels.tolist() == [1, 2]
    assert data.val.labels.tolist() == [1, 0]
    assert data.augmentation.rand_augment is None


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("images.txt", "a-1\n", r"images\.txt, line 1: expected two fields, got 'a-1'"),
        ("images.txt", "a-1 x\na-1 y\n", r"images\.txt, line 2: 'a-1' occurs twice"),
        ("image_class_labels.txt", "a-1 817\nz 1\n", r"labels\.txt, line 2: images\.txt has no image 'z'"),
        ("image_class_labels.txt", "a-1 817\n", r"labels\.txt has no line for the image 'b-2'"),
        ("image_class_labels.txt", "a-1 5\nb-2 817\nc-3 817\nd-4 817\n", "image 'a-1' is of class '5', not a class"),
        ("train_test_split.txt", "a-1 1\nb-2 2\nc-3 1\nd-4 0\n", r"split\.txt: image 'b-2' must have 0 or 1, got '2'"),
        ("train_test_split.txt", "a-1 1\nb-2 1\nc-3 1\nd-4 1\n", r"split\.txt has no image with 0"),
        ("classes.txt", None, r"classes\.txt is missing"),
        ("images.txt", "a-1 x.jpg\nb-2 x.jpg\nc-3 y.jpg\nd-4 z.jpg\n", r"images\.txt names 'x\.jpg' twice"),
        ("images.txt", "a-1\t0817/a.jpg\n", r"images\.txt, line 1: expected two fields"),
        ("images.txt", "a-1 0817/a.jpg more\nb-2 b\nc-3 c\nd-4 d\n", r"0817/a\.jpg more, which .* names, is missing"),
        ("image_class_labels.txt", "a-1 817 1\nb-2 817\nc-3 817\nd-4 817\n", "'a-1' is of class '817 1', not a class"),
        ("classes.txt", "0 Birds\n817 \0\n", r"classes\.txt, line 2: expected two fields"),
    ],
)
def test_malformed_nabirds(tmp_path, file, text, message):
    write_nabirds(tmp_path)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_data("nabirds", tmp_path)


def test_coco(tmp_path):
    write_coco(tmp_path)
    data = open_data("coco", tmp_path, image_size=8)
    assert data.classes == ("person", "car", "toothbrush")
    assert data.multi_label
    assert [path.name for path in data.train.sources] == ["train2014_5.jpg", "train2014_9.jpg"]
    image, label = data.train[0]
    assert image.shape == (3, 8, 8)
    assert (label.dtype, label.tolist()) == (torch.float32, [1, 0, 1])
    assert data.val[1][1].tolist() == [0, 1, 0]


def test_cutout_hides_a_quarter(tmp_path):
    write_coco(tmp_path)
    data = open_data("coco", tmp_path, image_size=16, augmentation=Augmentation(rand_augment=None))
    whole, cut = data.val[0][0], data.train[0][0]
    assert int((whole != cut).all(0).sum()) == 64
    same = open_data("coco", tmp_path, image_size=16, augmentation=PLAIN)
    assert torch.equal(same.train[0][0], whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [{"image_id": 5}]}, r"instances_val2014\.json: annotations\[0\] must have image_id and cat"),
        ({"annotations": [{"image_id": 4, "category_id": 1}]}, r"annotations\[0\] has the unknown image_id 4"),
        ({"annotations": [{"image_id": 5, "category_id": 2}]}, r"annotations\[0\] has the unknown category_id 2"),
        ({"annotations": []}, r"instances_val2014\.json has no image with annotations"),
        (
            {"annotations": [{"image_id": [5], "category_id": 1}]},
            r"annotations\[0\] must have image_id and category_id",
        ),
        (
            {"annotations": [{"image_id": True, "category_id": 1}]},
            r"annotations\[0\] must have image_id and category_id",
        ),
        (
            {"annotations": [{"image_id": 5.5, "category_id": 1}]},
            r"annotations\[0\] must have image_id and category_id",
        ),
        ({"annotations": ["5"]}, r"annotations\[0\] must have image_id and category_id, got '5'"),
        ({"images": [{"id": 5, "file_name": 7}]}, r"images\[0\] must have id and file_name"),
        ({"images": [{"id": 5, "file_name": " "}]}, r"images\[0\] must have id and file_name"),
        ({"images": [{"id": 5, "file_name": f"{n}.jpg"} for n in "ab"]}, r"images\[1\] has the id 5 of another"),
        ({"images": [{"id": n, "file_name": "a.jpg"} for n in (5, 6)]}, r"images\[1\] has the file_name 'a\.jpg' of"),
        ({"categories": [{"id": 1, "name": n} for n in "ab"]}, r"categories\[1\] has the id 1 of another"),
        ({"categories": [{"id": n, "name": "a"} for n in (1, "1")]}, r"categories\[1\] has the name 'a' of another"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": "b", "name": "b"}]}, "has other categories than"),
        ({"images": {}}, r"instances_val2014\.json has no list 'images'"),
        ({"categories": [{"id": 1, "name": "person"}]}, "has other categories than"),
    ],
)
def test_malformed_coco(tmp_path, changes, message):
    write_coco(tmp_path)
    path = tmp_path / "annotations" / "instances_val2014.json"
    path.write_text(json.dumps({**coco_split("val2014"), **changes}))
    with pytest.raises(ValueError, match=message):
        open_data("coco", tmp_path)


def test_coco_files(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "val2014" / "val2014_9.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"val2014_9\.jpg, which .*instances_val2014\.json names, is missing"):
        open_data("coco", tmp_path)
    (tmp_path / "annotations" / "instances_val2014.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"instances_val2014\.json is not JSON: .*line 1"):
        open_data("coco", tmp_path)
    (tmp_path / "annotations" / "instances_train2014.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances_train2014\.json is missing"):
        open_data("coco", tmp_path)


@pytest.mark.parametrize("header", [True, False])
def test_nuswide(tmp_path, header):
    write_nuswide(tmp_path, NUSWIDE if header else NUSWIDE.split("\n", 1)[1])
    data = open_data("nuswide", tmp_path, image_size=8)
    assert data.classes == ("clouds", "sky", "water")
    assert data.multi_label
    assert data.train.labels.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert data.val.labels.tolist() == [[0, 0, 1]]
    assert data.train[0][0].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/1.jpg,['sky']", r"nus_wid_data\.csv, line 5: expected file name, labels and split"),
        ("images/1.jpg,['sky'],test", r"line 5: the split must be train or val, got 'test'"),
        ("images/1.jpg,sky,val", r"line 5: 'sky' is not a list of labels"),
        ("images/1.jpg,[3],val", r"line 5: '\[3\]' is not a list of labels"),
        ("images/4.jpg,['sky'],val", r"4\.jpg, which .*nus_wid_data\.csv names, is missing"),
        ("images/1.jpg,['sky', 'clouds'],train", r"line 5: expected file name, labels and split, got \['images/1"),
        ("images/4.jpg,['sky'],val,1", r"line 5: expected file name, labels and split"),
        ("images/2.jpg,['sky'],train", r"line 5: 'images/2\.jpg' occurs twice"),
        (",['sky'],train", r"line 5: '' is not a file name"),
        ("\n\nimages/1.jpg,['sky'],Val", r"line 7: the split must be train or val, got 'Val'"),
        ("images/4.jpg,['sky', ''],val", "line 5: expected"),
        ("images/4.jpg,[''],val", "line 5: .* is not a list of labels"),
        ("images/4.jpg,[' sky'],val", "line 5: .* is not a list of labels"),
        ("images/4.jpg,['a' 'b'],val", "line 5: .* is not a list of labels"),
        ("images/4.jpg,('a'),val", "line 5: .* is not a list of labels"),
        (f"images/4.jpg,{'[' * 9999}{']' * 9999},val", "line 5: .* is not a list of labels"),
        (f"images/4.jpg,{'-' * 99999}1,val", "line 5: .* is not a list of labels"),
        (f"images/4.jpg,{'x' * 200_000},val", "line 5: field larger than field limit"),
        ("images/4.jpg,\"['sky'],val", "line 5: unexpected end of data"),
        ("images/4.jpg,\"['sky']\"x,val", "line 5: ',' expected after"),
        ("images/4\0.jpg,['sky'],val", r"line 5|which .* names, is missing"),
    ],
)
def test_malformed_nuswide(tmp_path, line, message):
    write_nuswide(tmp_path, NUSWIDE + line + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_data("nuswide", tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        "images/1.jpg,\"['sky']\",Train",
        "images/1.jpg,['sky'],",
        "images/1.jpg,\"['sky', 'clouds']\",trian",
        "images/1.jpg,['sky', 'clouds'],train",
        "images/1.jpg,sky,Train",
        "filepath,label",
        "picture,sky,Train",
        "images,label,split",  # a folder of that name is there
    ],
)
def test_a_first_row_that_is_no_header_is_not_taken_for_one(tmp_path, row):
    write_nuswide(tmp_path, f"{row}\n" + NUSWIDE.split("\n", 1)[1])
    with pytest.raises(ValueError, match=r"nus_wid_data\.csv, line 1: (the split must|expected file name)"):
        open_data("nuswide", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + NUSWIDE,
        "\ufeff" + NUSWIDE.split("\n", 1)[1],
        NUSWIDE.replace("\n", "\r\n"),
        "\n\n" + NUSWIDE.replace("\n", "\n\n"),
        NUSWIDE.replace("filepath,label,split_name", "image, tags ,Split Name"),
        NUSWIDE.rstrip("\n"),
        NUSWIDE.replace("['sky', 'clouds']", "[ 'sky' ,\n'clouds',]"),
    ],
)
def test_other_spellings_of_nuswide(tmp_path, text):
    write_nuswide(tmp_path)
    (tmp_path / "nus_wid_data.csv").write_bytes(text.encode())
    data = open_data("nuswide", tmp_path, image_size=8)
    assert (data.classes, len(data.train), len(data.val)) == (("clouds", "sky", "water"), 2, 1)
    assert data.train.labels.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_other_spellings_of_nabirds(tmp_path):
    write_nabirds(tmp_path)
    wanted = open_data("nabirds", tmp_path, image_size=8)
    for path in tmp_path.glob("*.txt"):
        path.write_bytes(("\ufeff" + path.read_text().replace("\n", "\r\n\r\n")).encode())
    data = open_data("nabirds", tmp_path, image_size=8)
    assert (data.classes, data.train.sources) == (wanted.classes, wanted.train.sources)


FILES = {
    "nabirds": ["images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"],
    "coco": ["annotations/instances_train2014.json", "annotations/instances_val2014.json"],
    "nuswide": ["nus_wid_data.csv"],
}
WRITERS = {"nabirds": write_nabirds, "coco": write_coco, "nuswide": write_nuswide}
PIECES = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b'"', b"'", b"[", b"{", b"}", b",", b" ", b"\n", b"1e999", b"NaN"]
PIECES += [b"null", b"-1", b"true", b"9" * 30, b"\xed\xa0\x80", rb"\ud800", b"[" * 2000, b"../", b"/", b"train", b"id"]


@pytest.mark.parametrize("name", FILES)
def test_damaged_lists_end_in_one_line(tmp_path, name):
    """Cut at every byte, in other encodings, and with pieces put in at random: data as listed, or an error."""
    WRITERS[name](tmp_path)
    chance = random.Random(0)
    for file in FILES[name]:
        path = tmp_path / file
        whole = path.read_bytes()
        cuts = [whole[:end] for end in range(len(whole))]
        coded = [whole.decode().encode(code) for code in ("utf-16", "utf-32", "utf-16-le")]
        mixed = []
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(chance.randrange(1, 4)):
                place = chance.randrange(len(content))
                content[place : place + chance.choice([0, 1, 5])] = chance.choice(PIECES)
            mixed.append(bytes(content))
        for content in (*cuts, *coded, *mixed, b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000):
            rewrite(path, content)
            try:
                data = open_data(name, tmp_path, image_size=8)
            except (ValueError, FileNotFoundError) as error:
                assert str(tmp_path) in str(error)  # noqa: PT017
                assert len(str(error).splitlines()) == 1  # noqa: PT017
            else:
                assert len(data.train.sources) == len(data.train.labels) > 0
        rewrite(path, whole)


def test_malformed_imagenet(tmp_path):
    with pytest.raises(FileNotFoundError, match="train must hold one folder of images for each class"):
        open_data("imagenet", tmp_path)
    write_imagenet(tmp_path)
    write_image(tmp_path / "val" / "n03" / "0.jpg")
    with pytest.raises(ValueError, match="must hold the same classes; only one has 'n03'"):
        open_data("imagenet", tmp_path)


def test_a_broken_image_is_named(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "val" / "n01" / "0.jpg").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(ValueError, match=r"val/n01/0\.jpg cannot be read as an image"):
        open_data("imagenet", tmp_path, image_size=8).val[0]


def test_wrong_requests(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'cifar'; expected one of digits, imagenet"):
        open_data("cifar")
    with pytest.raises(ValueError, match="coco needs the folder"):
        open_data("coco")
    for wrong in (0, -1, 2.5, "8"):
        with pytest.raises(ValueError, match="image_size must be a positive number of pixels, got "):
            open_data("digits", image_size=wrong)
    with pytest.raises(FileNotFoundError, match=r"there is no folder '/nowhere', which is to hold imagenet"):
        open_data("imagenet", "/nowhere")
    with pytest.raises(ValueError, match="digits comes with scikit-learn"):
        open_data("digits", tmp_path)
    with pytest.raises(TypeError, match="digits is augmented by Shifts"):
        open_data("digits", augmentation=Augmentation())
    with pytest.raises(TypeError, match="imagenet is augmented by Augmentation"):
        open_data("imagenet", tmp_path, augmentation=Shifts())
