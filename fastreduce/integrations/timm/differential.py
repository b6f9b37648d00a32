"""timm's differential attention: of every head two maps, the second of which is taken off the first.

To the reducers the maps are heads of their own, ``2 H`` with queries and keys of half the width, and both have the
values of their head. So a score is the mean over both maps, which is never negative and sums to one as usual.
"""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor

__all__ = ["DIFFERENTIAL", "difference", "maps"]

DIFFERENTIAL: tuple[type, ...] = tuple(filter(None, [getattr(timm.layers, "DiffAttention", None)]))


def maps(attn: Any, made: tuple[Tensor, ...], first: int) -> tuple[Tensor, ...]:
    """Turn (query, key, value)[first:], (B, N, C) each, into (B, 2 H, N, D or 2 D) of both maps, normed."""
    found = []
    for part, norm in zip(made, (attn.q_norm, attn.k_norm, None)[first:], strict=False):
        if norm is None:
            found.append(part.unflatten(2, (attn.num_heads, -1)).transpose(1, 2).repeat_interleave(2, dim=1))
        else:
            found.append(norm(part.unflatten(2, (2 * attn.num_heads, -1)).transpose(1, 2)))
    return tuple(found)


def difference(attn: Any, out: Tensor) -> Tensor:
    """Turn the output of both maps (B, M, 2 H * 2 D) into their difference (B, M, H * 2 D), normed a head at a time."""
    both = out.unflatten(2, (attn.num_heads, 2, -1))
    left = both[:, :, :, 0] - attn._compute_lambda().type_as(out) * both[:, :, :, 1]
    return (attn.sub_norm(left) * (1 - attn.lambda_init)).flatten(2)
