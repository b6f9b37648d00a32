"""Top-K: keep the tokens that the class token attends to most (Haurum et al. 2023)."""

from __future__ import annotations

from ..ops import unchecked as ops
from ..tokens import Plan, Tokens
from .base import ScheduledReducer
from .block import AttentionBlock, attend_all, importance, keep_tokens

__all__ = ["TopK"]


class TopK(ScheduledReducer):
    """Select before attention: only kept tokens are queried, attended, projected and added; all keys, values stay."""

    name = "topk"
    leaves_padding = True

    def attend(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Run the attention half with selection; the kept tokens come out best first."""
        keep = self.schedule.count(stage, tokens.patches)
        present = tokens.num_patches
        if keep >= present:
            return attend_all(block, tokens)
        heads = block.heads(tokens, "select")
        kept = ops.select_topk(importance(heads), keep, backend=tokens.backend)  # (B, keep)
        x, normed = keep_tokens(block, heads, kept)
        return tokens.reduced(x, Plan(block.index, present, keep, kept=kept), normed=normed)
