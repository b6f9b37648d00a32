"""N x N matrices in blocks of rows, so that memory grows linearly with the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["block_rows", "joined", "row_blocks", "split"]

MATRIX = 1 << 20  # numbers of an image in a block: the whole matrix up to 1,024 tokens


def block_rows(columns: int) -> int:
    """Return the number of rows of a block with this many columns."""
    return max(1, MATRIX // max(1, columns))


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Cut all rows into blocks; return one block if they fit."""
    size = block_rows(columns)
    return [slice(None)] if rows <= size else [slice(start, start + size) for start in range(0, rows, size)]


def split(x: Tensor, columns: int, dim: int = 1) -> Sequence[Tensor]:
    """Split x along a dimension into blocks, for matrices with this many columns; return x itself if it fits."""
    size = block_rows(columns)
    return [x] if x.shape[dim] <= size else x.split(size, dim)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Put the parts side by side in dimension 1; return a single one as it is, since cat would copy it."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
