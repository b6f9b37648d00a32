"""What a trained model is worth: accuracy, speed, work and tokens."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from ..backends import backend
from ..integrations.timm import is_patched, record, reduced_counts, reducer_of
from ..measure import count_gmacs, quartiles, take_turns
from .data import DataSet
from .measures import mean_average_precision

__all__ = ["LEAST_ROUNDS", "Evaluation", "Examination", "evaluate", "examine", "measure_accuracy", "time_in_turns"]

LEAST_ROUNDS = 3  # of a speed: fewer say nothing of its spread


@dataclasses.dataclass(frozen=True)
class Examination:
    """What :func:`examine` found, all but the speed.

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
    """What :func:`evaluate` found; ``dataclasses.asdict`` makes it ready for JSON.

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
        """An examination with the speeds of a model, in images per second, one a round."""
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
    found = {}
    for name, first in (("top1", 1), ("top5", min(5, data.num_classes))):
        metric = MulticlassAccuracy(data.num_classes, top_k=first, average="micro", sync_on_compute=False)
        found[name] = 100 * metric(together, truth).item()
    return found


@torch.inference_mode()
def measure_accuracy(
    model: nn.Module, data: DataSet, *, accelerator: Accelerator | None = None, batch_size: int = 256, workers: int = 0
) -> dict[str, float]:
    """Accuracy on the validation split, in per cent.

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


def _kept(model: Any, images: Tensor, counts: list[int]) -> Tensor:
    """(B, stages) tokens after each stage, of a batch."""
    with record(model) as seen:
        model(images)
    kept = torch.tensor(counts, dtype=torch.float64).repeat(len(images), 1)
    stages = {stage.block: stage for stage in seen.stages}
    for column, block in enumerate(reducer_of(model).blocks):
        if (stage := stages.get(block)) is not None and stage.kept is not None and not stage.fused:
            kept[:, column] = (stage.kept >= 0).sum(1).cpu().double()
    return kept


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


@torch.inference_mode()
def examine(model: nn.Module, data: DataSet, *, batch_size: int = 256, workers: int = 0) -> Examination:
    """Measure all but the speed of a model where it is, in its own dtype, on one device.

    Args:
        model: patched or not; put in evaluation mode.
        data: from :func:`~fastreduce.study.data.open_data`.
        batch_size: the last batch may be smaller.
        workers: processes that load images.

    Raises:
        ValueError: a batch of no images.
    """
    _check_positive(batch_size=batch_size)
    model.eval()
    weight = next(model.parameters())
    patched = is_patched(model)
    ragged = patched and reducer_of(model).ragged
    counts = reduced_counts(model) if patched else []
    logits, labels, kept = [], [], []
    first = None
    for images, truth in _batches(data, batch_size, workers):
        images = images.to(weight.device, weight.dtype)
        first = images if first is None else first
        logits.append(model(images).float().cpu())
        labels.append(truth)
        if ragged:
            kept.append(_kept(model, images, counts))
    assert first is not None
    with backend("reference"):
        # The counter's hooks on parameters that want gradients fail in inference mode.
        gmacs = count_gmacs(copy.deepcopy(model).requires_grad_(False).to("meta"), first[:1].to("meta"))
    return Examination(
        accuracy=_accuracy(data, logits, labels),
        images=len(data.val),
        gmacs=gmacs,
        tokens=torch.cat(kept).mean(0).tolist() if kept else [float(count) for count in counts],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        batch_size=len(first),
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
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"rounds must be at least {LEAST_ROUNDS}, since fewer say nothing of the spread, got {rounds}")
    weight = next(parameter for model in models.values() for parameter in model.parameters())
    images = torch.stack([data.val[index][0] for index in range(min(batch_size, len(data.val)))])
    images = images.to(weight.device, weight.dtype)
    calls = {name: partial(model.eval(), images) for name, model in models.items()}
    take_turns(calls, weight.device, 2)
    seconds = take_turns(calls, weight.device, rounds)
    return {name: [len(images) / each for each in found] for name, found in seconds.items()}


def evaluate(
    model: nn.Module, data: DataSet, *, batch_size: int = 256, workers: int = 0, rounds: int = 10
) -> Evaluation:
    """Evaluate a model where it is, in its own dtype, on one device.

    To compare the speed of several models, let them take turns: :func:`time_in_turns`.

    Args:
        model: patched or not; put in evaluation mode.
        data: from :func:`~fastreduce.study.data.open_data`.
        batch_size: for accuracy and for speed.
        workers: processes that load images.
        rounds: how often one batch is timed, after two to warm up. Loading and copying it are not.

    Raises:
        ValueError: a batch of no images, or fewer than three rounds.
    """
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"rounds must be at least {LEAST_ROUNDS}, since fewer say nothing of the spread, got {rounds}")
    found = examine(model, data, batch_size=batch_size, workers=workers)
    return Evaluation.of(found, time_in_turns({"": model}, data, batch_size=batch_size, rounds=rounds)[""])
