"""timm's differential attention: of every head two maps, the second of which is taken off the first.

To the reducers the maps are heads of their own, ``2 H`` with queries and keys of half the width, and both have the
values of their head. So a score is the mean over both maps, which is never negative and sums to one as usual.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from ..parts import Linear, are_plain
from ..registry import register_parts
from .parallel import ScalingParts
from .parts import BlockParts

__all__ = ["DiffBlockParts", "DiffScalingParts", "difference", "maps"]


def maps(attn: Any, made: tuple[Tensor, ...], first: int) -> tuple[Tensor, ...]:
    """Slices ``first`` on of (query, key, value), (B, N, C) each -> (B, 2 H, N, D or 2 D) of both maps, normed."""
    found = []
    for part, norm in zip(made, (attn.q_norm, attn.k_norm, None)[first:], strict=False):
        if norm is None:
            found.append(part.unflatten(2, (attn.num_heads, -1)).transpose(1, 2).repeat_interleave(2, dim=1))
        else:
            found.append(norm(part.unflatten(2, (2 * attn.num_heads, -1)).transpose(1, 2)))
    return tuple(found)


def difference(attn: Any, out: Tensor) -> Tensor:
    """(B, M, 2 H * 2 D) what both maps give -> (B, M, H * 2 D) their difference, normed a head at a time."""
    both = out.unflatten(2, (attn.num_heads, 2, -1))
    left = both[:, :, :, 0] - attn._compute_lambda().type_as(out) * both[:, :, :, 1]
    return (attn.sub_norm(left) * (1 - attn.lambda_init)).flatten(2)


class DiffBlockParts(BlockParts):
    """``vision_transformer.Block``, whose attention may be differential."""

    differential: tuple[type, ...] = tuple(filter(None, [getattr(timm.layers, "DiffAttention", None)]))
    attentions: tuple[type, ...] = (*BlockParts.attentions, *differential)

    def project(self, block: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """As usual, or both maps."""
        if type(block.attn) not in self.differential:
            return super().project(block, normed, first, last, linear)
        return maps(block.attn, self.sections(block.attn, normed, first, last, linear), first)

    def inner(self, block: Any, out: Tensor, rows: Tensor | None) -> Tensor:
        """The difference first."""
        return super().inner(block, difference(block.attn, out) if self._differs(block) else out, rows)

    def is_rowwise(self, block: Any) -> bool:
        """Whether the norm of the difference treats rows alike too."""
        norm = block.attn.sub_norm if self._differs(block) else None
        return are_plain((norm,), self.row_by_row) and super().is_rowwise(block)

    def _differs(self, block: Any) -> bool:
        return type(block.attn) in self.differential


class DiffScalingParts(ScalingParts):
    """``DiffParallelScalingBlock``: the same beside its MLP."""

    def project(self, block: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """Both maps."""
        together = self._slice(block, normed, 1 + first, 1 + last)
        return maps(block, together.chunk(last - first, dim=-1), first)

    def inner(self, block: Any, out: Tensor, rows: Tensor | None) -> Tensor:
        """The difference, and the activated MLP of the same rows."""
        return super().inner(block, difference(block, out), rows)

    def is_rowwise(self, block: Any) -> bool:
        """Whether the norm of the difference treats rows alike too."""
        return are_plain((block.sub_norm,), self.row_by_row) and super().is_rowwise(block)

    def whole_attention(self, block: Any, normed: Tensor, beside: Any) -> Tensor | None:
        """Return None: the block does it itself."""
        return None

    def attention(self, block: Any) -> nn.Module | None:
        """Return None: there is no module."""
        return None


register_parts(vit.Block, DiffBlockParts())
if hasattr(vit, "DiffParallelScalingBlock"):  # timm 1.0.23 and newer
    register_parts(vit.DiffParallelScalingBlock, DiffScalingParts())
