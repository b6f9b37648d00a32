"""The study's data sets, each in the layout that it is published in."""

from __future__ import annotations

import ast
import csv
import dataclasses
import os
import re
import reprlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.readers import create_reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from .._files import one_line, read_json
from ..pictures import open_picture, read_picture
from .protocol import DATA_SETS, Augmentation, Crops, Shifts, default_augmentation, find_split

__all__ = ["DATA_SETS", "Augmentation", "Crops", "DataSet", "Images", "Shifts", "open_data"]

_Transform = Callable[[Any], Tensor]
_SPLITS = ("train", "val")
_DIGITS_MEAN = _DIGITS_STD = (0.5, 0.5, 0.5)


class _Members:
    """Pictures of one of timm's readers, read when they are asked for."""

    def __init__(self, path: Path, reader: Any):
        self._path, self._reader, self._process = path, reader, os.getpid()

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Image.Image:
        if self._process != os.getpid():  # a forked process shares its parent's place in an open file
            self._close()
            self._process = os.getpid()
        name = f"{self._path}/{self._reader.filename(index)}"
        try:
            file, _ = self._reader[index]
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"{name} cannot be read: {one_line(error)}") from error
        with file:
            return read_picture(file, name)

    def __getstate__(self) -> dict[str, Any]:
        self._close()
        return self.__dict__

    def _close(self) -> None:
        """Forget the open files of a reader of tar files; they are opened again when they are needed."""
        if isinstance(self._reader, ReaderImageInTar):
            state = self._reader.tar_state
            for one in state.values() if isinstance(state, dict) else [state]:
                for held in (one, *one.children.values()):
                    held.reset()


_Pictures = tuple[Sequence[Path] | _Members, Tensor]


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images and their labels: (3, S, S) float32 and an int64 scalar, or (classes,) float32 of zeros and ones.

    Args:
        sources: a file, a picture or, already in memory, an image for each.
        labels: (N,) class indices, or (N, classes) zeros and ones.
        transform: from a PIL image, or from what ``sources`` holds in memory.
    """

    def __init__(self, sources: Sequence[Path] | _Members | Tensor, labels: Tensor, transform: _Transform):
        self.sources, self.labels, self.transform = sources, labels, transform

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        source, label = self.sources[index], self.labels[index]
        if isinstance(source, Path):
            return self.transform(open_picture(source)), label.float() if label.ndim else label
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
    augmentation: Augmentation | Crops | Shifts
    train: Images
    val: Images

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def _small_transforms(size: int, how: Crops) -> tuple[_Transform, _Transform]:
    """Return the transforms for training and for evaluation, which sees the whole image."""
    resize = transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC)
    normalize = [transforms.ToTensor(), transforms.Normalize(how.mean, how.std)]
    crop = transforms.RandomCrop(size, how.padding, padding_mode="reflect")
    train = transforms.Compose([resize, crop, transforms.RandomHorizontalFlip(), *normalize])
    return train, transforms.Compose([resize, *normalize])


def _photo_transforms(size: int, how: Augmentation | Crops, flat: bool) -> tuple[_Transform, _Transform]:
    """Return the transforms for training and for evaluation.

    ``flat`` squashes the whole image into the square, as multi-label sets do.
    """
    if isinstance(how, Crops):
        return _small_transforms(size, how)
    if not flat:
        train = create_transform(
            size,
            is_training=True,
            color_jitter=how.color_jitter,
            auto_augment=how.rand_augment,
            interpolation=how.interpolation,
            re_prob=how.random_erasing,
            re_mode="pixel",
            mean=how.mean,
            std=how.std,
        )
        plain = create_transform(
            size, interpolation=how.interpolation, crop_pct=how.crop, mean=how.mean, std=how.std
        )  # fmt: skip
        return train, plain
    resize = transforms.Resize((size, size), transforms.InterpolationMode(how.interpolation))
    normalize = [transforms.ToTensor(), transforms.Normalize(how.mean, how.std)]
    steps: list[Any] = [resize]
    if how.rand_augment is not None:
        gray = tuple(round(255 * value) for value in how.mean)
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
    """Return the transforms from (1, S, S) in 0..1.

    Images are shifted in the fine grid, so that a shift need not be a whole pixel.
    """
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
    how: Augmentation | Crops,
    train: _Pictures,
    val: _Pictures,
) -> DataSet:
    multi_label = train[1].ndim == 2
    augmented, plain = _photo_transforms(size, how, flat=multi_label)
    return DataSet(
        name,
        tuple(classes),
        multi_label,
        size,
        how.mean,
        how.std,
        how,
        Images(*train, augmented),
        Images(*val, plain),
    )


def _check_present(paths: Iterable[Path], listed_in: Path) -> None:
    """Raise for the first that is missing: better than in the third hour. Looks into every folder once."""
    known: dict[Path, set[str]] = {}
    for path in paths:
        if path.parent not in known:
            known[path.parent] = set(os.listdir(path.parent)) if os.path.isdir(path.parent) else set()
        if path.name not in known[path.parent]:
            raise FileNotFoundError(f"{path}, which {listed_in} names, is missing")


def _with_training(parts: list[_Pictures]) -> list[_Pictures]:
    """Put an empty split before a validation split that was opened alone."""
    nothing: _Pictures = ([], torch.zeros(0, dtype=torch.int64))
    return parts if len(parts) == 2 else [nothing, *parts]


def _imagenet(root: Path, size: int, how: Augmentation, wanted: Sequence[str] = _SPLITS) -> DataSet:
    splits = []
    for split in wanted:
        try:
            splits.append(ImageFolder(str(root / split)))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{root / split} must hold one folder of images for each class: {error}") from error
    _check_same_classes([root / split for split in wanted], [split.classes for split in splits])
    parts: list[_Pictures] = [
        ([Path(path) for path, _ in split.samples], torch.tensor(split.targets)) for split in splits
    ]
    return _photos("imagenet", splits[-1].classes, size, how, *_with_training(parts))


def _check_same_classes(paths: Sequence[Path], classes: Sequence[Sequence[str]]) -> None:
    if any(own != classes[0] for own in classes):
        odd = sorted({*classes[0]} ^ {*classes[-1]})
        raise ValueError(f"{paths[0]} and {paths[-1]} must hold the same classes; only one has {odd[0]!r}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say that a file is missing, or that it is not text."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, first word and the rest of every line."""
    with _named(path):
        text = path.read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not value or "\0" in line:
            raise ValueError(f"{path}, line {number}: expected two fields, got {line!r}")
        yield number, key, value.strip()


