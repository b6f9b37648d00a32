"""Recipes of whole studies, and the recipe of the embedded one, which takes two cores minutes.

Torch is imported when something is trained: see :mod:`fastreduce.study.protocol`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..names import FAMILIES, METHODS
from ._workers import Workers
from .protocol import (
    Augmentation,
    Backbone,
    Crops,
    Protocol,
    Reduction,
    Shifts,
    default_augmentation,
    load_trained,
    protocol_for,
)

if TYPE_CHECKING:
    from torch import nn

    from .data import DataSet
    from .train import Training

__all__ = [
    "CIFAR10",
    "DIGITS",
    "DIGITS_QUICK",
    "EMBEDDED",
    "Capacity",
    "Model",
    "Recipe",
    "paper_recipe",
    "reductions",
    "train_all",
    "without_training",
]

_Progress = Callable[[str, float, float], None]
_Step = Callable[[_Progress | None], "Training"]

_OPTIONS: dict[str, Mapping[str, Any]] = {"radial": {"norm": "l2", "schedule": "stages"}}
_RADIAL = ("radial-l1", "radial-l2", "radial-linf")
_METHODS = tuple(dict.fromkeys(name.partition("_")[0] for family in FAMILIES.values() for name in family))
# A matching merges at most half of the tokens: below this rate ToMe needs several to leave as many as the others.
_ONE_MATCHING = 0.5


@dataclasses.dataclass(frozen=True)
class Capacity:
    """A further backbone, smaller or larger than a study's own, on which some of its methods are repeated.

    Attributes:
        name: what recordings call it, and the folder of its models.
        backbone: without weights if the recipe trains its own from scratch.
        reductions: what is repeated; the unreduced model always is.
    """

    name: str
    backbone: Backbone
    reductions: tuple[Reduction, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the models that a study fine-tunes.

    Attributes:
        capacity: the backbone that it starts from, under the name that recordings give it.
        reduction: of it, or None.
        folder: of all that start from there, below the folder of the study's models; empty for its own backbone.
    """

    capacity: Capacity
    reduction: Reduction | None
    folder: str

    @property
    def place(self) -> str:
        """Folder of the model: ``topk-0.5``, or ``width-24/unreduced``."""
        return _place(self.folder, "unreduced" if self.reduction is None else self.reduction.label)


