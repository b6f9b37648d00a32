"""Top-K: keep the tokens that the class token attends to most (Haurum et al. 2023)."""

from __future__ import annotations

from ..ops import unchecked as ops
from ..tokens import Plan, Tokens
from .base import AttentionBlock, ScheduledReducer, attend_all, early_heads, gather, importance

__all__ = ["TopK"]


class TopK(ScheduledReducer):
    """Select before attention: only kept tokens are queried, attended, projected and added; all keys, values stay."""

    name = "topk"

    def attend(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Attention half with selection; the kept tokens come out best first."""
        keep = self.schedule.count(stage, tokens.patches)
        if keep >= tokens.num_patches:
            return attend_all(block, tokens)
        prefix, backend = tokens.prefix, tokens.backend
        tokens, normed, (q, k, v), late = early_heads(block, tokens)
        scores = importance(block, q, k, prefix, backend=backend)
        kept = ops.select_topk(scores, keep, backend=backend)  # (B, keep)
        residual = block.branch(block.attend_kept(q, k, v, normed, kept, tokens)) if late else None
        x, following = gather(block.mlp_norm(tokens), tokens.x, kept, prefix=prefix, residual=residual, backend=backend)
        plan = Plan(block.index, tokens.num_patches, keep, kept=kept)
        return tokens.replace(x, normed=following, plans=(*tokens.plans, plan))
