"""Protocols of training: frozen data that says, with the data set, everything a run depends on.

Torch and timm are imported when a model is built: a protocol that cannot be is refused without waiting for them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..arguments import counted

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "DATA_SETS",
    "EMA_WEIGHTS",
    "HISTORY",
    "LAYOUTS",
    "WEIGHTS",
    "Augmentation",
    "Backbone",
    "Crops",
    "Protocol",
    "Reduction",
    "Shifts",
    "augmentation_for",
    "default_augmentation",
    "find_split",
    "load_trained",
    "plain_data",
    "protocol_for",
]

WEIGHTS, EMA_WEIGHTS, HISTORY = "model.safetensors", "model_ema.safetensors", "training.json"  # a training's files
DATA_SETS = ("digits", "imagenet", "nabirds", "coco", "nuswide", "folder", "cifar10")
SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}  # folders of a data set, by any of these names
# What the folder of each must hold; its contents are read when it is opened.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "imagenet": ("train", "val"),
    "nabirds": ("images", "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"),
    "coco": ("annotations/instances_train2014.json", "annotations/instances_val2014.json"),
    "nuswide": ("nus_wid_data.csv",),
    "folder": (),
    "cifar10": (),
}
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_NOT_NEGATIVE = (
    "min_lr",
    "warmup_lr",
    "weight_decay",
    "backbone_lr",
    "mixup",
    "cutmix",
    "ratio_weight",
    "logit_weight",
    "token_weight",
    "workers",
)


def plain_data(value: Any) -> Any:
    """Return a dataclass as it reads in JSON, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(value), default=os.fspath))


def find_split(root: str | os.PathLike[str], split: str) -> Path:
    """Find a split of a data set in folders: a folder, or a tar file.

    Args:
        root: the folder of the data set.
        split: ``"train"`` or ``"val"``, which may be called ``validation`` or ``test`` there.

    Raises:
        FileNotFoundError: there is none.
    """
    names = [f"{name}{ending}" for name in SPLITS[split] for ending in ("", ".tar")]
    for name in names:
        if (path := Path(root, name)).exists():
            return path
    raise FileNotFoundError(f"{os.fspath(root)} has none of {', '.join(names)}")


def _check_normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name} must be three numbers, got {values}")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {std}")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Changes made to photos; the defaults are the paper's for ImageNet.

    Attributes:
        rand_augment: timm's policy, or None.
        color_jitter: used only without ``rand_augment``, as timm has it; of single-label sets.
        random_erasing: probability; erased pixels become noise; of single-label sets.
        cutout: side of the erased square, as a share of the image's; of multi-label sets.
        interpolation: of every resize.
        crop: share of the image's shorter side that evaluation sees.
        mean, std: of the normalisation, for pixels of 0 to 1.
    """

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.3
    random_erasing: float = 0.25
    cutout: float = 0.5
    interpolation: str = "bicubic"
    crop: float = 0.875
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD

    def __post_init__(self) -> None:
        _check_normalisation(self.mean, self.std)
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must lie in (0, 1], got {self.crop}")


@dataclasses.dataclass(frozen=True)
class Crops:
    """Augmentation of small photos: a random crop of the padded image, and its mirror image half of the time.

    Attributes:
        padding: pixels on every side, a reflection of the image.
        mean, std: of the normalisation, for pixels of 0 to 1; by default CIFAR-10's.
    """

    padding: int = 4
    mean: tuple[float, ...] = (125.3 / 255, 123.0 / 255, 113.9 / 255)
    std: tuple[float, ...] = (63.0 / 255, 62.1 / 255, 66.7 / 255)

    def __post_init__(self) -> None:
        _check_normalisation(self.mean, self.std)
        if self.padding < 0:
            raise ValueError(f"padding must not be negative, got {self.padding}")


@dataclasses.dataclass(frozen=True)
class Shifts:
    """Changes made to digits, which a flip would turn into others: degrees, and shares of the image's side."""

    degrees: float = 10.0
    shift: float = 0.1
    zoom: float = 0.1
    shear: float = 5.0


