"""Images of a data set: read when they are asked for, and turned into what a model takes."""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from .._files import one_line
from ..pictures import open_picture, read_picture
from .protocol import Augmentation, Crops, Shifts

__all__ = ["DataSet", "Images", "Members", "Pictures", "Transform", "photos"]

Transform = Callable[[Any], Tensor]


class Members:
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


Pictures = tuple[Sequence[Path] | Members, Tensor]


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images and their labels: (3, S, S) float32 and an int64 scalar, or (classes,) float32 of zeros and ones.

    Args:
        sources: a file, a picture or, already in memory, an image for each.
        labels: (N,) class indices, or (N, classes) zeros and ones.
        transform: from a PIL image, or from what ``sources`` holds in memory.
    """

    def __init__(self, sources: Sequence[Path] | Members | Tensor, labels: Tensor, transform: Transform):
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


def _small_transforms(size: int, how: Crops) -> tuple[Transform, Transform]:
    """Return the transforms for training and for evaluation, which sees the whole image."""
    resize = transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC)
    normalize = [transforms.ToTensor(), transforms.Normalize(how.mean, how.std)]
    crop = transforms.RandomCrop(size, how.padding, padding_mode="reflect")
    train = transforms.Compose([resize, crop, transforms.RandomHorizontalFlip(), *normalize])
    return train, transforms.Compose([resize, *normalize])


def _photo_transforms(size: int, how: Augmentation | Crops, flat: bool) -> tuple[Transform, Transform]:
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


def photos(
    name: str,
    classes: Sequence[str],
    size: int,
    how: Augmentation | Crops,
    train: Pictures,
    val: Pictures,
) -> DataSet:
    """Make a data set of pictures and labels; labels with an entry a class make it multi-label."""
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
