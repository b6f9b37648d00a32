"""ATS: sample tokens along the cumulated class attention (Fayyaz et al. 2022)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..arguments import switch
from ..ops import unchecked as ops
from ..tokens import Packing, Plan, Tokens
from .base import ModelShape, Reducer, ScheduledReducer
from .block import AttentionBlock, Heads, class_attention, is_captured, keep_tokens, needs_matrix
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
            ``torch.arange`` gives it a point more for some counts (:func:`official_points` knows which), so that an
            image may keep one token more; none of the paper's settings is among them. ``"exact"``: as many points as
            the schedule says.
        trim: cut the padding down to the longest image of the batch. That needs the number on the host: None does so
            in eager mode on the CPU, where it costs nothing; True everywhere but in a compiled graph; False never.
            Under ``torch.jit.trace`` True is refused, and so is ``packed``: the lengths of the example would stay.
            Logits do not depend on it, but for rounding: only with False has an image the same bits in every batch.
        packed: pad nothing: as soon as images keep different numbers, the tokens of all lie in one row behind each
            other, and every layer works on those that are there and on no other. Logits do not depend on it; attention
            dropout is refused in training. Where padding is not trimmed the row has room for the most that could be
            kept, which the kernels pass over; adapters, quantised layers and hooks see the whole row, (1, T, C). A
            graph of ``torch.export`` without kernels pads instead.
        backend: see :func:`fastreduce.backend`.
    """

    name = "ats"
    leaves_padding = True
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
        """Make one for a model with a class token, else refuse."""
        if not shape.has_class_token:
            raise ValueError("ats samples by the attention of the class token, and this model has none")
        return super().make(shape, **arguments)

    def counts(self, shape: ModelShape) -> list[int]:
        """Return the most patch tokens that an image can keep after each stage."""
        counts, present = [], shape.patches
        for stage in range(len(self.blocks)):
            present = min(present, self._points(stage, shape.patches))
            counts.append(present)
        return counts

    def _points(self, stage: int, patches: int) -> int:
        """Return the number of sampling points of a stage."""
        count = self.schedule.count(stage, patches)
        return official_points(count + 1) if self.points == "official" else count

    def _sample(self, scores: Tensor, tokens: Tokens, stage: int) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, M) that an image keeps, at most all, and which columns (B, prefix + M) are real."""
        count, points = self.schedule.count(stage, tokens.patches), self._points(stage, tokens.patches)
        prefix, most = tokens.prefix, tokens.num_patches
        index, valid = ops.sample_tokens(scores, points, prefix=prefix, parts=count + 1, backend=tokens.backend)
        return (index, valid) if points <= most else (index[:, :most], valid[:, : prefix + most])

    def _trims(self, index: Tensor) -> bool:
        """Return whether the host may wait for numbers."""
        trim = self.trim if self.trim is not None else index.device.type == "cpu"
        if torch.jit.is_tracing():
            self._check_traced()
            return False
        return trim and not is_captured() and not _has_no_values(index) and len(index) > 0

    def _check_traced(self) -> None:
        """Raise where ``torch.jit.trace`` would make constants of how many tokens the example's images keep."""
        if self.trim or self.packed:
            option = "packed" if self.packed else "trim"
            raise ValueError(
                f"torch.jit.trace would keep the lengths of the example's images: patch the model with {option}=False"
            )

    def _without_padding(self, index: Tensor, valid: Tensor, prefix: int) -> tuple[Tensor, Tensor | None]:
        """Cut columns that are padding in every image; no ``valid`` where nothing else is left to mask."""
        if not self._trims(index):
            return index, valid
        longest = int(valid.sum(1).max())
        valid = valid[:, :longest]
        whole = len(valid) == 1 or bool(valid.all())
        return index[:, : longest - prefix], None if whole else valid

    def attend(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Run the attention half with sampling; the kept tokens come out in ascending position, padding behind them."""
        heads = block.heads(tokens, "select")
        index, valid = self._sample(_scores(heads), tokens, stage)
        index, seen = self._without_padding(index, valid, tokens.prefix)
        packs = self.packed and seen is not None and not _stays_padded(tokens.backend, index)
        if tokens.packing is not None or packs:
            return self._keep_packed(block, tokens, heads, index, seen)
        x, normed = keep_tokens(block, heads, index)
        bias = None if seen is None else seen.float().log()  # 0 and -inf
        return tokens.reduced(x, _plan(block, tokens, index, seen), normed=normed, bias=bias, valid=seen)

    def _keep_packed(
        self, block: AttentionBlock, tokens: Tokens, heads: Heads, index: Tensor, seen: Tensor | None
    ) -> Tokens:
        """Attend for the kept tokens over packed keys and add their residual, in one row."""
        before = tokens.x if tokens.inputs is None else tokens.unpacked().x
        heads = _in_one_row(heads)
        keys, packing = heads.tokens.packed()
        longest = keys.prefix + index.shape[1]
        valid = index.new_ones(len(index), longest, dtype=torch.bool) if seen is None else seen
        offsets = ops.token_offsets(valid, backend=keys.backend)
        queries = Packing(offsets, longest)
        rows = int(offsets[-1]) if self._trims(index) else len(index) * longest
        x, residual = keys.x, None
        if heads.added is None:
            residual = block.branch(block.attend(heads, index, queries=queries, rows=rows), queries)
        else:
            x = x + heads.added
        x = ops.gather_packed(
            x,
            index,
            (packing.offsets, offsets),
            num_out=rows,
            prefix=keys.prefix,
            residual=residual,
            backend=keys.backend,
        )
        return keys.reduced(x, _plan(block, keys, index, seen), valid=seen, packing=queries, before=before)


def _stays_padded(backend: str, index: Tensor) -> bool:
    """Return whether tokens cannot be packed, since PyTorch's operators cannot know how many rows there are.

    So it is in an exported graph, under transforms of torch.func, and with tensors of shapes alone.
    """
    unknown = torch.compiler.is_exporting() or torch._C._functorch.peek_interpreter_stack() is not None
    return backend == "reference" and (unknown or _has_no_values(index))


def _has_no_values(tensor: Tensor) -> bool:
    """Return whether a tensor has a shape and no numbers, as on the meta device and in ``FakeTensorMode``."""
    return tensor.device.type == "meta" or (not torch.compiler.is_compiling() and isinstance(tensor, FakeTensor))


def _scores(heads: Heads) -> Tensor:
    """Return the class attention (B, N - prefix) summed over heads, times the length of each value."""
    tokens, packing, q = heads.tokens, heads.tokens.packing, heads.q
    if needs_matrix(heads):
        return (class_attention(heads) * heads.v[:, :, tokens.prefix :].norm(dim=-1)).sum(1)
    options: dict[str, Any] = {"prefix": tokens.prefix, "scale": heads.scale, "backend": tokens.backend}
    if packing is None:
        return ops.cls_value_scores(q[:, :, 0], heads.k, heads.v, valid=tokens.valid, **options)
    rows = q[0] if q.shape[2] < heads.k.shape[2] else q[0].index_select(1, packing.offsets[:-1])
    place = packing.offsets, packing.longest
    return ops.cls_value_scores_packed(rows.transpose(0, 1), heads.k, heads.v, *place, **options)


def _in_one_row(heads: Heads) -> Heads:
    """Return the same with the tokens of all images in one row, (1, H, B * N, D) each; of a packed projection views."""
    if heads.tokens.packing is not None:
        return heads

    def row(part: Tensor) -> Tensor:
        return part.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)

    tokens, _ = heads.tokens.packed()
    normed = heads.normed.reshape(1, -1, heads.normed.shape[2])
    added = None if heads.added is None else heads.added.reshape(1, -1, heads.added.shape[2])
    q, k, v = row(heads.q), row(heads.k), row(heads.v)
    return heads._replace(tokens=tokens, normed=normed, q=q, k=k, v=v, added=added)


def _plan(block: AttentionBlock, tokens: Tokens, index: Tensor, seen: Tensor | None) -> Plan:
    """Return what a stage decided, the same for packed tokens and padded ones."""
    valid = None if seen is None else seen[:, tokens.prefix :]
    return Plan(block.index, tokens.num_patches, index.shape[1], kept=index, valid=valid)
