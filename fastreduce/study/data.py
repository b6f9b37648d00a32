"""The study's data sets, each in the layout that it is published in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torchvision import transforms

from .images import DataSet, Images, Transform
from .layouts import LAYOUTS
from .protocol import DATA_SETS, Augmentation, Crops, Shifts, default_augmentation

__all__ = ["DATA_SETS", "Augmentation", "Crops", "DataSet", "Images", "Shifts", "open_data"]

_DIGITS_MEAN = _DIGITS_STD = (0.5, 0.5, 0.5)
_WITH_CROPS = ("folder", "cifar10")
_IN_FOLDERS = ("imagenet", *_WITH_CROPS)


def _digit_transforms(how: Shifts) -> tuple[Transform, Transform]:
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
    return LAYOUTS[name](Path(root), image_size or (32 if name == "cifar10" else 224), augmentation, **only)
