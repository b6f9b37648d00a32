"""Static radial patterns: keep what lies near the centre of the image (Haurum et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..tokens import Plan, Tokens
from .base import AttentionBlock, ModelShape, Reducer, gather
from .schedule import Keep, KeepRate, KeepSchedule, keep_schedule, stage_blocks

__all__ = ["Radial", "contiguous_radii", "radii_of_counts", "ring_radius"]

Norm = Literal["l1", "l2", "linf"]


def ring_radius(grid: tuple[int, int], norm: str) -> Tensor:
    """(P,) float32: norm of every patch's coordinates, in the released code's own rounding (equal rings may split)."""
    y, x = torch.meshgrid(*(torch.linspace(-size // 2, size // 2, size) for size in grid), indexing="ij")
    if norm == "l1":
        radius = y.abs() + x.abs()
    elif norm == "l2":
        radius = torch.sqrt(y**2 + x**2)
    elif norm == "linf":
        radius = torch.maximum(y.abs(), x.abs())
    else:
        raise ValueError(f"norm must be 'l1', 'l2' or 'linf', got {norm!r}")
    return radius.flatten()


def contiguous_radii(radius: Tensor, grid: tuple[int, int], first: int, last: int, min_radius: float) -> Tensor:
    """(last - first + 1,) radius of every block from ``first`` to ``last``: from the corner down towards min_radius."""
    centre = radius.view(grid)[grid[0] // 2, grid[1] // 2].item()
    smallest = min_radius if min_radius > 0 else centre
    points = torch.linspace(radius[0].item(), smallest, last - first + 3)
    offset = 0 if first == 0 else 1
    return points[offset : offset + last - first + 1]


def radii_of_counts(radius: Tensor, counts: list[int]) -> Tensor:
    """(stages,) the radius whose disc comes nearest to each wanted number of patches, the smaller on a tie."""
    values = torch.unique(radius)
    held = (radius.unsqueeze(0) <= values.unsqueeze(1)).sum(1)  # (R,)
    nearest = (held.unsqueeze(0) - torch.tensor(counts).unsqueeze(1)).abs().argmin(1)
    return values[nearest]


class Radial(Reducer):
    """Drop, before a block, every patch outside a radius; the same patches for every image.

    Args:
        blocks: where the stages stand (``"contiguous"``: the first and the last of them, and all between).
        shape: the model's grid decides the patterns.
        schedule: wanted counts for ``"stages"``, None for ``"contiguous"``.
        norm: ``"l1"``, ``"l2"`` or ``"linf"``.
        min_radius: where a contiguous schedule shrinks to; 0 or less means the centre cell's own radius.
        backend: see :func:`fastreduce.backend`.
    """

    name = "radial"

    def __init__(
        self,
        blocks: tuple[int, ...],
        shape: ModelShape,
        schedule: KeepSchedule | None,
        norm: Norm = "l2",
        min_radius: float = 1.0,
        backend: str = "auto",
    ):
        if isinstance(min_radius, bool) or not isinstance(min_radius, (int, float)):
            raise TypeError(f"min_radius must be a number, got {min_radius!r}")
        if not math.isfinite(min_radius):
            raise ValueError(f"min_radius must be finite, got {min_radius}")
        radius = ring_radius(shape.grid, norm)
        if schedule is None:
            radii = contiguous_radii(radius, shape.grid, blocks[0], blocks[-1], float(min_radius))
            blocks = tuple(range(blocks[0], blocks[-1] + 1))
        else:
            radii = radii_of_counts(radius, [schedule.count(stage, shape.patches) for stage in range(len(blocks))])
        super().__init__(blocks, backend)
        self.norm = norm
        present = torch.arange(shape.patches)
        for stage, limit in enumerate(radii):
            inside = (radius[present] <= limit).nonzero().squeeze(1)
            if not len(inside):
                raise ValueError(f"stage {stage} would keep no patch: no centre lies within {limit.item():.3g}")
            present = present[inside]
            # Not persistent: checkpoint keys stay those of the model.
            self.register_buffer(f"kept_{stage}", inside, persistent=False)
        self.grid = shape.grid

    @classmethod
    def make(
        cls,
        shape: ModelShape,
        /,
        *,
        at: int | Sequence[int] | None,
        keep_rate: KeepRate,
        keep: Keep,
        backend: str,
        schedule: Literal["contiguous", "stages"] | None = None,
        **options: Any,
    ) -> Radial:
        """``schedule=None`` means ``"stages"`` where a keep rate or count is given, else ``"contiguous"``."""
        blocks = stage_blocks(at, shape.depth)
        given = keep_rate is not None or keep is not None
        chosen = schedule if schedule is not None else ("stages" if given else "contiguous")
        if chosen not in ("contiguous", "stages"):
            raise ValueError(f"schedule must be 'contiguous' or 'stages', got {schedule!r}")
        if chosen == "contiguous":
            if given:
                raise ValueError(
                    f"a contiguous radial schedule has no keep rate, got keep_rate={keep_rate!r} and keep={keep!r}"
                )
            return cls(blocks, shape, None, backend=backend, **options)
        if "min_radius" in options:
            raise ValueError(
                f"min_radius belongs to the contiguous schedule, got {options['min_radius']!r} with 'stages'"
            )
        wanted = keep_schedule(keep_rate, keep, len(blocks), shape.patches)
        return cls(blocks, shape, wanted, backend=backend, **options)

    def _kept(self, stage: int) -> Tensor:
        return self.get_buffer(f"kept_{stage}")

    def counts(self, shape: ModelShape) -> list[int]:
        """Patch tokens after each stage."""
        return [len(self._kept(stage)) for stage in range(len(self.blocks))]

    def before(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Gather the patches inside the radius, in ascending position."""
        kept = self._kept(stage)
        if len(kept) == tokens.num_patches:
            return tokens
        index = kept.expand(tokens.x.shape[0], -1)
        x, normed = gather(block.attention_norm(tokens.x), tokens.x, index, prefix=tokens.prefix, backend=self.backend)
        plan = Plan(self.blocks[stage], tokens.num_patches, len(kept), kept=kept)
        return tokens.replace(x, normed=normed, plans=(*tokens.plans, plan))
