"""Matrices of every token against every other, in blocks of rows: memory then grows as the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["block_rows", "joined", "row_blocks", "split"]

MATRIX = 1 << 20  # numbers of an image that a block holds: of every token against every other up to 1,024 tokens


def block_rows(columns: int) -> int:
    """Return how many rows of so many columns a block has."""
    return max(1, MATRIX // max(1, columns))


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Cut all rows into blocks; a single one if they fit."""
    size = block_rows(columns)
    return [slice(None)] if rows <= size else [slice(start, start + size) for start in range(0, rows, size)]


def split(x: Tensor, columns: int, dim: int = 1) -> Sequence[Tensor]:
    """Return blocks of x along a dimension, for matrices of so many columns; x itself if one does."""
    size = block_rows(columns)
    return [x] if x.shape[dim] <= size else x.split(size, dim)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Put the parts side by side in dimension 1; return a single one as it is, since cat would copy it."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
