"""Photographs that fidelity is measured on: a folder of the user's, or pictures of scikit-learn and scikit-image."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._files import natural_key, pictures_in
from ..arguments import counted
from ..integrations.timm import imagenet_indices
from ..pictures import cut, open_picture, sample_photos

__all__ = ["ImageSet", "folder_images", "sample_images"]

_BOXES = ((0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.7, 0.8), (0.35, 0.05, 0.95, 0.65), (0.25, 0.35, 0.85, 0.95))


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Photographs with names, opened one by one when they are needed.

    Attributes:
        names: of the photographs, for messages and results.
        openers: what opens each of them -> RGB of 8 bits.
        boxes: the part of each that is taken: left, top, right, bottom as fractions of what the model would see.
        labels: a class index for each, or empty if there are none that fit the head.
        source: in words, where they are from.
        note: in words, why there are no labels, or what they are; may be empty.
    """

    names: tuple[str, ...]
    openers: tuple[Callable[[], Image.Image], ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...] = ()
    source: str = ""
    note: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Sequence[int]) -> ImageSet:
        """Return some of the photographs."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[row] for row in rows),
            openers=tuple(self.openers[row] for row in rows),
            boxes=tuple(self.boxes[row] for row in rows),
            labels=tuple(self.labels[row] for row in rows) if self.labels else (),
        )

    def tensor(self, config: Mapping[str, Any], rows: Sequence[int] | None = None) -> Tensor:
        """Return (N, 3, height, width) float32: photographs as a model sees them.

        Args:
            config: ``input_size``, ``mean``, ``std``, ``crop_pct`` and ``crop_mode`` of the model.
            rows: some of the photographs; None for all.
        """
        size = config["input_size"][1:]
        rows = range(len(self)) if rows is None else rows
        views = [np.array(cut(self.openers[row](), config, size, self.boxes[row])) for row in rows]
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        return (pixels - mean) / std

    def batches(self, config: Mapping[str, Any], batch: int = 16) -> Iterator[tuple[Tensor, ...]]:
        """Give the photographs batch by batch, with their labels if there are any."""
        for start in range(0, len(self), batch):
            rows = range(start, min(start + batch, len(self)))
            images = self.tensor(config, rows)
            yield (images, torch.tensor([self.labels[row] for row in rows])) if self.labels else (images,)


def sample_images(crops: int = 2) -> ImageSet:
    """Return the photographs of scikit-learn, and of scikit-image where it is installed.

    Args:
        crops: views of each: as the model sees it, then parts of that, at most four.

    Raises:
        ValueError: crops out of range.
    """
    if not 1 <= crops <= len(_BOXES):
        raise ValueError(f"crops must lie between 1 and {len(_BOXES)}, got {crops}")
    photos = sample_photos()
    chosen = [(name, opener, box) for box in _BOXES[:crops] for name, opener in photos.items()]
    _, openers, boxes = zip(*chosen, strict=True)
    libraries = "scikit-learn and scikit-image" if len(photos) > 2 else "scikit-learn"
    return ImageSet(
        tuple(f"{name} {boxes.index(box, 0) // len(photos) + 1}" for name, _, box in chosen),
        openers,
        boxes,
        source=f"photographs of {libraries}",
    )


def folder_images(folder: str, classes: int = 0, most: int | None = None) -> ImageSet:
    """Return the pictures in a folder; folders in it are classes.

    Hidden files and folders are left out.

    Labels are class indices of the head: of ImageNet's names of classes (``n01440764``), of folders that are named by
    index (``0``, ``17``), or, where there are as many folders as classes, of the folders in their order. That must be
    certain: torchvision sorts names by letters (``c10`` before ``c2``), timm and ``fastreduce study`` by numbers.

    Args:
        folder: with pictures in it, or in folders in it.
        classes: of the model's head; 0 for a model without one, which takes no labels.
        most: at most so many pictures, spread evenly over all.

    Raises:
        ValueError: no such folder, or no picture in it.
    """
    root = Path(folder)
    files = sorted(pictures_in(folder))
    if most is not None and len(files) > most:
        files = [files[index * len(files) // most] for index in range(most)]
    parts = [path.relative_to(root).parts for path in files]
    labels: tuple[int, ...] = ()
    loose = [part[0] for part in parts if len(part) == 1]
    note = "no class folders, so no labels"
    if loose and len(loose) < len(parts):
        note = f"{counted(len(loose), 'picture')} outside class folders, {loose[0]} first, so no labels"
    if not loose:
        folders = [part[0] for part in parts]
        classes_here = (path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        index, note = _class_indices(sorted(classes_here), classes)
        if index is not None:
            labels = tuple(index[name] for name in folders)
    return ImageSet(
        tuple(os.sep.join(part) for part in parts),
        tuple(_opener(path) for path in files),
        (_BOXES[0],) * len(files),
        labels,
        source=f"of {len(files)} in {root.name or folder}",
        note=note,
    )


def _opener(path: Path) -> Callable[[], Image.Image]:
    return lambda: open_picture(path)


def _class_indices(folders: Sequence[str], classes: int) -> tuple[dict[str, int] | None, str]:
    """Return the class index of every folder, or None, and in words what was found."""
    if not classes:
        return None, "the model has no head, so labels are not used"
    fitting = counted(classes, "class")
    if all(re.fullmatch(r"n\d{8}", name) for name in folders):
        known = imagenet_indices(classes)
        if known is not None and all(name in known for name in folders):
            return {name: known[name] for name in folders}, f"labels: ImageNet's, {len(folders)} of {fitting}"
        strange = next((name for name in folders if known is not None and name not in known), None)
        if strange is not None:
            return None, f"{strange} is none of ImageNet's classes for a head of {fitting}, so no labels"
        return None, f"the folders are ImageNet's classes, which do not fit a head of {fitting}, so no labels"
    indices = {name: int(name) for name in folders if re.fullmatch("[0-9]+", name)}
    if len(indices) == len(folders) and max(indices.values()) < classes:
        return indices, f"labels: folder names, {len(folders)} of {fitting}"
    if len(folders) == classes:
        numbered = sorted(folders, key=natural_key)
        if (
            odd := next((pair for pair in zip(folders, numbered, strict=True) if pair[0] != pair[1]), None)
        ) is not None:
            return None, (
                f"{odd[0]} stands before {odd[1]} by letters and behind it by numbers or small letters, so no labels: "
                "name the folders by class index"
            )
        return {name: number for number, name in enumerate(folders)}, f"labels: {fitting}, folders in their order"
    if len(indices) == len(folders):
        largest = max(indices.values())
        return None, f"the folders are indices up to {largest}, and the head has {fitting}, so no labels"
    return None, f"{counted(len(folders), 'class folder')} for a head of {fitting}, so no labels"
