"""What a whole study trains, and that of the embedded one, which takes two cores minutes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..reducers import REDUCERS
from .data import Augmentation, DataSet, Shifts, open_data
from .protocol import Backbone, Protocol, Reduction, load_trained, protocol_for
from .train import Training, train

__all__ = ["DIGITS", "DIGITS_QUICK", "Recipe", "paper_recipe", "reductions", "run_name", "train_all"]

_OPTIONS: dict[str, Mapping[str, Any]] = {"radial": {"norm": "l2", "schedule": "stages"}}
_RADIAL = ("radial-l1", "radial-l2", "radial-linf")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole study, in what it trains.

    Attributes:
        data: name of the data set.
        image_size: side of the images.
        augmentation: of training images, of the backbone and of all that follow.
        backbone: the unreduced model, without weights if ``training`` is given.
        training: how the backbone is trained, or None if it has its weights.
        fine_tuning: how it goes on from there, reduced by each of ``reductions`` and once unreduced.
        reductions: every method at every keep rate.
    """

    data: str
    image_size: int
    augmentation: Augmentation | Shifts
    backbone: Backbone
    training: Protocol | None
    fine_tuning: Protocol
    reductions: tuple[Reduction, ...]

    def open(self, root: str | os.PathLike[str] | None = None) -> DataSet:
        """The data set; see :func:`~fastreduce.study.data.open_data`."""
        return open_data(self.data, root, image_size=self.image_size, augmentation=self.augmentation)

    def trained(self, weights: str | os.PathLike[str]) -> Backbone:
        """The backbone with the weights that its training wrote."""
        return dataclasses.replace(self.backbone, checkpoint=weights)

    @property
    def runs(self) -> Iterator[Reduction | None]:
        """What is fine-tuned: the unreduced model first."""
        yield None
        yield from self.reductions


def reductions(
    methods: Sequence[str], keep_rates: Sequence[float], **options: Mapping[str, Any]
) -> tuple[Reduction, ...]:
    """Every method at every rate, at the paper's blocks.

    Args:
        methods: names in ``fastreduce.REDUCERS``; ``"radial-l1"`` for another norm than l2.
        keep_rates: rates r; stage i keeps ``r ** (i + 1)`` of the patches.
        **options: of a method; of ``radial`` by default the rings of norm l2, in stages.

    Raises:
        ValueError: an unknown method, or a rate out of range.
    """
    known = {**_OPTIONS, **options}
    for rate in keep_rates:
        if not 0 < rate <= 1:
            raise ValueError(f"keep_rate must lie in (0, 1], got {rate}")
    chosen = []
    for name in methods:
        if name not in REDUCERS and name not in _RADIAL:
            raise ValueError(f"unknown method {name!r}; expected one of {', '.join((*REDUCERS, *_RADIAL))}")
        method, _, norm = name.partition("-")
        own = {**known.get(method, {}), **({"norm": norm} if norm else {})}
        chosen += [Reduction(method, rate, options=own) for rate in keep_rates]
    return tuple(chosen)


def paper_recipe(data: str, backbone: str = "deit_small_patch16_224") -> Recipe:
    """The paper's study of one data set: pretrained weights from timm, all methods, the four keep rates.

    DynamicViT's teacher is the unreduced model, fine-tuned.

    Args:
        data: one of :data:`~fastreduce.study.data.DATA_SETS` but digits.
        backbone: a timm model of 224 pixels.
    """
    if data == "digits":
        raise ValueError("the paper has no digits; their recipe is DIGITS")
    protocol = protocol_for(data)
    augmentation = Augmentation(rand_augment=None) if data == "nabirds" else Augmentation()
    return Recipe(
        data, 224, augmentation, Backbone(backbone, pretrained=True), None, protocol, reductions(_METHODS, _KEEP_RATES)
    )


_METHODS = tuple(REDUCERS)
_KEEP_RATES = (0.25, 0.5, 0.7, 0.9)
# At a keep rate of 0.25 the third stage has 4 of 64 tokens left, fewer than the paper's 5 neighbours.
_FEW_TOKENS: dict[str, Any] = {"dpcknn": {"k_neighbors": 4}}
# Depth and stages of a DeiT, 8 x 8 tokens. With timm's usual weights of 0.02 so narrow a model takes twice as long.
_BACKBONE = Backbone(
    "vit_tiny_patch16_224",
    {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 12, "num_heads": 3, "weight_init": "jax"},
)
# 98.3 % in 5 min on one core; 40 epochs gave 97.2.
_TRAINING = protocol_for("digits", epochs=60, warmup_epochs=5, batch_size=64, accumulate=1, lr=0.032, drop_path=0.0)
# With twice the rate and 6 epochs even the unreduced model lost a point. One core takes 15 to 45 s, DynamicViT 70.
_FINE_TUNING = dataclasses.replace(_TRAINING, epochs=8, warmup_epochs=1, lr=0.0064)

