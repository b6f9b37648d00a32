"""ATS: sample tokens along the cumulated class attention (Fayyaz et al. 2022)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..arguments import switch
from ..ops import unchecked as ops
from ..tokens import Packing, Plan, Tokens
from .base import AttentionBlock, ModelShape, Reducer, ScheduledReducer, early_heads, gather, is_captured
from .schedule import KeepSchedule

__all__ = ["ATS", "official_points"]


def official_points(parts: int) -> int:
    """Return how many points ``torch.arange(1 / (2 K), (2 K - 1) / (2 K), 2 / (2 K))`` has: K - 1, or K by rounding."""
    start, end, step = 1 / (2 * parts), (2 * parts - 1) / (2 * parts), 2 / (2 * parts)
    return max(1, math.ceil((end - start) / step))


class ATS(ScheduledReducer):
    """Sample before attention: only sampled tokens are queried, attended, projected and added; all keys, values stay.

    Every image keeps the tokens that its own attention calls for, at most as many as the schedule says. Shorter images
    are padded; ``Tokens.valid`` keeps the padding out of every attention.

    Args:
        blocks: where the stages stand.
        schedule: sampling points of each stage, the most that an image can keep.
        points: where the cumulated attention is looked up. ``"official"``, as the released code: the rounding of
            ``torch.arange`` gives it a point more for some counts (METHODS.md has which), so that an image may keep one
            token more; none of the paper's settings is among them. ``"exact"``: as many points as the schedule says.
        trim: cut the padding down to the longest image of the batch. That needs the number on the host: None does so
            in eager mode on the CPU, where it costs nothing; True everywhere but in a compiled graph; False never.
            Logits do not depend on it, but for rounding: only with False has an image the same bits in every batch.
        packed: pad nothing: as soon as images keep different numbers, the tokens of all lie in one row behind each
            other, and every layer works on those that are there and on no other. Logits do not depend on it; attention
            dropout is refused in training. Where padding is not trimmed the row has room for the most that could be
            kept, which the kernels pass over; adapters, quantised layers and hooks see the whole row, (1, T, C).
        backend: see :func:`fastreduce.backend`.
    """

    name = "ats"
    ragged = True

    def __init__(
        self,
        blocks: tuple[int, ...],
        schedule: KeepSchedule,
        trim: bool | None = None,
        packed: bool = False,
        points: Literal["official", "exact"] = "official",
        backend: str = "auto",
    ):
        super().__init__(blocks, schedule, backend)
        if trim is not None and not isinstance(trim, bool):
            raise TypeError(f"trim must be True, False or None, got {trim!r}")
        if points not in ("official", "exact"):
            raise ValueError(f"points must be 'official' or 'exact', got {points!r}")
        self.trim, self.packed, self.points = trim, switch("packed", packed), points

    @classmethod
    def make(cls, shape: ModelShape, /, **arguments: Any) -> Reducer:
        """Needs a class token."""
        if not shape.has_class_token:
            raise ValueError("ats samples by the attention of the class token, and this model has none")
        return super().make(shape, **arguments)

    def counts(self, shape: ModelShape) -> list[int]:
        """Most patch tokens that an image can keep after each stage."""
        counts, present = [], shape.patches
        for stage in range(len(self.blocks)):
            present = min(present, self._points(stage, shape.patches))
            counts.append(present)
        return counts

    def _points(self, stage: int, patches: int) -> int:
        """Sampling points of a stage."""
        count = self.schedule.count(stage, patches)
        return official_points(count + 1) if self.points == "official" else count

    def _sample(self, scores: Tensor, tokens: Tokens, stage: int) -> tuple[Tensor, Tensor]:
        """Which tokens an image keeps (B, M), and which columns are real (B, prefix + M): no more than are there."""
        count, points = self.schedule.count(stage, tokens.patches), self._points(stage, tokens.patches)
        prefix, most = tokens.prefix, tokens.num_patches
        index, valid = ops.sample_tokens(scores, points, prefix=prefix, parts=count + 1, backend=tokens.backend)
        return (index, valid) if points <= most else (index[:, :most], valid[:, : prefix + most])

    def _trims(self, index: Tensor) -> bool:
        """Whether the host may wait for numbers."""
        trim = self.trim if self.trim is not None else index.device.type == "cpu"
        return trim and not is_captured() and index.device.type != "meta" and len(index) > 0

    def _without_padding(self, index: Tensor, valid: Tensor, prefix: int) -> tuple[Tensor, Tensor | None]:
        """Cut columns that are padding in every image; no ``valid`` where nothing else is left to mask."""
        if not self._trims(index):
            return index, valid
        longest = int(valid.sum(1).max())
        valid = valid[:, :longest]
        return index[:, : longest - prefix], None if bool(valid.all()) else valid

    def attend(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Attention half with sampling; the kept tokens come out in ascending position, padding behind them."""
        if tokens.packing is not None:
            return self._attend_packed(block, tokens, tokens.packing, stage)
        prefix, backend = tokens.prefix, tokens.backend
        tokens, normed, (q, k, v), late = early_heads(block, tokens)
        scores = ops.cls_value_scores(
            q[:, :, 0], k, v, prefix=prefix, scale=block.scale, valid=tokens.valid, backend=backend
        )
        index, valid = self._sample(scores, tokens, stage)
        index, seen = self._without_padding(index, valid, prefix)
        if self.packed and seen is not None:
            keys, packing = tokens.packed()
            rows = normed.reshape(1, -1, normed.shape[2])
            row_q, row_k, row_v = (_in_one_row(heads) for heads in (q, k, v))
            return self._keep_packed(block, keys, packing, rows, row_q, row_k, row_v, index, seen, late)
        residual = block.branch(block.attend_kept(q, k, v, normed, index, tokens)) if late else None
        x, following = gather(
            block.mlp_norm(tokens), tokens.x, index, prefix=prefix, residual=residual, backend=backend
        )
        bias = None if seen is None else seen.log()  # 0 and -inf
        plans = (*tokens.plans, _plan(block, tokens, index, seen))
        return tokens.replace(x, normed=following, bias=bias, valid=seen, plans=plans)

    def _attend_packed(self, block: AttentionBlock, tokens: Tokens, packing: Packing, stage: int) -> Tokens:
        """The same on tokens of all images in one row, from which one comes out."""
        prefix, backend = tokens.prefix, tokens.backend
        tokens, normed, (q, k, v), late = early_heads(block, tokens)
        class_rows = q[0] if q.shape[2] < normed.shape[1] else q[0].index_select(1, packing.offsets[:-1])
        scores = ops.cls_value_scores_packed(
            class_rows.transpose(0, 1),
            k,
            v,
            packing.offsets,
            packing.longest,
            prefix=prefix,
            scale=block.scale,
            backend=backend,
        )
        index, valid = self._sample(scores, tokens, stage)
        index, seen = self._without_padding(index, valid, prefix)
        return self._keep_packed(block, tokens, packing, normed, q, k, v, index, seen, late)

    def _keep_packed(
        self,
        block: AttentionBlock,
        keys: Tokens,
        packing: Packing,
        normed: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        seen: Tensor | None,
        late: bool,
    ) -> Tokens:
        """Attention of the kept tokens over packed keys, and their sum with what they were."""
        longest = keys.prefix + index.shape[1]
        valid = index.new_ones(len(index), longest, dtype=torch.bool) if seen is None else seen
        offsets = ops.token_offsets(valid, backend=keys.backend)
        queries = Packing(offsets, longest)
        rows = int(offsets[-1]) if self._trims(index) else len(index) * longest
        if block.rowwise:
            x, residual = (
                keys.x,
                block.branch(block.attend_packed(q, k, v, normed, index, keys, queries, rows), queries),
            )
        else:
            x, residual = keys.x + block.branch(block.attention(q, k, v, normed, keys), packing), None
        x = ops.gather_packed(
            keys.x,
            index,
            (packing.offsets, offsets),
            num_out=rows,
            prefix=keys.prefix,
            residual=residual,
            backend=keys.backend,
        )
        plans = (*keys.plans, _plan(block, keys, index, seen))
        return keys.replace(x, valid=seen, plans=plans, packing=queries)


def _in_one_row(heads: Tensor) -> Tensor:
    """(B, H, N, D) -> (1, H, B * N, D), of a packed projection a view."""
    return heads.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)


def _plan(block: AttentionBlock, tokens: Tokens, index: Tensor, seen: Tensor | None) -> Plan:
    """What a stage decided, the same for packed tokens and padded ones."""
    valid = None if seen is None else seen[:, tokens.prefix :]
    return Plan(block.index, tokens.num_patches, index.shape[1], kept=index, valid=valid)
