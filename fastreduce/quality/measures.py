"""Fidelity: how close a reduced model's outputs stay to the unreduced model's, image by image."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import counted, integer
from ..recording import is_patched
from .accuracy import Accuracy, paired_accuracy
from .outputs import Outputs, check_kind, model_outputs, unreduced_copy

__all__ = ["MEASURES", "Fidelity", "fidelities", "fidelity", "image_fidelity", "top_classes"]

# name: whether more is better
MEASURES = {
    "agreement": True,
    "kl": False,
    "class_cosine": True,
    "pooled_cosine": True,
    "patch_cosine": True,
    "patch_cosine_last": True,
}
_DECILE = 0.1


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Fidelity of a reduced model to the unreduced one, on the same images.

    Attributes:
        values: (images,) float32 on the CPU for each measure that the models have:

            - ``agreement``: 1 where both have the same top-1 class, else 0. Logits that are NaN have no class; where
              the unreduced model's are NaN, so is the measure. It needs a head.
            - ``kl``: Σ p log(p / q) of the softmax of the logits in nats, p the unreduced model's. It needs a head.
            - ``class_cosine``: cosine of the class tokens.
            - ``pooled_cosine``: cosine of what the head reads.
            - ``patch_cosine``: cosine of the dense features after ``unmerge``, mean over the patches. A dropped patch
              has zeros, and counts 0.
            - ``patch_cosine_last``: the same, but a dropped patch has its own last token.
        accuracy: before and after, where labels were given, else None.
    """

    values: dict[str, Tensor]
    accuracy: Accuracy | None = None

    @property
    def images(self) -> int:
        """Number of images."""
        return len(next(iter(self.values.values())))

    def mean(self, measure: str = "pooled_cosine") -> float:
        """Return the mean of a measure over the images.

        Raises:
            ValueError: a measure that these models do not have.
        """
        return float(self._of(measure).double().mean())

    def median(self, measure: str = "pooled_cosine") -> float:
        """Return the median of a measure over the images."""
        return float(self._of(measure).double().quantile(0.5))

    def worst_decile(self, measure: str = "pooled_cosine") -> float:
        """Return the value than which a tenth of the images are worse (interpolated)."""
        values = self._of(measure).double()
        return float(values.quantile(_DECILE if MEASURES[measure] else 1 - _DECILE))

    def _of(self, measure: str) -> Tensor:
        if measure not in self.values:
            raise ValueError(f"no measure {measure!r} here; there are {', '.join(self.values)}")
        return self.values[measure]

    def summary(self) -> dict[str, Any]:
        """Return mean, median and worst decile of every measure, and the accuracy, ready for JSON."""
        rows: dict[str, Any] = {"images": self.images}
        for name in self.values:
            rows[name] = {
                "mean": self.mean(name),
                "median": self.median(name),
                "worst_decile": self.worst_decile(name),
            }
        return rows if self.accuracy is None else {**rows, "accuracy": self.accuracy.summary()}

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {self.mean(name):.3f}" for name in self.values)
        return f"Fidelity({counted(self.images, 'image')}: {means})"


def image_fidelity(before: Outputs, after: Outputs) -> dict[str, Tensor]:
    """Compare the outputs of the same images -> (B,) float32 for each measure; see :class:`Fidelity`."""
    found: dict[str, Tensor] = {}
    if before.logits is not None and after.logits is not None:
        # In float64, since float32 cannot tell a small divergence from rounding; on the CPU, as some devices lack it.
        mine, theirs = (side.logits.cpu().double() for side in (after, before))  # type: ignore[union-attr]
        if mine.shape != theirs.shape:
            raise ValueError(f"both models must have the same classes, got {theirs.shape[1]} and {mine.shape[1]}")
        # NaN logits have no top class: none agrees with a reduced model's, and the unreduced model's is unknown.
        agreement = ((mine.argmax(1) == theirs.argmax(1)) & ~mine.isnan().any(1)).float()
        found["agreement"] = agreement.masked_fill(theirs.isnan().any(1), math.nan)
        logs, reference = mine.log_softmax(1), theirs.log_softmax(1)
        found["kl"] = F.kl_div(logs, reference, reduction="none", log_target=True).sum(1).clamp_min(0).float()
    if before.class_token is not None and after.class_token is not None:
        found["class_cosine"] = _cosine(before.class_token, after.class_token)
    found["pooled_cosine"] = _cosine(before.pooled, after.pooled)
    if before.patches is not None and after.patches is not None and after.patches_last is not None:
        found["patch_cosine"] = _cosine(before.patches, after.patches).mean(1)
        found["patch_cosine_last"] = _cosine(before.patches, after.patches_last).mean(1)
    return found


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return F.cosine_similarity(first.float(), second.float(), dim=-1)