def _place(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole study, in what it trains.

    Attributes:
        data: name of the data set.
        image_size: side of the images.
        augmentation: of training images, of the backbone and of all that follow.
        backbone: the unreduced model; without weights it is trained as ``training`` says.
        training: how backbones without weights are trained, or None if all have theirs.
        fine_tuning: how it goes on from there, reduced by each of ``reductions`` and once unreduced.
        reductions: every method at every keep rate.
        capacities: further backbones, trained and fine-tuned in the same ways.
        teacher: for distillation and for DynamicViT. Default: the weights that a model starts from; for DynamicViT
            without ``training`` the unreduced model after its fine-tuning.

    Raises:
        ValueError: two backbones of one name, or one whose name cannot name its folder.
    """

    data: str
    image_size: int
    augmentation: Augmentation | Crops | Shifts
    backbone: Backbone
    training: Protocol | None
    fine_tuning: Protocol
    reductions: tuple[Reduction, ...]
    capacities: tuple[Capacity, ...] = ()
    teacher: Backbone | None = None

    def __post_init__(self) -> None:
        names = [self.backbone.name, *(capacity.name for capacity in self.capacities)]
        if len({*names}) < len(names):
            raise ValueError(f"every backbone needs a name of its own, got {', '.join(names)}")
        taken = {"backbone", "unreduced", *(reduction.label for reduction in self.reductions)}
        for name in names[1:]:
            if Path(name).name != name or name in taken:
                raise ValueError(f"a further backbone has a folder of its name, which {name!r} cannot be")

    def open(self, root: str | os.PathLike[str] | None = None) -> DataSet:
        """Open the data set; see :func:`~fastreduce.study.data.open_data`."""
        from .data import open_data

        return open_data(self.data, root, image_size=self.image_size, augmentation=self.augmentation)

    def trains(self, capacity: Capacity) -> bool:
        """Return whether this backbone is trained here, because it has no weights."""
        return self.training is not None and not capacity.backbone.has_weights

    @property
    def models(self) -> Iterator[Model]:
        """Models that are fine-tuned: the own backbone first, and of every backbone the unreduced model first."""
        own = Capacity(self.backbone.name, self.backbone, self.reductions)
        for capacity in (own, *self.capacities):
            folder = "" if capacity is own else capacity.name
            yield Model(capacity, None, folder)
            for reduction in capacity.reductions:
                yield Model(capacity, reduction, folder)


def reductions(
    methods: Sequence[str], keep_rates: Sequence[float], **options: Mapping[str, Any]
) -> tuple[Reduction, ...]:
    """Return every method at every rate, at the paper's blocks.

    Args:
        methods: names in ``fastreduce.REDUCERS``; ``"radial-l1"`` for another norm than l2.
        keep_rates: rates r; stage i keeps ``r ** (i + 1)`` of the patches.
        **options: of a method; of ``radial`` by default the rings of norm l2, in stages; of ``tome`` below a rate of
            0.5 ``rounds="exact"``, since one matching leaves at least half of the tokens.

    Raises:
        ValueError: an unknown method, or a rate out of range.
    """
    known = {**_OPTIONS, **options}
    for rate in keep_rates:
        if not 0 < rate <= 1:
            raise ValueError(f"keep_rate must lie in (0, 1], got {rate}")
    chosen = []
    for name in methods:
        if name not in _METHODS and name not in _RADIAL:
            near = difflib.get_close_matches(name, (*_METHODS, *_RADIAL), n=1)
            hint = f"did you mean {near[0]!r}? Known" if near else "expected one of"
            raise ValueError(f"unknown method {name!r}; {hint}: {', '.join((*_METHODS, *_RADIAL))}")
        method, _, norm = name.partition("-")
        own = {**known.get(method, {}), **({"norm": norm} if norm else {})}
        for rate in keep_rates:
            several = {"rounds": "exact"} if method == "tome" and rate < _ONE_MATCHING else {}
            chosen.append(Reduction(method, rate, options={**several, **own}))
    return tuple(chosen)


def without_training(recipe: Recipe) -> Recipe:
    """Return the study of the methods as they are, off the shelf: those that have layers to train are left out.

    DPC-KNN takes part with equal weights in place of its learned score.
    """

    def untrained(given: Sequence[Reduction]) -> tuple[Reduction, ...]:
        kept = []
        for one in given:
            if one.method == "dpcknn":
                kept.append(dataclasses.replace(one, options={**one.options, "equal_weight": True}))
            elif one.method == "radial" or METHODS[one.method].layers == "none":
                kept.append(one)
        return tuple(kept)

    capacities = tuple(
        dataclasses.replace(capacity, reductions=untrained(capacity.reductions)) for capacity in recipe.capacities
    )
    protocol = dataclasses.replace(recipe.fine_tuning, epochs=0, warmup_epochs=0, frozen_epochs=0)
    return dataclasses.replace(
        recipe, fine_tuning=protocol, reductions=untrained(recipe.reductions), capacities=capacities
    )


def paper_recipe(data: str, backbone: str = "deit_small_patch16_224", capacities: Sequence[str] = ()) -> Recipe:
    """Return the paper's study of one data set: pretrained weights from timm, all methods, the four keep rates.

    DynamicViT's teacher is the unreduced model, fine-tuned.

    Args:
        data: one of :data:`~fastreduce.study.protocol.DATA_SETS` but digits and cifar10.
        backbone: a timm model of 224 pixels.
        capacities: further ones, on which everything is repeated; the paper's are ``deit_tiny_patch16_224`` and
            ``deit_base_patch16_224``.
    """
    if data in ("digits", "cifar10"):
        raise ValueError(f"the paper has no {data}; its recipe is {data.upper()}")
    everything = reductions(_METHODS, _KEEP_RATES)
    return Recipe(
        data,
        224,
        default_augmentation(data),
        Backbone(backbone, pretrained=True),
        None,
        protocol_for(data),
        everything,
        tuple(Capacity(name, Backbone(name, pretrained=True), everything) for name in capacities),
    )


_KEEP_RATES = (0.25, 0.5, 0.7, 0.9)
# The third stage of the lowest keep rate has fewer tokens left than the paper's five neighbours.
_FEW_TOKENS: dict[str, Any] = {"dpcknn": {"k_neighbors": 4}}
# Depth and stages of a DeiT, few tokens. With timm's usual initial weights so narrow a model takes twice as long.
_BACKBONE = Backbone(
    "vit_tiny_patch16_224",
    {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 12, "num_heads": 3, "weight_init": "jax"},
)
# It reaches 98.3 % in five minutes on one core; with two thirds of the epochs it lost a point.
_TRAINING = protocol_for("digits", epochs=60, warmup_epochs=5, batch_size=64, accumulate=1, lr=0.032, drop_path=0.0)
# With twice the rate even the unreduced model lost a point. One core takes about a minute.
_FINE_TUNING = dataclasses.replace(_TRAINING, epochs=8, warmup_epochs=1, lr=0.0064)

# Half as wide and with a quarter of the weights, it is as deep and has as many heads and tokens.
_NARROW = Backbone(_BACKBONE.name, {**_BACKBONE.options, "embed_dim": 24})

DIGITS = Recipe(
    "digits",
    32,
    Shifts(),
    _BACKBONE,
    _TRAINING,
    _FINE_TUNING,
    reductions(_METHODS, _KEEP_RATES, **_FEW_TOKENS),
    (Capacity("width-24", _NARROW, reductions(FAMILIES["Pruning"], _KEEP_RATES)),),
)
DIGITS_QUICK = dataclasses.replace(
    DIGITS,
    training=dataclasses.replace(_TRAINING, epochs=24, warmup_epochs=3),
    fine_tuning=dataclasses.replace(_FINE_TUNING, epochs=2, warmup_epochs=0),
    reductions=reductions(_METHODS, (0.25, 0.7), **_FEW_TOKENS),
    capacities=(Capacity("width-24", _NARROW, reductions(("topk",), (0.25, 0.7))),),
)

# The stages stand at a quarter, half and three quarters of the depth.
_CIFAR10_BACKBONE = Backbone(
    "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 8, "num_heads": 4}
)
# For this batch a learning rate of 0.003.
_CIFAR10_TRAINING = protocol_for(
    "cifar10",
    **{"epochs": 10, "warmup_epochs": 1, "batch_size": 128, "accumulate": 1, "lr": 0.024, "min_lr": 0.0},
    **{"optimizer": "muon", "clip_norm": 1.0, "patch_drop": 0.5, "patch_drop_share": 0.6},
)
# For this batch a learning rate of 0.0003: the weights are good, and the method has one epoch to fit them to itself.
_CIFAR10_FINE_TUNING = dataclasses.replace(
    _CIFAR10_TRAINING, epochs=1, warmup_epochs=0, lr=0.0024, optimizer="adamw", patch_drop=0.0
)
CIFAR10 = Recipe(
    "cifar10",
    32,
    Crops(),
    _CIFAR10_BACKBONE,
    _CIFAR10_TRAINING,
    _CIFAR10_FINE_TUNING,
    reductions(_METHODS, _KEEP_RATES, **_FEW_TOKENS),
    (
        Capacity(
            "width-64",
            dataclasses.replace(_CIFAR10_BACKBONE, options={**_CIFAR10_BACKBONE.options, "embed_dim": 64}),
            reductions(FAMILIES["Pruning"], _KEEP_RATES),
        ),
    ),
)
EMBEDDED = {"digits": DIGITS, "cifar10": CIFAR10}


@functools.lru_cache(maxsize=1)
def _opened(data: str, image_size: int, augmentation: Any, root: str | None) -> DataSet:
    """Open a data set for all models of a study: to read what is in its tar files takes seconds."""
    from .data import open_data

    return open_data(data, root, image_size=image_size, augmentation=augmentation)


def _open(recipe: Recipe, root: str | None) -> DataSet:
    return _opened(recipe.data, recipe.image_size, recipe.augmentation, root)


def _train_backbone(
    recipe: Recipe, folder: Path, root: str | None, cpu: bool, model: Model, progress: _Progress | None = None
) -> Training:
    from .train import train

    assert recipe.training is not None
    return train(
        _open(recipe, root),
        model.capacity.backbone,
        recipe.training,
        folder / _place(model.folder, "backbone"),
        cpu=cpu,
        validate_every=5,
        progress=progress,
    )


def _fine_tune(
    recipe: Recipe, folder: Path, root: str | None, cpu: bool, model: Model, progress: _Progress | None = None
) -> Training:
    from .train import train

    data, backbone = _open(recipe, root), model.capacity.backbone
    if recipe.trains(model.capacity):
        trained = folder / _place(model.folder, "backbone") / "model.safetensors"
        backbone = dataclasses.replace(backbone, checkpoint=trained)
    return train(
        data,
        backbone,
        recipe.fine_tuning,
        folder / model.place,
        reduction=model.reduction,
        teacher=_teacher(recipe, folder, model, data.num_classes),
        cpu=cpu,
        validate_every=0,
        # One model of the embedded study takes less than a minute: it is trained again.
        checkpoint_every=0 if recipe.trains(model.capacity) else 1,
        progress=progress,
    )


def _learns_from_unreduced(recipe: Recipe, model: Model) -> bool:
    """Return whether the unreduced model teaches it: DynamicViT, where the backbone's head may be for others."""
    return not recipe.trains(model.capacity) and recipe.teacher is None and _is_dynamic(model)


def _is_dynamic(model: Model) -> bool:
    return model.reduction is not None and model.reduction.method == "dynamicvit"


def _teacher(recipe: Recipe, folder: Path, model: Model, num_classes: int) -> nn.Module | None:
    if recipe.teacher is not None and (recipe.fine_tuning.distillation is not None or _is_dynamic(model)):
        return recipe.teacher.teacher(num_classes)
    if not _learns_from_unreduced(recipe, model):
        return None
    unreduced = dataclasses.replace(model, reduction=None)
    return load_trained(model.capacity.backbone, None, folder / unreduced.place / "model.safetensors", num_classes)


def _steps(recipe: Recipe, folder: Path, root: str | None, cpu: bool) -> dict[str, tuple[_Step, str | None]]:
    """Return the step that trains every place, and the place that must be trained before it."""
    steps: dict[str, tuple[_Step, str | None]] = {}
    for model in recipe.models:
        before = None
        if recipe.trains(model.capacity):
            before = _place(model.folder, "backbone")
            if before not in steps:
                steps[before] = partial(_train_backbone, recipe, folder, root, cpu, model), None
        elif _learns_from_unreduced(recipe, model):
            before = dataclasses.replace(model, reduction=None).place
        steps[model.place] = partial(_fine_tune, recipe, folder, root, cpu, model), before
    return steps


def train_all(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    cpu: bool = False,
    progress: _Progress | None = None,
) -> dict[str, Training]:
    """Train the backbones, then everything that starts from them. What the folder holds already is not done again.

    Args:
        recipe: the study.
        folder: gets ``backbone``, ``unreduced`` and one folder for each reduction, by its label; of every further
            backbone the same in a folder of its name.
        root: the folder of the data set.
        jobs: how many are trained at a time, each on one thread of a process of its own, which for small models on a
            CPU is worth far more than several threads for one. 1 stays in this process, and is what several GPUs
            (``accelerate launch``) need.
        cpu: stay on the CPU.
        progress: called with what is done, how many models are, in parts of one too, and out of how many.

    Returns:
        The trainings, by folder.

    Raises:
        ValueError: a number of jobs that cannot be, and whatever :func:`~fastreduce.study.train.train` raises.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    _opened.cache_clear()  # the folder may have changed since an earlier study of this process
    if jobs > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"jobs must be 1 for the processes of accelerate launch, got {jobs}")
    steps = _steps(recipe, Path(folder), None if root is None else os.fspath(root), cpu)
    if jobs > 1:
        return _train_together(recipe, steps, jobs, progress)
    trainings = {}
    for done, (place, (step, _)) in enumerate(steps.items()):

        def moved(what: str, part: float, whole: float, done: int = done) -> None:
            if progress is not None:
                progress(what, done + part / whole, len(steps))

        trainings[place] = step(moved)
    return trainings


_parts: Any = None  # how much of every model is trained, shared by the processes of a study


def _start_worker(parts: Any) -> None:
    import torch

    global _parts
    _parts = parts
    torch.set_num_threads(1)


def _train_in_worker(step: _Step, index: int) -> Training:
    def moved(what: str, part: float, whole: float) -> None:
        _parts[index] = part / whole

    return step(moved)


def _train_together(
    recipe: Recipe,
    steps: Mapping[str, tuple[_Step, str | None]],
    jobs: int,
    progress: _Progress | None,
) -> dict[str, Training]:
    # Not forked: threads of the parent may hold locks.
    context = multiprocessing.get_context("spawn")
    parts = context.RawArray("d", len(steps))
    index = {place: index for index, place in enumerate(steps)}
    trainings: dict[str, Training] = {}
    waiting = dict(steps)
    with Workers(min(jobs, len(steps)), context, _start_worker, parts) as workers:
        while len(trainings) < len(steps):
            for place in [place for place, (_, before) in waiting.items() if before is None or before in trainings]:
                workers.submit(place, _train_in_worker, waiting.pop(place)[0], index[place])
            for place, training in workers.finished(timeout=0.5):
                trainings[place] = training
                parts[index[place]] = 1.0  # those that were trained before said nothing
            if progress is not None:
                progress(f"training {recipe.data}", sum(parts), len(steps))
    return trainings
