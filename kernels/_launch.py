"""Launch settings: frozen data chosen by pure functions of the shape."""

from __future__ import annotations

import dataclasses
import functools

from ._direct import next_power_of_2


@dataclasses.dataclass(frozen=True)
class RowTile:
    """Rows and channels of one program of a row-streaming kernel."""

    rows: int
    block_c: int
    num_warps: int


@functools.cache
def row_tile(channels: int) -> RowTile:
    """About 2,048 elements a program: 16 a thread at 4 warps, which is two 16-byte loads of half precision each."""
    block_c = min(next_power_of_2(max(1, channels)), 1024)
    return RowTile(rows=max(1, 2048 // block_c), block_c=block_c, num_warps=4)


@functools.cache
def whole_rows(channels: int) -> RowTile:
    """As row_tile, but a program holds all channels of its rows: from 2,048 on, warps grow with them."""
    block_c = next_power_of_2(max(1, channels))
    return RowTile(rows=max(1, 2048 // block_c), block_c=block_c, num_warps=min(32, max(4, block_c // 512)))


def row_warps(block_c: int) -> int:
    """Warps for one row: 8 channels a thread, one 16-byte load of half precision."""
    return min(32, max(1, block_c // 256))