def _batches(images: Any, labels: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Cut a tensor into batches, or take a loader's batches, with labels where there are any."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or not len(images):
            raise ValueError(f"images must be (N, channels, height, width), N at least 1, got {tuple(images.shape)}")
        found = _as_labels(labels)
        if found is not None and found.shape != images.shape[:1]:
            raise ValueError(f"labels must be ({len(images)},), one for each image, got {tuple(found.shape)}")
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            yield images[rows], None if found is None else found[rows]
        return
    if labels is not None:
        raise ValueError("labels go with images as one tensor; a loader gives them beside the images of each batch")
    if not isinstance(images, Iterable):
        raise TypeError(f"images must be a tensor or an iterable of batches, got {images!r}")
    for batch in images:
        pair = batch if isinstance(batch, (tuple, list)) else (batch,)
        if not pair or not isinstance(pair[0], Tensor):
            raise TypeError(f"a batch must be a tensor or a pair of images and labels, got {type(batch).__name__}")
        if pair[0].ndim != 4:
            raise ValueError(f"a batch must be (N, channels, height, width), got images {tuple(pair[0].shape)}")
        yield pair[0], _as_labels(pair[1]) if len(pair) > 1 else None


def _as_labels(labels: Any) -> Tensor | None:
    """Return labels as a tensor, or None; raise TypeError for what is no numbers."""
    try:
        return None if labels is None else torch.as_tensor(labels)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"labels must be class indices, got {labels!r}") from error


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and every module of them back into its own."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _place_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return weight.device, weight.dtype


def fidelity(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    labels: Tensor | Sequence[int] | None = None,
    unreduced: nn.Module | None = None,
    batch_size: int = 32,
) -> Fidelity:
    """Hold a patched model against the unreduced one, on the same images.

    Args:
        model: patched, on any device; it is put into evaluation mode meanwhile. Of a model that is not timm's only the
            answer is compared: logits with what the head reads, and pooled features or an embedding.
        images: (N, 3, height, width) floating, normalised as the model wants it; or an iterable of batches, such as a
            ``DataLoader``, each of them images or a pair of images and labels. One batch is in memory at a time.
        labels: (N,) class indices, where ``images`` is a tensor.
        unreduced: the model to hold it against; by default the same weights without the reduction. Give another one
            after fine-tuning: the model as it was before.
        batch_size: images at a time, where ``images`` is a tensor.

    Returns:
        Every measure image by image, with mean, median and worst decile; with labels the accuracy of both models, with
        an interval for their difference.

    Raises:
        ValueError: a model that is not patched, or an unreduced one that is; no images, wrong shapes, two models with
            different classes, labels without a head, out of its range or for some of the batches.
        TypeError: a model whose features cannot be had, batches that are none, labels or a batch size that are no
            integers.
        ImportError: labels without scipy.

    Example::

        fastreduce.patch(model, "tome", keep_rate=0.7)
        found = fastreduce.fidelity(model, images)
        found.mean("pooled_cosine"), found.worst_decile("patch_cosine")
    """
    batch_size = integer("batch_size", batch_size, least=1)
    check_kind(model)
    if unreduced is None:
        if not is_patched(model):
            raise ValueError("the model is not patched: call fastreduce.patch first, or give the unreduced model")
        unreduced = unreduced_copy(model)
    elif is_patched(unreduced):
        raise ValueError("the model given as unreduced is patched: give one that is not, or leave it out")
    check_kind(unreduced)
    collected = _Collected()
    with _evaluating(model, unreduced):
        for batch, targets in _batches(images, labels, batch_size):
            before = model_outputs(unreduced, _moved(batch, unreduced), last=False)
            collected.add(before, model_outputs(model, _moved(batch, model)), targets)
    return collected.fidelity()


