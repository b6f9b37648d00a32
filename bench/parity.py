"""Parity of methods with the official algorithm: logits in forward steps, loss and gradient in training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreduce.integrations.timm import record
from fastreduce.speed.comparison import Comparison, Entry
from fastreduce.speed.decisions import relative_difference

__all__ = ["ALLOWED", "Parity", "Progress", "in_forward", "in_training"]

ALLOWED = 8  # difference allowed, over the unreduced model's own, as in fastreduce compare

Progress = Callable[[str, float, float], None]  # the phase, how much of it is done, and out of how much


@dataclasses.dataclass
class Parity:
    """Comparison of a method with the official algorithm in one step.

    Attributes:
        against: what it was held against, in words.
        difference: the largest, relative to the largest value.
        official_difference: the same of the official algorithm in the dtype that is timed; None against itself.
        allowed: what needs no explanation.
        changed: images for which other tokens were chosen than in float64; None where nothing gave reason to look.
    """

    against: str
    difference: float
    official_difference: float | None
    allowed: float
    changed: int | None = None

    @property
    def verdict(self) -> str:
        """``"green"``, ``"near-ties"`` or ``"red"``."""
        if self.difference <= self.allowed:
            return "green"
        return "near-ties" if self.changed else "red"


def in_forward(comparison: Comparison) -> dict[str, Parity]:
    """Return the parity of the logits, by entry, as the comparison checked them."""
    allowed = ALLOWED * comparison.difference
    return {
        entry.slug: Parity("float64", entry.difference, entry.plain_difference, allowed, entry.changed)
        for entry in comparison.entries
    }


def in_training(comparison: Comparison, images: Tensor, labels: Tensor, progress: Progress) -> dict[str, Parity]:
    """Return the parity of mean loss and gradient of the patch embedding's weight, that is, through the whole model."""
    exact_model: Any = comparison.exact_model().train()
    weight, exact_weight = comparison.model.patch_embed.proj.weight, exact_model.patch_embed.proj.weight
    images, labels = images[: comparison.checked], labels[: comparison.checked]

    def difference(model: nn.Module, exact: Sequence[Tensor]) -> float:
        found = _loss_and_gradient(model, weight, images, labels)
        differences = [relative_difference(a[None], b[None].double()) for a, b in zip(found, exact, strict=True)]
        return math.nan if any(map(math.isnan, differences)) else max(differences)

    own = difference(comparison.model, _loss_and_gradient(exact_model, exact_weight, images, labels))
    parities = {}
    for done, entry in enumerate(comparison.entries):
        progress(f"checking the training of {entry.slug}", done, len(comparison.entries))
        if entry.method == "dynamicvit":
            exact = _loss_and_gradient(entry.plain, weight, images, labels)
            against = "the official algorithm with equal noise"
            parities[entry.slug] = Parity(against, difference(entry.model, exact), None, ALLOWED * own)
            continue
        plain = comparison.plain(exact_model, entry).train()
        exact = _loss_and_gradient(plain, exact_weight, images, labels)
        official = difference(entry.plain, exact)
        # A soft merge decides nothing; how far rounding takes its gradient, the official one shows.
        usual = max(own, official) if any(stage.soft for stage in entry.stages) else own
        found = Parity("float64", difference(entry.model, exact), official, ALLOWED * usual, entry.changed)
        if found.verdict == "red" and entry.changed is None:
            found.changed = _changed_decisions(comparison, entry, exact_model, images)
        parities[entry.slug] = found
    return parities


def _loss_and_gradient(model: nn.Module, weight: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = model(images.to(weight.dtype))
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.detach(), gradient


@torch.inference_mode()
def _changed_decisions(comparison: Comparison, entry: Entry, exact_model: nn.Module, images: Tensor) -> int:
    with record(entry.model) as seen:
        entry.model(images)
    return comparison.changed_decisions(entry, seen, exact_model.eval(), len(images))