DIGITS = Recipe(
    "digits",
    32,
    Shifts(),
    _BACKBONE,
    _TRAINING,
    _FINE_TUNING,
    reductions(_METHODS, _KEEP_RATES, **_FEW_TOKENS),
)
DIGITS_QUICK = dataclasses.replace(
    DIGITS,
    training=dataclasses.replace(_TRAINING, epochs=24, warmup_epochs=3),
    fine_tuning=dataclasses.replace(_FINE_TUNING, epochs=2, warmup_epochs=0),
    reductions=reductions(_METHODS, (0.25, 0.7), **_FEW_TOKENS),
)


def _fine_tune(
    recipe: Recipe,
    folder: Path,
    root: str | None,
    cpu: bool,
    reduction: Reduction | None,
    progress: Callable[[str, float, float], None] | None = None,
) -> Training:
    data = recipe.open(root)
    return train(
        data,
        recipe.trained(folder / "backbone" / "model.safetensors") if recipe.training is not None else recipe.backbone,
        recipe.fine_tuning,
        folder / run_name(reduction),
        reduction=reduction,
        teacher=_teacher(recipe, data, folder, reduction),
        cpu=cpu,
        validate_every=0,
        # One model of the embedded study takes less than a minute: it is trained again.
        checkpoint_every=1 if recipe.training is None else 0,
        progress=progress,
    )


def _teacher(recipe: Recipe, data: DataSet, folder: Path, reduction: Reduction | None) -> nn.Module | None:
    """For DynamicViT the unreduced model of the same classes, where the backbone's own head may be for others."""
    if reduction is None or reduction.method != "dynamicvit" or recipe.training is not None:
        return None
    return load_trained(recipe.backbone, None, folder / run_name(None) / "model.safetensors", data.num_classes)


def run_name(reduction: Reduction | None) -> str:
    """The folder of one of the fine-tuned models, below that of all."""
    return "unreduced" if reduction is None else reduction.label


def train_all(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    cpu: bool = False,
    progress: Callable[[str, float, float], None] | None = None,
) -> dict[str, Training]:
    """Train the backbone, then everything that starts from it. What the folder holds already is not done again.

    Args:
        recipe: the study.
        folder: gets ``backbone``, ``unreduced`` and one folder for each reduction, by its label.
        root: the folder of the data set.
        jobs: how many are fine-tuned at a time, each on one thread of a process of its own, which for small models on a
            CPU is worth far more than several threads for one. 1 stays in this process, and is what several GPUs
            (``accelerate launch``) need.
        cpu: stay on the CPU.
        progress: called with what is done, how much of it and out of how much.

    Returns:
        The trainings, by folder.

    Raises:
        ValueError: a number of jobs that cannot be, and whatever :func:`~fastreduce.study.train.train` raises.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if jobs > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"jobs must be 1 for the processes of accelerate launch, got {jobs}")
    folder, root = Path(folder), None if root is None else os.fspath(root)
    trainings = {}
    if recipe.training is not None:
        data = recipe.open(root)
        trainings["backbone"] = train(
            data, recipe.backbone, recipe.training, folder / "backbone", cpu=cpu, validate_every=5, progress=progress
        )
    runs = list(recipe.runs)
    if jobs == 1:
        for done, reduction in enumerate(runs):

            def moved(what: str, part: float, whole: float, done: int = done) -> None:
                if progress is not None:
                    progress(what, done + part / whole, len(runs))

            trainings[run_name(reduction)] = _fine_tune(recipe, folder, root, cpu, reduction, moved)
        return trainings
    # Not forked: threads of the parent may hold locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        tasks = {}
        for reduction in runs:
            tasks[task := pool.submit(_fine_tune, recipe, folder, root, cpu, reduction)] = reduction
            if reduction is None and recipe.training is None:  # it will be a teacher
                task.result()
        try:
            for done, task in enumerate(as_completed(tasks), 1):
                trainings[run_name(tasks[task])] = task.result()
                if progress is not None:
                    progress(f"training {recipe.data}", done, len(runs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return trainings
