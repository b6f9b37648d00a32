"""Base of SiT, PatchMerger and Sinkhorn: every output token is a weighted sum of all tokens, by learned weights."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import counted
from ..backends import Resolved
from ..ops import unchecked as ops
from ..tokens import Plan, SoftWeights, Tokens
from .base import ModelShape, Reducer
from .block import AttentionBlock
from .schedule import Keep, KeepRate, KeepSchedule

__all__ = ["LOGITS", "SoftReducer"]

LOGITS = 1 << 20  # of an image that are in memory at a time if more are not kept


class SoftReducer(Reducer):
    """A reducer with a layer for every stage, made for a fixed number of output tokens.

    A keep rate of 1 mixes the tokens too, unlike a method that selects.
    """

    def __init__(self, blocks: tuple[int, ...], schedule: KeepSchedule, shape: ModelShape, backend: str = "auto"):
        super().__init__(blocks, backend)
        self.clusters = tuple(schedule.count(stage, shape.patches) for stage in range(len(blocks)))

    @classmethod
    def make(cls, shape: ModelShape, /, **arguments: Any) -> Reducer:
        """Make a layer; the number of output tokens is fixed for the model's own grid."""
        return super().make(shape, shape=shape, **arguments)

    def counts(self, shape: ModelShape) -> list[int]:
        """Patch tokens after each stage."""
        return list(self.clusters)

    def reschedule(
        self,
        shape: ModelShape,
        *,
        keep_rate: KeepRate = None,
        keep: Keep = None,
        at: int | Sequence[int] | None = None,
    ) -> None:
        """Refuse: the layers have an output for every token."""
        raise ValueError(
            f"{self.name} has layers made for {list(self.clusters)} tokens, got {keep_rate=!r}, {keep=!r}: "
            "call fastreduce.unpatch, patch with the new rate and train again"
        )

    @abc.abstractmethod
    def merge(self, tokens: Tokens, stage: int) -> tuple[Tensor, SoftWeights]:
        """Merge tokens (B, prefix + N, C) into (B, prefix + clusters, C); return the weights too.

        Layers are applied to the prefix too, whose rows are left out afterwards: cut off before, the rest would be
        copied.
        """

    def in_blocks(self, x: Tensor, stage: int) -> bool:
        """Return whether to do some clusters at a time.

        It is the same with a gradient and without, so that both give the same bits.
        """
        return x.shape[1] * self.clusters[stage] > LOGITS

    def merge_all(self, logits: Tensor, x: Tensor, head: Tensor, backend: Resolved) -> tuple[Tensor, SoftWeights]:
        """Put weighted means of x (B, N, C) behind the head (B, prefix, C), by a softmax of logits (B, N, clusters)."""
        merged, logsumexp = ops.soft_merge(logits, x, head=head, backend=backend)
        return merged, SoftWeights(logits, logsumexp=logsumexp)

    def merge_blocks(
        self, logits: Callable[[slice], Tensor], count: int, x: Tensor, head: Tensor, backend: Resolved
    ) -> tuple[Tensor, SoftWeights]:
        """Merge some clusters after the others, which do not depend on one another; no logits are kept."""
        size = max(1, LOGITS // x.shape[1])
        merged, logsumexp = [head], []
        for start in range(0, count, size):
            rows, sums = ops.soft_merge(logits(slice(start, start + size)), x, backend=backend)
            merged.append(rows)
            logsumexp.append(sums)

        def again() -> Tensor:
            with torch.no_grad():
                return logits(slice(None))

        return torch.cat(merged, dim=1), SoftWeights(again, logsumexp=torch.cat(logsumexp, dim=1))

    def before(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Merge softly; the prefix stays."""
        count = self.clusters[stage]
        if count > tokens.num_patches:
            raise ValueError(
                f"{self.name} was made for {counted(count, 'token')} after block {self.blocks[stage]}, "
                f"but only {tokens.num_patches} come in of {counted(tokens.patches, 'patch')}: the image is too small, "
                "patch a model of this image size"
            )
        x, weights = self.merge(tokens, stage)
        plan = Plan(self.blocks[stage], tokens.num_patches, count, weights=weights.detach())
        return tokens.reduced(x, plan)