def default_augmentation(name: str) -> Augmentation | Crops | Shifts:
    """Return how the study augments the training images of one of the data sets."""
    own: dict[str, Augmentation | Crops | Shifts] = {"digits": Shifts(), "cifar10": Crops()}
    own["nabirds"] = Augmentation(rand_augment=None)
    return own.get(name, Augmentation())


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A timm Vision Transformer, and where its weights come from.

    Attributes:
        name: of the model in timm.
        options: arguments for ``timm.create_model``, such as ``img_size`` and ``depth``.
        pretrained: let timm download its weights.
        checkpoint: a file of weights, read by :func:`fastreduce.load_official`. A head for another number of classes is
            left out, as with ``pretrained``.
    """

    name: str = "deit_small_patch16_224"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("give either pretrained or a checkpoint")

    def build(self, num_classes: int, drop_path: float = 0.0) -> nn.Module:
        """Return the model in evaluation mode.

        Layers that no weights are given for are drawn from torch's global generator.

        Raises:
            ValueError: a model that timm does not have, one that is no Vision Transformer, a checkpoint that does not
                fit.
        """
        from timm.models.vision_transformer import VisionTransformer
        from torch import Tensor

        from .._files import one_line
        from ..checkpoints import load_official, read_checkpoint
        from ..integrations.timm import create_model

        try:
            model = create_model(
                self.name, pretrained=self.pretrained, num_classes=num_classes, drop_path_rate=drop_path, **self.options
            )
        except RuntimeError as error:
            raise ValueError(f"{self.name} cannot be had from timm: {error}") from error
        except (TypeError, AssertionError, AttributeError, ArithmeticError) as error:  # options break anything
            if not self.options:
                raise
            given = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
            raise ValueError(f"{self.name} cannot be had from timm with {given}: {one_line(error)}") from error
        if not isinstance(model, VisionTransformer):
            raise ValueError(f"{self.name} is a {type(model).__name__}, not a Vision Transformer of timm")
        if self.checkpoint is not None:
            state, own = read_checkpoint(self.checkpoint).state, model.state_dict()
            for key, value in own.items():
                if key.startswith("head.") and isinstance(state.get(key), Tensor) and state[key].shape != value.shape:
                    state[key] = value
            load_official(model, state)
        return model.eval()

    @property
    def has_weights(self) -> bool:
        """True if it starts from weights that were trained before."""
        return self.pretrained or self.checkpoint is not None

    def knows(self, num_classes: int) -> bool:
        """Return whether its weights include a head for so many classes."""
        from timm.models import get_pretrained_cfg
        from torch import Tensor

        from ..checkpoints import read_checkpoint

        if self.checkpoint is not None:
            head = read_checkpoint(self.checkpoint).state.get("head.weight")
            return isinstance(head, Tensor) and head.ndim == 2 and len(head) == num_classes
        return self.pretrained and getattr(get_pretrained_cfg(self.name), "num_classes", None) == num_classes

    def teacher(self, num_classes: int) -> nn.Module:
        """Return the model with its weights, for distillation.

        Raises:
            ValueError: weights that do not fit, or without a head for so many classes.
        """
        if not self.knows(num_classes):
            where = "no weights" if not self.has_weights else "no head"
            raise ValueError(f"{self.name} cannot teach: it has {where} for {counted(num_classes, 'class')}")
        return self.build(num_classes)


def augmentation_for(name: str, backbone: Backbone) -> Augmentation | Crops | Shifts:
    """Return how a data set's images are augmented for a backbone, and normalised as timm's weights for it want them.

    Weights of a file may be of any training: for these the data set's own normalisation stands.
    """
    own = default_augmentation(name)
    if not backbone.pretrained or isinstance(own, Shifts):
        return own
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(backbone.name)
    return own if known is None else dataclasses.replace(own, mean=tuple(known.mean), std=tuple(known.std))


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A token reduction method with its schedule: the arguments of :func:`fastreduce.patch`.

    Attributes:
        method: name in ``fastreduce.REDUCERS``.
        keep_rate: a rate, or one absolute fraction for each stage.
        at: the blocks; None for a quarter, half and three quarters of the depth.
        options: the method's own.
    """

    method: str
    keep_rate: float | tuple[float, ...] | None = None
    at: tuple[int, ...] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def apply(self, model: nn.Module) -> nn.Module:
        """Patch the model, in place; new layers are drawn from torch's global generator."""
        from ..integrations.timm import patch

        return patch(model, self.method, keep_rate=self.keep_rate, at=self.at, **self.options)

    def fractions(self, model: nn.Module) -> list[float]:
        """Return the share of the patches that each stage of the patched model is to keep."""
        from ..integrations.timm import reduced_counts

        stages = len(reduced_counts(model))
        if self.keep_rate is None or isinstance(self.keep_rate, (int, float)):
            rate = 0.7 if self.keep_rate is None else self.keep_rate
            return [rate ** (stage + 1) for stage in range(stages)]
        return list(self.keep_rate)

    @property
    def variant(self) -> str:
        """The method and radial's norm, as recordings name it: ``radial_l2``."""
        return f"radial_{self.options.get('norm', 'l2')}" if self.method == "radial" else self.method

    @property
    def label(self) -> str:
        """The method, radial's norm and the rate, for progress bars and folders: ``radial-l2-0.7``."""
        rates = self.keep_rate if isinstance(self.keep_rate, tuple) else (self.keep_rate,)
        parts = [self.method, self.options.get("norm"), *(None if rate is None else f"{rate:g}" for rate in rates)]
        return "-".join(part for part in parts if part is not None)