def _table(path: Path, images: dict[str, str] | None = None) -> dict[str, str]:
    """Read a file of ``id value`` lines; with ``images``, it has one line for each of the images."""
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


def _read_split(path: Path) -> tuple[tuple[str, ...], _Members, Tensor]:
    """Read the classes, pictures and labels of a split with timm's readers."""
    tars = path.is_file() or any(child.suffix == ".tar" for child in path.iterdir())
    try:
        reader: Any = ReaderImageInTar(os.fspath(path)) if tars else create_reader("", os.fspath(path))
    except (OSError, RuntimeError, ValueError, tarfile.TarError) as error:
        raise ValueError(f"{path} must hold a folder of images for each class: {one_line(error)}") from error
    index = reader.class_name_to_idx if tars else reader.class_to_idx
    labels = reader.targets if tars else [label for _, label in reader.samples]
    if "" in index:
        inside = reader.filename(list(labels).index(index[""]))
        raise ValueError(f"{path} must hold a folder of images for each class; {inside} is in none")
    return tuple(index), _Members(path, reader), torch.tensor(list(map(int, labels)))


def _folder(
    root: Path, size: int, how: Augmentation | Crops, wanted: Sequence[str] = _SPLITS, name: str = "folder"
) -> DataSet:
    paths = [find_split(root, split) for split in wanted]
    splits = [_read_split(path) for path in paths]
    _check_same_classes(paths, [classes for classes, _, _ in splits])
    parts: list[_Pictures] = [(pictures, labels) for _, pictures, labels in splits]
    return _photos(name, splits[-1][0], size, how, *_with_training(parts))


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
    # Only the leaves of the hierarchy have images, about half of the labels.
    used = sorted(set(labels.values()), key=lambda label: (len(label), label))
    index = {label: position for position, label in enumerate(used)}
    if len({*files.values()}) < len(files):
        twice = next(file for file, count in Counter(files.values()).items() if count > 1)
        raise ValueError(f"{root / 'images.txt'} names {twice!r} twice")
    paths = {key: root / "images" / file for key, file in files.items()}
    _check_present(paths.values(), root / "images.txt")
    parts = []
    for flag in "10":
        chosen = [key for key in files if split[key] == flag]
        if not chosen:
            raise ValueError(f"{root / 'train_test_split.txt'} has no image with {flag}")
        parts.append(([paths[key] for key in chosen], torch.tensor([index[labels[key]] for key in chosen])))
    return _photos("nabirds", [names[label] for label in used], size, how, *parts)


