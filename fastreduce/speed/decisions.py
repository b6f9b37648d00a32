"""Decisions and logits of two models, held against each other, and what there is to draw of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..integrations.timm import Record, Stage

__all__ = ["Drawn", "changed_decisions", "drawn", "partition", "relative_difference"]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A picture of one stage for the first image: exactly one of the two is given.

    Attributes:
        block: the transformer block, ``count`` its patch tokens after the stage.
        kept: (rows, columns) bool, patches that are still tokens of their own; of a soft merge those that weigh most in
            one of the tokens.
        soft: whether it is a soft merge.
        slot: (rows, columns) the token that each patch is in.
    """

    block: int
    count: int
    kept: NDArray[np.bool_] | None = None
    slot: NDArray[np.int64] | None = None
    soft: bool = False


def relative_difference(logits: Tensor, exact: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value."""
    logits = logits[: len(exact)].double()
    return ((logits - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def partition(stage: Stage) -> Tensor:
    """Name every patch's group (B, P) by its first patch, -1 for dropped ones: the tokens' order does not matter."""
    slot = stage.patch_slot
    position = torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
    first = torch.full((slot.shape[0], stage.num_out + 1), slot.shape[1], device=slot.device)
    first = first.scatter_reduce(1, slot + 1, position, "amin")
    return torch.where(slot < 0, slot, first.gather(1, slot + 1))


def changed_decisions(ours: Record, exact: Record, images: int) -> int:
    """Return how many of the images end in other groups than in float64."""
    if not exact.stages:
        return 0
    differs = torch.zeros(images, dtype=torch.bool, device=exact.stages[0].slot.device)
    for mine, theirs in zip(ours.stages, exact.stages, strict=True):
        differs |= (partition(mine)[:images] != partition(theirs)[:images]).any(1)
    return int(differs.sum())


def drawn(seen: Record, blocks: Sequence[int], grid: tuple[int, int]) -> list[Drawn]:
    """Return the first image's stages; a stage that reduced nothing shows what was there."""
    kept: NDArray[np.bool_] | None = np.ones(grid, bool)
    slot: NDArray[np.int64] | None = None
    count, soft = math.prod(grid), False
    stages = {stage.block: stage for stage in seen.stages}
    drawn = []
    for block in blocks:
        if (stage := stages.get(block)) is not None:
            soft = stage.weights is not None
            if stage.merges or stage.sources is None:
                kept, slot, count = None, stage.patch_slot[0].cpu().numpy().reshape(grid), stage.num_out
            else:
                own, fused = stage.sources[0].cpu().numpy(), stage.fused
                kept, slot = np.zeros(math.prod(grid), bool), None
                kept[own[own >= 0]] = True
                kept, count = kept.reshape(grid), stage.num_out if soft or fused else int((own >= 0).sum())
        drawn.append(Drawn(block, count, kept, slot, soft))
    return drawn
