"""Top-K: keep the tokens that the class token attends to most (Haurum et al. 2023)."""

from __future__ import annotations

from .. import ops
from ..tokens import Plan, Tokens
from .base import AttentionBlock, ScheduledReducer, attend_all, gather, importance

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
        q, k, v = block.early_query_key_value(normed)
        scores = importance(block, q, k, prefix, backend=backend)
        kept = ops.select_topk(scores, keep, backend=backend)  # (B, keep)
        attended = block.attend_kept(q, k, v, normed, kept, tokens)  # (B, prefix + keep, C)
        x, following = gather(
            block.mlp_norm(tokens.x), tokens.x, kept, prefix=prefix, residual=block.branch(attended), backend=backend
        )
        plan = Plan(block.index, tokens.num_patches, keep, kept=kept)
        return tokens.replace(x, normed=following, plans=(*tokens.plans, plan))
