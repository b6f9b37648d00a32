"""Evaluation of a trained model: accuracy, speed, work and tokens."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..arguments import counted
from ..backends import backend
from ..integrations.timm import is_patched, reduced_counts, reducer_of
from ..measure import count_gmacs, quartiles, take_turns
from .data import DataSet
from .measures import mean_average_precision
from .record import Recording, best_classes, record_images

__all__ = [
    "LEAST_ROUNDS",
    "Evaluation",
    "Examination",
    "evaluate",
    "evaluate_together",
    "examine",
    "measure_accuracy",
    "time_in_turns",
]

LEAST_ROUNDS = 3  # with fewer, a speed says nothing of its spread


@dataclasses.dataclass(frozen=True)
class Examination:
    """Findings of :func:`examine`: all but the speed.

    Attributes:
        accuracy: in per cent: ``top1`` and ``top5``, of multi-label sets ``map``.
        images: how many of the validation split were seen: all.
        gmacs: 10⁹ multiply-adds for an image, which papers call GFLOPs; of a method that keeps another number of tokens
            in every image, for the most that it can keep.
        tokens: patch tokens after each stage, a fused one included; of such a method the mean over all images.
        parameters: their number.
        batch_size: images that went through the model together.
        device: where.
    """

    accuracy: dict[str, float]
    images: int
    gmacs: float
    tokens: list[float]
    parameters: int
    batch_size: int
    device: str


@dataclasses.dataclass(frozen=True)
class Evaluation(Examination):
    """Findings of :func:`evaluate`; ``dataclasses.asdict`` makes them ready for JSON.

    Attributes:
        images_per_second: the median of the rounds.
        images_per_second_quartiles: first and third.
        rounds: how many.
    """

    images_per_second: float
    images_per_second_quartiles: list[float]
    rounds: int

    @classmethod
    def of(cls, found: Examination, speeds: list[float]) -> Evaluation:
        """Join an examination and the speeds of a model, in images per second, one a round."""
        return cls(
            **dataclasses.asdict(found),
            images_per_second=statistics.median(speeds),
            images_per_second_quartiles=list(quartiles(speeds)),
            rounds=len(speeds),
        )


def _batches(data: DataSet, batch_size: int, workers: int) -> DataLoader:
    # A generator of its own: validation leaves the random numbers of the training alone.
    return DataLoader(
        data.val, batch_size=min(batch_size, len(data.val)), num_workers=workers, generator=torch.Generator()
    )


def _accuracy(data: DataSet, logits: list[Tensor], labels: list[Tensor]) -> dict[str, float]:
    together, truth = torch.cat(logits), torch.cat(labels)
    if data.multi_label:
        return {"map": mean_average_precision(together.numpy(), truth.numpy())}
    return _shares_right(best_classes(together).numpy(), truth.numpy())


def _shares_right(best: NDArray[Any], truth: NDArray[Any]) -> dict[str, float]:
    """Return top-1 and top-5 in per cent, from (N, up to 5) classes, best first, and (N,) labels."""
    right = best == truth[:, None]
    return {"top1": float(100 * right[:, 0].mean()), "top5": float(100 * right.any(1).mean())}


@torch.inference_mode()
def measure_accuracy(
    model: nn.Module, data: DataSet, *, accelerator: Accelerator | None = None, batch_size: int = 256, workers: int = 0
) -> dict[str, float]:
    """Return the accuracy on the validation split, in per cent.

    Args:
        model: patched or not; put in evaluation mode. It must be on the accelerator's device.
        data: from :func:`~fastreduce.study.data.open_data`.
        accelerator: shares the images among its processes, each of which gets the result. Default: a new one.
        batch_size: of one process.
        workers: processes that load images.

    Returns:
        ``top1`` and ``top5``; of multi-label sets ``map``, see
        :func:`~fastreduce.study.measures.mean_average_precision`.
    """
    accelerator = Accelerator() if accelerator is None else accelerator
    model.eval()
    logits, labels = [], []
    for images, truth in accelerator.prepare_data_loader(_batches(data, batch_size, workers)):
        with accelerator.autocast():
            scores = model(images)
        scores, truth = accelerator.gather_for_metrics((scores.float(), truth))
        logits.append(scores.cpu())
        labels.append(truth.cpu())
    return _accuracy(data, logits, labels)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_rounds(rounds: int) -> None:
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"rounds must be at least {LEAST_ROUNDS}, since fewer say nothing of the spread, got {rounds}")


def _gmacs(model: nn.Module, image_size: int) -> float:
    """Return the 10⁹ multiply-adds for an image."""
    weight = next(model.parameters())
    image = torch.empty(1, 3, image_size, image_size, dtype=weight.dtype, device="meta")
    with backend("reference"):
        # The counter's hooks on parameters that want gradients fail in inference mode.
        return count_gmacs(copy.deepcopy(model).requires_grad_(False).to("meta"), image)


def _recorded_accuracy(recording: Recording) -> dict[str, float]:
    outputs = recording.outputs
    return (
        {"map": recording.run.accuracy}
        if "scores" in outputs
        else _shares_right(outputs["prediction"], outputs["target"])
    )


def _recorded_tokens(recording: Recording, model: Any) -> list[float]:
    """Patch tokens after each stage; of a method that keeps another number in every image the mean."""
    if not is_patched(model):
        return []
    counts = [float(count) for count in reduced_counts(model)]
    reducer = reducer_of(model)
    if reducer.ragged:
        for stage, block in enumerate(reducer.blocks):
            if block in recording.kept:
                counts[stage] = float((recording.kept[block] >= 0).sum(1).mean())
    return counts


@torch.inference_mode()
def examine(model: nn.Module, recording: Recording, data: DataSet, *, batch_size: int) -> Examination:
    """Find all but the speed of a model, from a recording of what it did with the validation split.

    Args:
        model: patched or not; the one that was recorded.
        recording: of all images; see :func:`~fastreduce.study.record.record_images`.
        data: from :func:`~fastreduce.study.data.open_data`.
        batch_size: images that went through the model together.

    Raises:
        ValueError: a recording of another number of images, or a batch of no images.
    """
    _check_positive(batch_size=batch_size)
    if recording.images != len(data.val):
        raise ValueError(f"the recording has {counted(recording.images, 'image')}, {data.name} has {len(data.val)}")
    weight = next(model.parameters())
    return Examination(
        accuracy=_recorded_accuracy(recording),
        images=recording.images,
        gmacs=_gmacs(model, data.image_size),
        tokens=_recorded_tokens(recording, model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        batch_size=min(batch_size, len(data.val)),
        device=str(weight.device),
    )


@torch.inference_mode()
def time_in_turns(
    models: Mapping[str, nn.Module], data: DataSet, *, batch_size: int = 256, rounds: int = 10
) -> dict[str, list[float]]:
    """Measure how many images a second each of several models takes, in turns: what disturbs one disturbs all.

    Args:
        models: by name, all on one device and of one dtype; put in evaluation mode.
        data: the first images of its validation split are what is timed.
        batch_size: images that go through a model together. Loading and copying them is not timed.
        rounds: in each, every model takes one batch, in every second round in the reverse order. Two warm up.

    Returns:
        Images per second of each model, one a round.

    Raises:
        ValueError: a batch of no images, or fewer than three rounds.
    """
    _check_positive(batch_size=batch_size)
    _check_rounds(rounds)
    weight = next(parameter for model in models.values() for parameter in model.parameters())
    images = torch.stack([data.val[index][0] for index in range(min(batch_size, len(data.val)))])
    images = images.to(weight.device, weight.dtype)
    calls = {name: partial(model.eval(), images) for name, model in models.items()}
    take_turns(calls, weight.device, 2)
    seconds = take_turns(calls, weight.device, rounds)
    return {name: [len(images) / each for each in found] for name, found in seconds.items()}


def evaluate_together(
    models: Mapping[str, nn.Module],
    data: DataSet,
    *,
    batch_size: int = 256,
    workers: int = 0,
    rounds: int = 10,
    progress: Callable[[str, float, float], None] = lambda what, done, total: None,
) -> dict[str, Evaluation]:
    """Evaluate models where they are, in their own dtype, on one device, and time them in turns.

    Args:
        models: by name; put in evaluation mode.
        data: from :func:`~fastreduce.study.data.open_data`.
        batch_size: for accuracy and for speed.
        workers: processes that load images.
        rounds: how often one batch is timed, after two to warm up. Loading and copying it are not.
        progress: called with what is done, how much of it and out of how much.

    Raises:
        ValueError: a batch of no images, or fewer than three rounds.
    """
    _check_positive(batch_size=batch_size)
    _check_rounds(rounds)
    found, images = {}, len(models) * len(data.val)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, model) in enumerate(models.items()):
            before = number * len(data.val)
            recording = record_images(
                model,
                _batches(data, batch_size, workers),
                Path(folder) / f"{number}.safetensors",
                dataset=data.name,
                backbone="",
                keep_rate=1.0 if is_patched(model) else None,
                features=(),
                progress=lambda done, before=before: progress("evaluating", before + done, images),  # type: ignore[misc]
            )
            found[name] = examine(model, recording, data, batch_size=batch_size)
    progress("timing", 0, 1)
    speeds = time_in_turns(models, data, batch_size=batch_size, rounds=rounds)
    return {name: Evaluation.of(found[name], speeds[name]) for name in models}


def evaluate(
    model: nn.Module, data: DataSet, *, batch_size: int = 256, workers: int = 0, rounds: int = 10
) -> Evaluation:
    """Evaluate one model; see :func:`evaluate_together`, which also compares the speeds of several.

    Raises:
        ValueError: a batch of no images, or fewer than three rounds.
    """
    return evaluate_together({"": model}, data, batch_size=batch_size, workers=workers, rounds=rounds)[""]
