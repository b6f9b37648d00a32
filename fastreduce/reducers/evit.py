"""EViT: Top-K, and one more token that fuses all the others by their scores (Liang et al. 2022)."""

from __future__ import annotations

import torch

from ..arguments import switch
from ..ops import unchecked as ops
from ..tokens import Plan, Tokens
from .base import ModelShape, ScheduledReducer
from .block import AttentionBlock, attend_all, attend_with_importance, fuse, importance
from .schedule import KeepSchedule

__all__ = ["EViT"]


class EViT(ScheduledReducer):
    """Attend for all, then project only the kept rows and the fused one.

    Of a padded image with nothing to fuse the fused token is padding too.

    Args:
        blocks: where the stages stand.
        schedule: tokens kept at each stage; the fused token comes on top.
        normalize: weigh the fused token's parts by score / (sum of their scores), as the method's paper writes it.
            The default, raw scores, is what the released code computes.
        backend: see :func:`fastreduce.backend`.
    """

    name = "evit"
    leaves_padding = True

    def __init__(self, blocks: tuple[int, ...], schedule: KeepSchedule, normalize: bool = False, backend: str = "auto"):
        super().__init__(blocks, schedule, backend)
        self.normalize = switch("normalize", normalize)

    def counts(self, shape: ModelShape) -> list[int]:
        """Patch tokens after each stage, the fused one included."""
        counts, present = [], shape.patches
        for stage in range(len(self.blocks)):
            present = min(present, self.schedule.count(stage, shape.patches) + 1)
            counts.append(present)
        return counts

    def attend(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Run the attention half with fusion: prefix, kept tokens best first, fused token."""
        keep = self.schedule.count(stage, tokens.patches)
        if keep >= tokens.num_patches:
            return attend_all(block, tokens)
        prefix, backend = tokens.prefix, tokens.backend
        heads = block.heads(tokens, "merge" if self.normalize else "sum")
        if heads.added is None:
            attended, scores = attend_with_importance(block, heads)
        else:
            scores = importance(heads)
        order = ops.select_topk(scores, tokens.num_patches, backend=backend)
        if self.normalize:
            rest = scores.gather(1, order[:, keep:].long()).sum(1, keepdim=True)
            scores = scores / (rest if tokens.valid is None else rest.clamp_min(torch.finfo(rest.dtype).tiny))
        x, added = tokens.x, {}
        if heads.added is None:
            fused = ops.fuse_tokens(attended, order, scores, keep, prefix=prefix, backend=backend)
            bias = None if self.normalize else block.branch_bias  # normalised weights sum to one
            added = {"residual": block.branch(fused), "residual_bias": bias}
        else:
            x = x + heads.added
        x, normed = fuse(block.mlp_norm(tokens), x, order, scores, keep, prefix=prefix, **added, backend=backend)
        plan = Plan(block.index, tokens.num_patches, keep + 1, kept=order[:, :keep], fused=True)
        return tokens.reduced(x, plan, normed=normed)