def load_trained(
    backbone: Backbone, reduction: Reduction | None, weights: str | os.PathLike[str], num_classes: int
) -> nn.Module:
    """Load a model of which :func:`~fastreduce.study.train.train` wrote the weights, in evaluation mode.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: weights that do not fit.
    """
    from ..checkpoints import load_official

    model = dataclasses.replace(backbone, pretrained=False, checkpoint=None).build(num_classes)
    if reduction is not None:
        reduction.apply(model)
    return load_official(model, os.fspath(weights))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Settings of a training. The defaults are the paper's for ImageNet; :func:`protocol_for` gives the others.

    Attributes:
        epochs: passes over the data, ``warmup_epochs`` of them with a rising learning rate. 0 leaves the weights as
            they are, of methods without layers of their own.
        batch_size: images of one process that go through the model together.
        accumulate: batches between updates.
        lr: for a total batch (all processes, all accumulated batches) of 1,024; scaled linearly. The schedule is a
            cosine from it to ``min_lr`` after a line from ``warmup_lr``, moved with every update.
        optimizer: ``"adamw"``, or timm's ``"muon"``, which leaves vectors, positions and the class token to AdamW.
        weight_decay: of the optimizer; none of it for vectors, biases, positions and the class token.
        eps: of AdamW.
        clip_norm: largest norm of the gradient, or None.
        backbone_lr: factor of the learning rate of all but the new parts: head, positions, patch embedding and the
            method's own layers.
        frozen_epochs: epochs at the start in which that factor is 0.
        drop_path: rate at the last block.
        patch_drop: share of the patches that a training image loses at random, from unreduced models only;
            ``patch_drop_share`` of the epochs do so, the others see all patches.
        label_smoothing, mixup, cutmix, mixup_switch: see ``timm.data.Mixup``; of single-label sets only.
        repeats: times that an image occurs in a row, each time differently augmented; an epoch keeps its length.
        ema: decay of the moving average of the weights, or None. The average is measured beside the weights themselves
            and written to a file of its own.
        mixed_precision: ``"fp16"`` means float32 on a CPU, which has no fast float16.
        asymmetry: ``gamma_neg``, ``gamma_pos`` and ``clip`` of the asymmetric loss, for multi-label sets.
        distillation: from a teacher's soft or hard decisions, by softmax for multi-label sets too; DynamicViT's own
            terms do not need it.
        distillation_weight: share of the loss, 0 to 1.
        temperature: of the soft form.
        ratio_weight, logit_weight, token_weight: of DynamicViT's losses.
        workers: processes that load images; the random numbers depend on how many there are.
        seed: of everything, from 0 to 2⁶³ − 1.

    Raises:
        ValueError: values out of range, or not finite.
    """

    epochs: int = 30
    warmup_epochs: int = 20
    batch_size: int = 256
    accumulate: int = 2
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.05
    eps: float = 1e-8
    clip_norm: float | None = None
    backbone_lr: float = 1.0
    frozen_epochs: int = 0
    drop_path: float = 0.1
    patch_drop: float = 0.0
    patch_drop_share: float = 1.0
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_switch: float = 0.5
    repeats: int = 3
    ema: float | None = 0.99996
    mixed_precision: Literal["no", "fp16", "bf16"] = "fp16"
    asymmetry: tuple[float, float, float] = (4.0, 0.0, 0.05)
    distillation: Literal["soft", "hard"] | None = None
    distillation_weight: float = 0.5
    temperature: float = 1.0
    ratio_weight: float = 2.0
    logit_weight: float = 0.5
    token_weight: float = 0.5
    workers: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{field.name} must be finite, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        if len(self.asymmetry) != 3 or min(self.asymmetry) < 0:
            raise ValueError(f"asymmetry must be three numbers that are not negative, got {self.asymmetry}")
        for name in ("batch_size", "accumulate", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.epochs < 0:
            raise ValueError(f"epochs must not be negative, got {self.epochs}")
        for name in ("warmup_epochs", "frozen_epochs"):
            if not 0 <= getattr(self, name) <= self.epochs:
                raise ValueError(f"{name} must lie between 0 and epochs ({self.epochs}), got {getattr(self, name)}")
        for name in ("lr", "eps", "temperature", "clip_norm"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("mixup_switch", "distillation_weight", "patch_drop_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("drop_path", "patch_drop", "label_smoothing", "ema"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"mixup pairs images, so batch_size must be even, got {self.batch_size}")
        for name, known in (
            ("optimizer", ("adamw", "muon")),
            ("mixed_precision", ("no", "fp16", "bf16")),
            ("distillation", (None, "soft", "hard")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")

    @property
    def mixes(self) -> bool:
        """True if images of a single-label set are mixed."""
        return self.mixup > 0 or self.cutmix > 0


def protocol_for(name: str, **changes: Any) -> Protocol:
    """Return the paper's protocol for one of the data sets, with changes.

    Small images do without what suits only photos.

    How training images are augmented belongs to the data set: see :func:`~fastreduce.study.data.open_data`.

    Raises:
        ValueError: an unknown data set, or values out of range.
        TypeError: an unknown field.
    """
    if name not in DATA_SETS:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(DATA_SETS)}")
    own: dict[str, dict[str, Any]] = {
        "coco": {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0},
        "nuswide": {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0},
        "digits": {"mixup": 0.0, "cutmix": 0.0, "repeats": 1, "ema": None, "workers": 0},
        "cifar10": {"mixup": 0.0, "cutmix": 0.0, "repeats": 1, "ema": None, "workers": 0, "drop_path": 0.0},
    }
    return dataclasses.replace(Protocol(), **{**own.get(name, {}), **changes})