def _read_object(path: Path) -> dict[str, Any]:
    with _named(path):
        content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got a {type(content).__name__}")
    return content


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _fields(path: Path, content: dict[str, Any], table: str, *names: str) -> Iterator[tuple[Any, ...]]:
    """Yield the named fields of every entry of one of the tables: names are text, the others numbers or text."""
    if not isinstance(content.get(table), list):
        raise ValueError(f"{path} has no list {table!r}")
    for number, entry in enumerate(content[table]):
        values = tuple(entry.get(name) for name in names) if isinstance(entry, dict) else ()
        checks = [_is_name if name.endswith("name") else _is_id for name in names]
        if not values or not all(check(value) for check, value in zip(checks, values, strict=True)):
            wanted = " and ".join(names)
            raise ValueError(f"{path}: {table}[{number}] must have {wanted}, got {reprlib.repr(entry)}")
        yield values


def _by_id(path: Path, content: dict[str, Any], table: str, name: str) -> dict[Any, str]:
    """Sort the names of a table's entries by their id; neither may occur twice."""
    found: dict[Any, str] = {}
    taken: set[str] = set()
    for number, (key, value) in enumerate(_fields(path, content, table, "id", name)):
        if key in found or value in taken:
            what = f"id {key!r}" if key in found else f"{name} {value!r}"
            raise ValueError(f"{path}: {table}[{number}] has the {what} of another")
        found[key] = value
        taken.add(value)
    return found


def _coco(root: Path, size: int, how: Augmentation) -> DataSet:
    parts, classes = [], None
    for split in ("train2014", "val2014"):
        path = root / "annotations" / f"instances_{split}.json"
        content = _read_object(path)
        named = _by_id(path, content, "categories", "name")
        categories = sorted(named.items(), key=lambda item: (isinstance(item[0], str), item[0]))
        if classes not in (None, categories):
            raise ValueError(f"{path} has other categories than {root / 'annotations' / 'instances_train2014.json'}")
        classes = categories
        index = {number: position for position, (number, _) in enumerate(categories)}
        files = _by_id(path, content, "images", "file_name")
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
    """Return (N, classes) uint8: one where a class is present."""
    labels = torch.zeros(len(present), classes, dtype=torch.uint8)
    for row, shown in zip(labels, present, strict=True):
        row[list(shown)] = 1
    return labels


_ESCAPE = r"""\\(?:[\\'"nrt]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})"""
_QUOTED = rf"""(?:'(?:[^'\\\r\n]|{_ESCAPE})*'|"(?:[^"\\\r\n]|{_ESCAPE})*")"""
_LIST_OF_STRINGS = re.compile(rf"\[\s*(?:{_QUOTED}\s*(?:,\s*{_QUOTED}\s*)*,?\s*)?\]")


def _labels(text: str) -> list[str] | None:
    """Read ``"['sky', 'clouds']"``; None if it is no such list."""
    if not _LIST_OF_STRINGS.fullmatch(text):  # nothing else is evaluated: deep or long expressions end the interpreter
        return None
    labels = ast.literal_eval(text)
    return labels if all(label and label == label.strip() for label in labels) else None


