"""Launch settings: frozen data chosen by pure functions of the shape."""

from __future__ import annotations

import dataclasses

import triton


@dataclasses.dataclass(frozen=True)
class RowTile:
    """Rows and channels of one program of a row-streaming kernel."""

    rows: int
    block_c: int
    num_warps: int


def row_tile(channels: int) -> RowTile:
    """About 2,048 elements a program: 16 a thread at 4 warps, which is two 16-byte loads of half precision each."""
    block_c = min(triton.next_power_of_2(channels), 1024)
    return RowTile(rows=max(1, 2048 // block_c), block_c=block_c, num_warps=4)
