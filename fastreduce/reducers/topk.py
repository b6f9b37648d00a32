"""Top-K: keep the tokens that the class token attends to most (Haurum et al. 2023)."""

from __future__ import annotations

from .. import ops
from ..tokens import Plan, Tokens
from .base import AttentionBlock, ScheduledReducer, attend_all, importance

__all__ = ["TopK"]


class TopK(ScheduledReducer):
    """Select before attention: only kept tokens are queried, attended, projected and added; all keys, values stay."""

    name = "topk"

    def attend(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Attention half with selection; the kept tokens come out best first."""
        keep = self.schedule.count(stage, tokens.patches)
        if keep >= tokens.num_patches:
            return attend_all(block, tokens)
        prefix, backend = tokens.prefix, self.backend
        normed = block.norm(tokens.x)
        k, v = block.key_value(normed)
        q = block.query(normed[:, :1] if block.has_class_token else normed)
        scores = importance(block, q, k, prefix, backend=backend)
        kept = ops.select_topk(scores, keep, backend=backend)  # (B, keep)
        rows = ops.gather_tokens(normed, kept, prefix=prefix, backend=backend)  # (B, prefix + keep, C)
        attended = block.attention(block.query(rows), k, v, rows, tokens)
        x = ops.gather_tokens(tokens.x, kept, prefix=prefix, residual=block.branch(attended), backend=backend)
        plan = Plan(block.index, tokens.num_patches, keep, kept=kept)
        return tokens.replace(x, plans=(*tokens.plans, plan))