def _is_header(row: Sequence[str], root: Path) -> bool:
    """Tell whether a first row names columns: three words, none of which could be a file, labels or a split."""
    words = [field.strip() for field in row]
    named = len(words) == 3 and all(re.fullmatch(r"[A-Za-z_][\w ]*", word) for word in words)
    near = get_close_matches(words[-1].lower(), ("train", "val"), n=1, cutoff=0.7) if words else []
    return named and not near and not os.path.exists(root / words[0])


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and fields of every row that is not empty."""
    with _named(path), path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            for row in reader:
                if any(field.strip() for field in row):
                    yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _nuswide(root: Path, size: int, how: Augmentation) -> DataSet:
    path = root / "nus_wid_data.csv"
    splits: dict[str, list[tuple[Path, list[str]]]] = {"train": [], "val": []}
    seen: set[str] = set()
    for place, (number, row) in enumerate(_csv_rows(path)):
        if place == 0 and _is_header(row, root):
            continue
        if len(row) != 3:
            raise ValueError(f"{path}, line {number}: expected file name, labels and split, got {reprlib.repr(row)}")
        name, text, split = (field.strip() for field in row)
        if split not in splits:
            raise ValueError(f"{path}, line {number}: the split must be train or val, got {reprlib.repr(split)}")
        if (labels := _labels(text)) is None:
            raise ValueError(f"{path}, line {number}: {reprlib.repr(text)} is not a list of labels")
        if not _is_name(name) or name in seen:
            what = "occurs twice" if name in seen else "is not a file name"
            raise ValueError(f"{path}, line {number}: {name!r} {what}")
        seen.add(name)
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


_PHOTOS: dict[str, Callable[..., DataSet]] = {
    **{"imagenet": _imagenet, "nabirds": _nabirds, "coco": _coco, "nuswide": _nuswide},
    **{"folder": _folder, "cifar10": partial(_folder, name="cifar10")},
}
_WITH_CROPS = ("folder", "cifar10")
_IN_FOLDERS = ("imagenet", *_WITH_CROPS)


def open_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    augmentation: Augmentation | Crops | Shifts | None = None,
    train: bool = True,
) -> DataSet:
    """Open one of the study's data sets.

    Args:
        name: ``"digits"`` (scikit-learn's 1,797 handwritten digits, enlarged; every third of each class is validation),
            ``"imagenet"``, ``"nabirds"``, ``"coco"`` (2014), ``"nuswide"``, ``"folder"`` (any labelled pictures) or
            ``"cifar10"``.
        root: the folder of the data set; none for digits. ``imagenet``: ``train/`` and ``val/`` with a folder for each
            class. ``nabirds``: ``images/``, ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt`` and
            ``classes.txt``. ``coco``: ``train2014/``, ``val2014/`` and ``annotations/instances_{train,val}2014.json``;
            a class is present if any object of it is, and images without annotations are left out. ``nuswide``:
            ``nus_wid_data.csv`` with file name, list of labels and ``train`` or ``val`` in each row, and the images
            beside it. ``folder`` and ``cifar10``: ``train`` and ``val`` (or ``validation``, or ``test``) with a folder
            for each class, or tar files of such folders: ``train.tar`` and ``val.tar``, or several in a folder.
        image_size: side of the square that the model gets; 224, of digits and ``cifar10`` 32.
        augmentation: of the training images, and how all are normalised; the defaults are those of
            :class:`Augmentation`, of ``cifar10`` :class:`Crops`, of digits :class:`Shifts`, and NABirds goes without
            RandAugment. ``folder`` and ``cifar10`` take either of the first two.
        train: False leaves the training images of ``imagenet``, ``folder`` and ``cifar10`` out, which then need not be
            there; classes are those of the validation images.

    Returns:
        The data set. Images are read when they are asked for.

    Raises:
        FileNotFoundError: a file of the layout, or an image that it names, is missing.
        ValueError: an unknown name, or a malformed file; the message gives the file, and the line or field.
        TypeError: an augmentation that does not go with the data set.
    """
    if name not in DATA_SETS:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(DATA_SETS)}")
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size must be a positive number of pixels, got {image_size!r}")
    if name == "digits":
        return _digits(None if root is None else Path(root), image_size or 32, augmentation or Shifts())
    if root is None:
        raise ValueError(f"{name} needs the folder that it is in")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(root)!r}, which is to hold {name}")
    augmentation = default_augmentation(name) if augmentation is None else augmentation
    if not isinstance(augmentation, (Augmentation, Crops) if name in _WITH_CROPS else Augmentation):
        wanted = "Augmentation or Crops" if name in _WITH_CROPS else "Augmentation"
        raise TypeError(f"{name} is augmented by {wanted}, got {augmentation!r}")
    only = {} if train or name not in _IN_FOLDERS else {"wanted": ("val",)}
    return _PHOTOS[name](Path(root), image_size or (32 if name == "cifar10" else 224), augmentation, **only)
