"""The study's data sets, each in the layout that it is published in."""

from __future__ import annotations

import ast
import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from .protocol import DATA_SETS, Augmentation, Shifts

__all__ = ["DATA_SETS", "Augmentation", "DataSet", "Images", "Shifts", "open_data"]

_Transform = Callable[[Any], Tensor]
_DIGITS_MEAN = _DIGITS_STD = (0.5, 0.5, 0.5)


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images and their labels: (3, S, S) float32 and an int64 scalar, or (classes,) float32 of zeros and ones.

    Args:
        sources: a file or, already in memory, an image for each.
        labels: (N,) class indices, or (N, classes) zeros and ones.
        transform: from a PIL image, or from what ``sources`` holds in memory.
    """

    def __init__(self, sources: Sequence[Path] | Tensor, labels: Tensor, transform: _Transform):
        self.sources, self.labels, self.transform = sources, labels, transform

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        source, label = self.sources[index], self.labels[index]
        if isinstance(source, Path):
            try:
                with Image.open(source) as opened:
                    image = opened.convert("RGB")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(f"{source} cannot be read as an image: {error}") from error
            return self.transform(image), label.float() if label.ndim else label
        return self.transform(source), label.float() if label.ndim else label


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set with its two splits.

    Attributes:
        name: one of :data:`DATA_SETS`.
        classes: their names, by index.
        multi_label: whether an image can show several.
        image_size: side of the square that a model gets.
        mean, std: of the normalisation, for pictures.
        augmentation: of ``train``.
    """

    name: str
    classes: tuple[str, ...]
    multi_label: bool
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation | Shifts
    train: Images
    val: Images

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def _photo_transforms(size: int, how: Augmentation, flat: bool) -> tuple[_Transform, _Transform]:
    """For training and evaluation; ``flat`` squashes the whole image into the square, as multi-label sets do."""
    if not flat:
        train = create_transform(
            size,
            is_training=True,
            color_jitter=how.color_jitter,
            auto_augment=how.rand_augment,
            interpolation=how.interpolation,
            re_prob=how.random_erasing,
            re_mode="pixel",
        )
        return train, create_transform(size, interpolation=how.interpolation, crop_pct=how.crop)
    resize = transforms.Resize((size, size), transforms.InterpolationMode(how.interpolation))
    normalize = [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    steps: list[Any] = [resize]
    if how.rand_augment is not None:
        gray = tuple(round(255 * value) for value in IMAGENET_DEFAULT_MEAN)
        settings = {"translate_const": int(0.45 * size), "img_mean": gray}
        steps.append(rand_augment_transform(how.rand_augment, settings))
    steps += normalize
    if how.cutout > 0:
        square: dict[str, Any] = {
            "min_area": how.cutout**2,
            "max_area": how.cutout**2,
            "min_aspect": 1,
            "max_aspect": 1,
        }
        steps.append(RandomErasing(1.0, **square, mode="rand", device="cpu"))
    return transforms.Compose(steps), transforms.Compose([resize, *normalize])


def _digit_transforms(how: Shifts) -> tuple[_Transform, _Transform]:
    """From (1, S, S) in 0..1; shifted in the fine grid, so that a shift need not be a whole pixel."""
    normalize = [transforms.Lambda(lambda x: x.expand(3, -1, -1)), transforms.Normalize(_DIGITS_MEAN, _DIGITS_STD)]
    move = transforms.RandomAffine(
        how.degrees,
        (how.shift, how.shift),
        (1 - how.zoom, 1 + how.zoom),
        how.shear,
        transforms.InterpolationMode.BILINEAR,
    )
    return transforms.Compose([move, *normalize]), transforms.Compose(normalize)


def _digits(root: Path | None, size: int, how: Any) -> DataSet:
    from sklearn.datasets import load_digits

    if root is not None:
        raise ValueError(f"digits comes with scikit-learn and has no folder, got {str(root)!r}")
    if not isinstance(how, Shifts):
        raise TypeError(f"digits is augmented by Shifts, got {how!r}")
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(labels).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[torch.nonzero(labels == digit)[::3, 0]] = True
    train, val = _digit_transforms(how)
    return DataSet(
        "digits",
        tuple(str(digit) for digit in range(10)),
        False,
        size,
        _DIGITS_MEAN,
        _DIGITS_STD,
        how,
        Images(images[~held_out], labels[~held_out], train),
        Images(images[held_out], labels[held_out], val),
    )


def _photos(
    name: str,
    classes: Sequence[str],
    size: int,
    how: Augmentation,
    train: tuple[Sequence[Path], Tensor],
    val: tuple[Sequence[Path], Tensor],
) -> DataSet:
    multi_label = train[1].ndim == 2
    augmented, plain = _photo_transforms(size, how, flat=multi_label)
    return DataSet(
        name,
        tuple(classes),
        multi_label,
        size,
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
        how,
        Images(*train, augmented),
        Images(*val, plain),
    )


def _check_present(paths: Iterable[Path], listed_in: Path) -> None:
    """Raise for the first that is missing: better than in the third hour. Looks into every folder once."""
    known: dict[Path, set[str]] = {}
    for path in paths:
        if path.parent not in known:
            known[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        if path.name not in known[path.parent]:
            raise FileNotFoundError(f"{path}, which {listed_in} names, is missing")


def _imagenet(root: Path, size: int, how: Augmentation) -> DataSet:
    splits = []
    for split in ("train", "val"):
        try:
            splits.append(ImageFolder(str(root / split)))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{root / split} must hold one folder of images for each class: {error}") from error
    train, val = splits
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"{root / 'train'} and {root / 'val'} must hold the same classes; only one has {odd[0]!r}")
    parts = [([Path(path) for path, _ in split.samples], torch.tensor(split.targets)) for split in splits]
    return _photos("imagenet", train.classes, size, how, *parts)


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, first word and the rest of every line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not value:
            raise ValueError(f"{path}, line {number}: expected two fields, got {line!r}")
        yield number, key, value.strip()


def _table(path: Path, images: dict[str, str] | None = None) -> dict[str, str]:
    """A file of ``id value`` lines; with ``images``, one line for each of those."""
    table: dict[str, str] = {}
    for number, key, value in _lines(path):
        if key in table:
            raise ValueError(f"{path}, line {number}: {key!r} occurs twice")
        if images is not None and key not in images:
            raise ValueError(f"{path}, line {number}: images.txt has no image {key!r}")
        table[key] = value
    if images is not None and (lost := next((key for key in images if key not in table), None)) is not None:
        raise ValueError(f"{path} has no line for the image {lost!r}")
    return table


def _nabirds(root: Path, size: int, how: Augmentation) -> DataSet:
    files = _table(root / "images.txt")
    labels = _table(root / "image_class_labels.txt", files)
    split = _table(root / "train_test_split.txt", files)
    names = _table(root / "classes.txt")
    for key, label in labels.items():
        if label not in names:
            raise ValueError(f"{root / 'image_class_labels.txt'}: image {key!r} is of class {label!r}, not a class")
    for key, flag in split.items():
        if flag not in ("0", "1"):
            raise ValueError(f"{root / 'train_test_split.txt'}: image {key!r} must have 0 or 1, got {flag!r}")
    # Only the leaves of the hierarchy have images: 555 of 1,011 labels.
    used = sorted(set(labels.values()), key=lambda label: (len(label), label))
    index = {label: position for position, label in enumerate(used)}
    paths = {key: root / "images" / file for key, file in files.items()}
    _check_present(paths.values(), root / "images.txt")
    parts = []
    for flag in "10":
        chosen = [key for key in files if split[key] == flag]
        if not chosen:
            raise ValueError(f"{root / 'train_test_split.txt'} has no image with {flag}")
        parts.append(([paths[key] for key in chosen], torch.tensor([index[labels[key]] for key in chosen])))
    return _photos("nabirds", [names[label] for label in used], size, how, *parts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got a {type(content).__name__}")
    return content


def _fields(path: Path, content: dict[str, Any], table: str, *names: str) -> Iterator[tuple[Any, ...]]:
    """The named fields of every entry of one of the tables."""
    if not isinstance(content.get(table), list):
        raise ValueError(f"{path} has no list {table!r}")
    for number, entry in enumerate(content[table]):
        try:
            yield tuple(entry[name] for name in names)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: {table}[{number}] must have {' and '.join(names)}, got {entry!r}") from error


def _coco(root: Path, size: int, how: Augmentation) -> DataSet:
    parts, classes = [], None
    for split in ("train2014", "val2014"):
        path = root / "annotations" / f"instances_{split}.json"
        content = _read_json(path)
        categories = sorted(_fields(path, content, "categories", "id", "name"))
        if classes not in (None, categories):
            raise ValueError(f"{path} has other categories than {root / 'annotations' / 'instances_train2014.json'}")
        classes = categories
        index = {number: position for position, (number, _) in enumerate(categories)}
        files = dict(_fields(path, content, "images", "id", "file_name"))
        present: dict[Any, set[int]] = {}
        for number, (image, category) in enumerate(_fields(path, content, "annotations", "image_id", "category_id")):
            if image not in files or category not in index:
                kind, value = ("image_id", image) if image not in files else ("category_id", category)
                raise ValueError(f"{path}: annotations[{number}] has the unknown {kind} {value!r}")
            present.setdefault(image, set()).add(index[category])
        shown = [image for image in files if image in present]
        if not shown:
            raise ValueError(f"{path} has no image with annotations")
        paths = [root / split / files[image] for image in shown]
        _check_present(paths, path)
        parts.append((paths, _one_for_each([present[image] for image in shown], len(categories))))
    assert classes is not None
    return _photos("coco", [name for _, name in classes], size, how, *parts)


def _one_for_each(present: Sequence[Iterable[int]], classes: int) -> Tensor:
    """(N, classes) uint8: one where a class is present."""
    labels = torch.zeros(len(present), classes, dtype=torch.uint8)
    for row, shown in zip(labels, present, strict=True):
        row[list(shown)] = 1
    return labels


def _nuswide(root: Path, size: int, how: Augmentation) -> DataSet:
    path = root / "nus_wid_data.csv"
    splits: dict[str, list[tuple[Path, list[str]]]] = {"train": [], "val": []}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        if len(row) < 3:
            raise ValueError(f"{path}, line {number}: expected file name, labels and split, got {row}")
        name, text, split = (field.strip() for field in row[:3])
        if number == 1 and split not in splits:
            continue  # the header
        if split not in splits:
            raise ValueError(f"{path}, line {number}: the split must be train or val, got {split!r}")
        try:
            labels = ast.literal_eval(text)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {text!r} is not a list of labels") from error
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"{path}, line {number}: {text!r} is not a list of labels")
        splits[split].append((root / name, labels))
    classes = sorted({label for entries in splits.values() for _, labels in entries for label in labels})
    index = {label: position for position, label in enumerate(classes)}
    parts = []
    for split, entries in splits.items():
        if not entries:
            raise ValueError(f"{path} has no image of the split {split!r}")
        _check_present((file for file, _ in entries), path)
        present = [{index[label] for label in labels} for _, labels in entries]
        parts.append(([file for file, _ in entries], _one_for_each(present, len(classes))))
    return _photos("nuswide", classes, size, how, *parts)


_PHOTOS = {"imagenet": _imagenet, "nabirds": _nabirds, "coco": _coco, "nuswide": _nuswide}


def open_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    augmentation: Augmentation | Shifts | None = None,
) -> DataSet:
    """Open one of the study's data sets.

    Args:
        name: ``"digits"`` (scikit-learn's 1,797 handwritten digits, enlarged; every third of each class is validation),
            ``"imagenet"``, ``"nabirds"``, ``"coco"`` (2014) or ``"nuswide"``.
        root: the folder of the data set; none for digits. ``imagenet``: ``train/`` and ``val/`` with a folder for each
            class. ``nabirds``: ``images/``, ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt`` and
            ``classes.txt``. ``coco``: ``train2014/``, ``val2014/`` and ``annotations/instances_{train,val}2014.json``;
            a class is present if any object of it is, and images without annotations are left out. ``nuswide``:
            ``nus_wid_data.csv`` with file name, list of labels and ``train`` or ``val`` in each row, and the images
            beside it.
        image_size: side of the square that the model gets; 224, of digits 32.
        augmentation: of the training images; the defaults are those of :class:`Augmentation`, of digits
            :class:`Shifts`, and NABirds goes without RandAugment.

    Returns:
        The data set. Images are read when they are asked for.

    Raises:
        FileNotFoundError: a file of the layout, or an image that it names, is missing.
        ValueError: an unknown name, or a malformed file; the message gives the file, and the line or field.
        TypeError: an augmentation that does not go with the data set.
    """
    if name not in DATA_SETS:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(DATA_SETS)}")
    if name == "digits":
        return _digits(None if root is None else Path(root), image_size or 32, augmentation or Shifts())
    if root is None:
        raise ValueError(f"{name} needs the folder that it is in")
    if augmentation is None:
        augmentation = Augmentation(rand_augment=None) if name == "nabirds" else Augmentation()
    if not isinstance(augmentation, Augmentation):
        raise TypeError(f"{name} is augmented by Augmentation, got {augmentation!r}")
    return _PHOTOS[name](Path(root), image_size or 224, augmentation)
