"""Decisions of an exported model's stages, to be held against the decisions in eager mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..recording import patched_model, record
from ..tokens import Plan

__all__ = ["Decided", "Kind", "differing", "settled"]


class Kind(NamedTuple):
    """Tensors that say what one stage decided.

    Attributes:
        kept: whether the indices of kept tokens, or of centres, are among them.
        slot: whether the output slot of every token is.
        num_in: patch tokens before the stage.
        fused: whether one more token follows the kept ones, made of all the others.
    """

    kept: bool
    slot: bool
    num_in: int
    fused: bool = False


def _tensors(plan: Plan, batch: int) -> list[Tensor]:
    """Return what a stage decided, as it is: the kept tokens (B, K), -1 for padding, and the slots (B, N)."""
    found = [] if plan.kept is None else [plan._kept(batch).contiguous()]
    return found if plan.slot is None else [*found, plan.slot]


class Decided(nn.Module):
    """A patched model that also returns what its stages decided: the result, then one or two tensors a stage.

    A soft merge decides nothing, and adds none.

    Args:
        model: a patched model.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        patched_model(model)
        self.kinds: list[Kind] = []
        self.training = model.training

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the model and keep in ``kinds`` what the tensors after its result are."""
        with record(self.model) as seen:
            result = self.model(images)
        plans = [plan for plan in seen._plans if plan.weights is None]
        self.kinds = [Kind(plan.kept is not None, plan.slot is not None, plan.num_in, plan.fused) for plan in plans]
        return (result, *(one for plan in plans for one in _tensors(plan, images.shape[0])))


def settled(tensors: Sequence[Tensor], kinds: Sequence[Kind]) -> list[Tensor]:
    """Put the tensors of :class:`Decided` into a form that does not depend on the order of kept tokens.

    Two kept tokens of nearly equal scores may change places, in one stage, without any effect on the result. Later
    stages then see them in another order, so decisions are told in the order of the patches that the tokens were.

    Returns:
        One tensor (B, N) a stage: of a selection whether a token is kept, of a clustering the centre of every token,
        of a matching the slot of every token.
    """
    rest, found = list(tensors), []
    labels: Tensor | None = None  # (B, N): the patch that each token was; of fused tokens a number of their own
    for stage, kind in enumerate(kinds):
        kept = rest.pop(0).long() if kind.kept else None
        slot = rest.pop(0).long() if kind.slot else None
        if kept is None:  # a matching leaves tokens in an order of its own, whatever their scores
            assert slot is not None
            found.append(slot[:, slot.shape[1] - kind.num_in :])  # without the prefix, which no matching touches
            continue
        if labels is None:
            labels = torch.arange(kind.num_in).expand(len(kept), -1)
        labels = pad(labels, (0, kind.num_in - labels.shape[1]), value=-1)
        if slot is None:
            marks = torch.zeros(len(kept), kind.num_in + 1, dtype=torch.int64)
            decision = marks.scatter_(1, kept.remainder(kind.num_in + 1), 1)[:, : kind.num_in]
        else:
            decision = labels.gather(1, kept).gather(1, slot)
        found.append(decision.gather(1, labels.argsort(dim=1, stable=True)))
        labels = torch.where(kept < 0, -1, labels.gather(1, kept.clamp_min(0)))
        if kind.fused:
            labels = pad(labels, (0, 1), value=kinds[0].num_in + stage)
    return found


def differing(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[int, int]:
    """Count the decisions (one a token and stage) that differ, and all of them.

    From the first stage on that differs in an image, tokens are others, so its later stages are not counted.
    """
    wrong = total = 0
    alike: Tensor | None = None
    for one, other in zip(ours, theirs, strict=True):
        differ = one != other
        alike = torch.ones(len(one), dtype=torch.bool) if alike is None else alike
        wrong += int(differ[alike].sum())
        total += differ[alike].numel()
        alike = alike & ~differ.any(1)
    return wrong, total