class _Collected:
    """Figures of the images so far: a few numbers each."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}
        self.right: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, before: Outputs, after: Outputs, targets: Tensor | None) -> None:
        """Take the outputs of one batch, and its labels if there are any."""
        place = before.pooled.device
        after = Outputs(*(None if value is None else value.to(place) for value in after))  # type: ignore[arg-type]
        for name, values in image_fidelity(before, after).items():
            self.parts.setdefault(name, []).append(values.cpu())
        if targets is not None:
            for side, outputs in zip(self.right, (before, after), strict=True):
                side.append(_correct(outputs, targets))

    def fidelity(self) -> Fidelity:
        """Return all of it; ValueError if there was no image."""
        if not self.parts:
            raise ValueError("no images were given")
        values = {name: torch.cat(rows) for name, rows in self.parts.items()}
        images, labelled = (sum(map(len, rows)) for rows in (next(iter(self.parts.values())), self.right[0]))
        if labelled not in (0, images):
            raise ValueError(
                f"either all batches have labels or none, got labels for {labelled} of {counted(images, 'image')}"
            )
        accuracy = paired_accuracy(torch.cat(self.right[0]), torch.cat(self.right[1])) if self.right[0] else None
        return Fidelity(values, accuracy)


def fidelities(
    unreduced: nn.Module,
    models: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    seconds: float = math.inf,
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, Fidelity]:
    """Hold several patched models against one, on the same images.

    Args:
        unreduced: the model that they are held against.
        models: patched, by name.
        batches: as :func:`fidelity` takes them.
        seconds: no batch is begun after so many, except the first.
        progress: called with the number of images that are done.

    Returns:
        The fidelity of each, all on the same images.
    """
    collected = {name: _Collected() for name in models}
    started, images = time.perf_counter(), 0
    with _evaluating(unreduced, *models.values()):
        for batch, targets in _batches(batches, None, 1):
            if images and time.perf_counter() - started > seconds * images / (images + len(batch)):
                break
            before = model_outputs(unreduced, _moved(batch, unreduced), last=False)
            for name, model in models.items():
                collected[name].add(before, model_outputs(model, _moved(batch, model)), targets)
            images += len(batch)
            progress(images)
    return {name: one.fidelity() for name, one in collected.items()}


def _moved(images: Tensor, model: nn.Module) -> Tensor:
    if not images.is_floating_point():
        raise TypeError(f"images must be floating, normalised as the model wants it, got {images.dtype}")
    return images.to(*_place_of(model))


def top_classes(outputs: Outputs) -> Tensor:
    """Return (B,) int64 on the CPU, the class of the largest logit, -1 without a head or where the logits have NaN."""
    if outputs.logits is None:
        return torch.full((len(outputs.pooled),), -1)
    return outputs.logits.argmax(1).masked_fill(outputs.logits.isnan().any(1), -1).cpu()


def _correct(outputs: Outputs, targets: Tensor) -> Tensor:
    """Return (B,) bool, whether the largest logit is the label's."""
    logits = outputs.logits
    if logits is None:
        raise ValueError("labels were given, but the model has no head")
    classes = logits.shape[1]
    if targets.is_floating_point():
        raise TypeError(f"labels must be class indices, got {targets.dtype}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"labels must be ({len(logits)},) class indices, got {tuple(targets.shape)} {targets.dtype}")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        wrong = int(targets.min()) if targets.min() < 0 else int(targets.max())
        raise ValueError(f"labels must lie between 0 and {classes - 1}, the classes of the head, got {wrong}")
    return top_classes(outputs) == targets.cpu()
