"""The lower bound of every reduction's time: tokens cut off without looking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .attention import PlainAttention
from .walk import check_unpatched, prefix_of, run_through

__all__ = ["FreeSlice"]


class FreeSlice(PlainAttention):
    """The unreduced model that, between attention and MLP, simply cuts its tokens: a reduction whose decision is free.

    Args:
        model: an unpatched timm ``VisionTransformer``, or the plain view of another library's; its modules are shared,
            not copied.
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
            raise ValueError(f"counts must have one entry for each block in {tuple(blocks)}, got {counts!r}")
        self.model = model
        self.counts = dict(zip(blocks, counts, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, height, width) into logits (B, classes)."""
        return run_through(self.model, images, self._walked)

    def _walked(self, x: Tensor, tables: list[Tensor] | None) -> Tensor:
        """Walk tokens (B, N, C) that enter the first block, and each block's rotary table to the end of the last."""
        model = self.model
        prefix = prefix_of(model)
        for index, block in enumerate(model.blocks):
            rope = {} if tables is None else {"rope": tables[index][..., : x.shape[1] - prefix, :]}
            if index not in self.counts:
                x = block(x, **rope)
                continue
            x = x + self._branch(block, block.attn(self._normed(block, x), **rope))
            x = x[:, : prefix + self.counts[index]]
            x = x + self._mlp(block, x)
        return x
