"""Checks of both clusterings, and the tiles in which both compare tokens."""

from __future__ import annotations

import math

from torch import Tensor


def misplaced(distance: Tensor, centers: Tensor, label: Tensor, tolerance: float | Tensor = 0.0) -> str | None:
    """Say whether an index is out of range, or a token farther from its centre than from the nearest.

    The tolerance says by how much. distance (B, N, N), or its square, centers (B, k), label (B, N).
    """
    for name, index, end in (("centers", centers, distance.shape[1]), ("label", label, centers.shape[1])):
        if index.min() < 0 or index.max() >= end:
            return f"{name} must be within 0 .. {end - 1}"
    to_centers = distance.gather(2, centers.unsqueeze(1).expand(-1, distance.shape[1], -1))
    own = to_centers.gather(2, label.unsqueeze(2)).squeeze(2)
    wrong = int((own > to_centers.amin(2) + tolerance).sum())
    return f"labels that are not the nearest centre's: {wrong} of {label.numel()}" if wrong else None


def swept(rows: int, columns: int, tile_rows: int, tile_columns: int) -> int:
    """Count the rows read to compare all with all columns: a row once a tile of columns, a column once a tile of rows.

    Neither side stays where it is: the channels of both come in steps.
    """
    return rows * math.ceil(columns / tile_columns) + columns * math.ceil(rows / tile_rows)
