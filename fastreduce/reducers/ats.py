"""ATS: sample tokens along the cumulated class attention (Fayyaz et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..tokens import Plan, Tokens
from .base import AttentionBlock, ModelShape, Reducer, ScheduledReducer
from .schedule import KeepSchedule

__all__ = ["ATS"]


class ATS(ScheduledReducer):
    """Sample before attention: only sampled tokens are queried, attended, projected and added; all keys, values stay.

    Every image keeps the tokens that its own attention calls for, at most as many as the schedule says. Shorter images
    are padded; ``Tokens.valid`` keeps the padding out of every attention.

    Args:
        blocks: where the stages stand.
        schedule: sampling points of each stage, the most that an image can keep.
        trim: cut the padding down to the longest image of the batch. That needs the number on the host: None does so
            in eager mode on the CPU, where it costs nothing; True everywhere but in a compiled graph; False never.
            Logits do not depend on it.
        backend: see :func:`fastreduce.backend`.
    """

    name = "ats"
    ragged = True

    def __init__(
        self, blocks: tuple[int, ...], schedule: KeepSchedule, trim: bool | None = None, backend: str = "auto"
    ):
        super().__init__(blocks, schedule, backend)
        if trim is not None and not isinstance(trim, bool):
            raise TypeError(f"trim must be True, False or None, got {trim!r}")
        self.trim = trim

    @classmethod
    def make(cls, shape: ModelShape, /, **arguments: Any) -> Reducer:
        """Needs a class token."""
        if not shape.has_class_token:
            raise ValueError("ats samples by the attention of the class token, and this model has none")
        return super().make(shape, **arguments)

    def _without_padding(self, index: Tensor, valid: Tensor, prefix: int) -> tuple[Tensor, Tensor | None]:
        """Cut columns that are padding in every image; no ``valid`` where nothing else is left to mask."""
        trim = self.trim if self.trim is not None else index.device.type == "cpu"
        if not trim or torch.compiler.is_compiling() or index.device.type == "meta" or not len(index):
            return index, valid
        longest = int(valid.sum(1).max())
        valid = valid[:, :longest]
        return index[:, : longest - prefix], None if bool(valid.all()) else valid

    def attend(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Attention half with sampling; the kept tokens come out in ascending position, padding behind them."""
        prefix, backend = tokens.prefix, self.backend
        normed = block.norm(tokens.x)
        q, k, v = block.early_query_key_value(normed)
        scores = ops.cls_scores(
            q[:, :, 0], k, prefix=prefix, scale=block.scale, value=v, valid=tokens.valid, backend=backend
        )
        budget = self.schedule.count(stage, tokens.patches)
        index, valid = ops.sample_tokens(scores, budget, prefix=prefix, backend=backend)
        index, seen = self._without_padding(index, valid, prefix)
        attended = block.attend_kept(q, k, v, normed, index, tokens)
        x = ops.gather_tokens(tokens.x, index, prefix=prefix, residual=block.branch(attended), backend=backend)
        plan = Plan(
            block.index,
            tokens.num_patches,
            index.shape[1],
            kept=index,
            valid=None if seen is None else seen[:, prefix:],
        )
        return tokens.replace(x, valid=seen, plans=(*tokens.plans, plan))
