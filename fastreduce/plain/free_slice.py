"""The lower bound of every reduction's time: tokens cut off without looking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .walk import check_unpatched, embed

__all__ = ["FreeSlice"]


class FreeSlice(nn.Module):
    """The unreduced model that, between attention and MLP, simply cuts its tokens: a reduction whose decision is free.

    Args:
        model: an unpatched timm ``VisionTransformer``; its modules are shared, not copied.
        counts: patch tokens left after each stage.
        blocks: the blocks at which the stages stand.

    Raises:
        ValueError: a patched model, or a count for each block missing.
    """

    model: Any

    def __init__(self, model: nn.Module, counts: Sequence[int], blocks: Sequence[int]):
        super().__init__()
        check_unpatched(model)
        if len(counts) != len(blocks):
            raise ValueError(f"counts must have one entry for each of the {len(blocks)} blocks, got {counts!r}")
        self.model = model
        self.counts = dict(zip(blocks, counts, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> logits (B, classes)."""
        model = self.model
        x = embed(model, images)
        for index, block in enumerate(model.blocks):
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            if index in self.counts:
                x = x[:, : model.num_prefix_tokens + self.counts[index]]
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return model.forward_head(model.norm(x))
