"""Layouts in which data sets of pictures are published, each read into its pictures and labels."""

from __future__ import annotations

import ast
import csv
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
from timm.data.readers import get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torchvision.datasets import ImageFolder

from .._files import PICTURES, is_picture, natural_key, one_line, pictures_in, read_json
from .images import DataSet, Members, Pictures, photos
from .protocol import Augmentation, Crops, find_split

__all__ = ["LAYOUTS"]

_SPLITS = ("train", "val")


def _check_present(paths: Iterable[Path], listed_in: Path) -> None:
    """Raise for the first that is missing: better than in the third hour. Looks into every folder once."""
    known: dict[Path, set[str]] = {}
    for path in paths:
        if path.parent not in known:
            known[path.parent] = set(os.listdir(path.parent)) if os.path.isdir(path.parent) else set()
        if path.name not in known[path.parent]:
            raise FileNotFoundError(f"{path}, which {listed_in} names, is missing")


def _with_training(parts: list[Pictures]) -> list[Pictures]:
    """Put an empty split before a validation split that was opened alone."""
    nothing: Pictures = ([], torch.zeros(0, dtype=torch.int64))
    return parts if len(parts) == 2 else [nothing, *parts]


def _is_picture_in(folder: Path, path: str) -> bool:
    return is_picture(os.path.relpath(path, folder))


class _ClassFolders(ImageFolder):
    """Class folders as torchvision reads them, without hidden ones."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the classes, and the index of each."""
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return classes, {name: index for index, name in enumerate(classes)}


def _imagenet(root: Path, size: int, how: Augmentation, wanted: Sequence[str] = _SPLITS) -> DataSet:
    splits = []
    for split in wanted:
        try:
            splits.append(_ClassFolders(str(root / split), is_valid_file=partial(_is_picture_in, root / split)))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{root / split} must hold one folder of images for each class: {error}") from error
    _check_same_classes([root / split for split in wanted], [split.classes for split in splits])
    parts: list[Pictures] = [
        ([Path(path) for path, _ in split.samples], torch.tensor(split.targets)) for split in splits
    ]
    return photos("imagenet", splits[-1].classes, size, how, *_with_training(parts))


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


def _read_split(path: Path) -> tuple[tuple[str, ...], Pictures]:
    """Read the classes, pictures and labels of a split: class folders, or tar files of them."""
    if path.is_file() or any(child.suffix == ".tar" for child in path.iterdir()):
        return _read_tars(path)
    try:
        files = list(pictures_in(path))
    except ValueError as error:
        raise ValueError(f"{path} must hold a folder of images for each class: {one_line(error)}") from error
    files.sort(key=lambda file: natural_key(os.fspath(file)))
    inside = [os.fspath(file.relative_to(path)) for file in files]
    classes, labels = _labels_of(path, inside, [os.path.dirname(name) for name in inside])
    return classes, (files, labels)


def _read_tars(path: Path) -> tuple[tuple[str, ...], Pictures]:
    """Read a split from a tar file of class folders, or from several, or from one for each class."""
    try:
        with _more_endings():
            reader: Any = ReaderImageInTar(os.fspath(path))
    except (OSError, RuntimeError, ValueError, tarfile.TarError) as error:
        raise ValueError(f"{path} must hold a folder of images for each class: {one_line(error)}") from error
    reader.samples = reader.samples[[is_picture(member.path) for member, _, _ in reader.samples]]
    if not len(reader.samples):
        raise ValueError(f"{path} must hold a folder of images for each class: it has no picture")
    inside, folders = [], []
    for member, tar, child in reader.samples:
        name = os.path.normpath(member.path)
        outer = child.name if child is not None else tar  # of a file for each class, the class
        inside.append(name)
        folders.append(os.path.dirname(name) or ("" if outer is None else os.path.splitext(os.path.basename(outer))[0]))
    classes, labels = _labels_of(
        path, inside, folders, [(tar, child and child.name) for _, tar, child in reader.samples]
    )
    return classes, (Members(path, reader), labels)


@contextmanager
def _more_endings() -> Iterator[None]:
    """Let timm's readers find all pictures that the package reads, by their endings."""
    before = get_img_extensions()
    set_img_extensions(sorted(PICTURES))
    try:
        yield
    finally:
        set_img_extensions(before)


def _labels_of(
    path: Path, inside: Sequence[str], folders: Sequence[str], files: Sequence[Any] | None = None
) -> tuple[tuple[str, ...], Tensor]:
    """Return the classes, in natural order, and the class of every picture: the folder that it is in.

    Raises:
        ValueError: pictures in no folder, or class folders in other folders than one, which leave open what a class is.
    """
    if (loose := next((name for name, folder in zip(inside, folders, strict=True) if not folder), None)) is not None:
        raise ValueError(f"{path} must hold a folder of images for each class; {loose} is in none")
    first: dict[Any, tuple[str, str]] = {}  # by tar file, where the class folders are, and a picture there
    for name, folder, file in zip(inside, folders, files or [None] * len(inside), strict=True):
        place, known = first.setdefault(file, (os.path.dirname(folder), name))
        if place != os.path.dirname(folder) or (file is None and place):
            deep = max(name, known, key=lambda one: one.count(os.sep))
            outer, inner = os.path.dirname(deep).split(os.sep)[-2:]
            raise ValueError(
                f"{path} must hold a folder of images for each class, without folders in it: the class of {deep} may "
                f"be {outer!r} or {inner!r}"
            )
    names = [os.path.basename(folder) for folder in folders]
    classes = sorted({*names}, key=natural_key)
    index = {name: place for place, name in enumerate(classes)}
    return tuple(classes), torch.tensor([index[name] for name in names])


def _folder(
    root: Path, size: int, how: Augmentation | Crops, wanted: Sequence[str] = _SPLITS, name: str = "folder"
) -> DataSet:
    paths = [find_split(root, split) for split in wanted]
    splits = [_read_split(path) for path in paths]
    _check_same_classes(paths, [classes for classes, _ in splits])
    return photos(name, splits[-1][0], size, how, *_with_training([pictures for _, pictures in splits]))


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
    return photos("nabirds", [names[label] for label in used], size, how, *parts)


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
    return photos("coco", [name for _, name in classes], size, how, *parts)


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
    return photos("nuswide", classes, size, how, *parts)


LAYOUTS: dict[str, Callable[..., DataSet]] = {
    **{"imagenet": _imagenet, "nabirds": _nabirds, "coco": _coco, "nuswide": _nuswide},
    **{"folder": _folder, "cifar10": partial(_folder, name="cifar10")},
}
