"""What a trained model is worth: accuracy, speed, work and tokens."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from ..backends import backend
from ..compare import count_gmacs
from ..integrations.timm import is_patched, record, reduced_counts, reducer_of
from ..measure import quartiles, seconds_of
from .data import DataSet
from .measures import mean_average_precision

__all__ = ["Evaluation", "evaluate", "measure_accuracy"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found; ``dataclasses.asdict`` makes it ready for JSON.

    Attributes:
        accuracy: in per cent: ``top1`` and ``top5``, of multi-label sets ``map``.
        images: how many of the validation split were seen: all.
        images_per_second: the median of the rounds, and the quartiles.
        gmacs: 10⁹ multiply-adds for an image, which papers call GFLOPs; of a method that keeps another number of tokens
            in every image, for the most that it can keep.
        tokens: patch tokens after each stage, a fused one included; of such a method the mean over all images.
        parameters: their number.
    """

    accuracy: dict[str, float]
    images: int
    images_per_second: float
    images_per_second_quartiles: list[float]
    gmacs: float
    tokens: list[float]
    parameters: int
    batch_size: int
    device: str


def _batches(data: DataSet, batch_size: int, workers: int) -> DataLoader:
    # A generator of its own: validation leaves the random numbers of the training alone.
    return DataLoader(data.val, batch_size=batch_size, num_workers=workers, generator=torch.Generator())


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


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: DataSet, *, batch_size: int = 256, workers: int = 0, rounds: int = 10
) -> Evaluation:
    """Evaluate a model where it is, in its own dtype, on one device.

    Args:
        model: patched or not; put in evaluation mode.
        data: from :func:`~fastreduce.study.data.open_data`.
        batch_size: for accuracy and for speed; the last batch may be smaller, and is not timed.
        workers: processes that load images.
        rounds: how often one batch is timed, after two to warm up. Loading and copying it are not.

    Returns:
        What was found.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    model.eval()
    weight = next(model.parameters())
    patched = is_patched(model)
    ragged = patched and reducer_of(model).ragged
    counts = reduced_counts(model) if patched else []
    logits, labels, kept = [], [], []
    timed = None
    for images, truth in _batches(data, batch_size, workers):
        images = images.to(weight.device, weight.dtype)
        timed = images if timed is None else timed
        logits.append(model(images).float().cpu())
        labels.append(truth)
        if ragged:
            kept.append(_kept(model, images, counts))
    assert timed is not None
    for _ in range(2):
        model(timed)
    speeds = [len(timed) / seconds_of(lambda: model(timed), weight.device) for _ in range(rounds)]
    with backend("reference"):
        # The counter's hooks on parameters that want gradients fail in inference mode.
        gmacs = count_gmacs(copy.deepcopy(model).requires_grad_(False).to("meta"), timed[:1].to("meta"))
    return Evaluation(
        accuracy=_accuracy(data, logits, labels),
        images=len(data.val),
        images_per_second=statistics.median(speeds),
        images_per_second_quartiles=list(quartiles(speeds)),
        gmacs=gmacs,
        tokens=torch.cat(kept).mean(0).tolist() if kept else [float(count) for count in counts],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        batch_size=len(timed),
        device=str(weight.device),
    )
