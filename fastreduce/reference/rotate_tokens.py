"""Rotary positions: pairs of channels, turned by the angles of the token's place."""

from __future__ import annotations

import torch
from torch import Tensor

from ._export import hypot, sums_of_rows

__all__ = [
    "mean_rows",
    "rotate_tokens",
    "rotate_tokens_backward",
    "rotate_tokens_table_backward",
    "table_rows",
    "turned",
]


def turned(x: Tensor, half: bool) -> Tensor:
    """Turn the pairs of x (..., D) by 90 degrees: (-x1, x0, -x3, x2, ...), or (-second half, first half)."""
    if half:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape(x.shape)


def table_rows(table: Tensor, place: Tensor | None, still: float) -> Tensor:
    """Look up table (P, D), (H, P, D) or (B, H or 1, P, D), place (B, n) or None -> (B or 1, H or 1, n or P, D).

    A place of -1 gets rows of ``still``.
    """
    table = table[(None,) * (4 - table.ndim)]
    if place is None:
        return table
    batch, tokens = place.shape
    index = place.long().clamp_min(0)
    if table.shape[0] == 1:  # the same rows for every image
        rows = table[0].index_select(1, index.flatten()).unflatten(1, (batch, tokens)).transpose(0, 1)
    else:
        rows = table.gather(2, index[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))
    return rows.masked_fill((place < 0)[:, None, :, None], still)


def mean_rows(cos: Tensor, sin: Tensor, slot: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the mean angle in each slot, (B, 1 or H, num_out, D) each; 1 and 0 if angles cancel.

    cos and sin as :func:`table_rows` takes them, slot (B, P) with -1 for none.
    """
    sums = [sums_of_rows(table[(None,) * (4 - table.ndim)], slot, num_out) for table in (cos, sin)]
    length = hypot(*sums)
    found = length > 1e-6
    length = length.clamp_min(1e-6)
    return torch.where(found, sums[0] / length, 1.0), torch.where(found, sums[1] / length, 0.0)


def rotate_tokens(x: Tensor, cos: Tensor, sin: Tensor, place: Tensor | None, prefix: int, half: bool) -> Tensor:
    """Return ``x cos + turned(x) sin`` behind the prefix, in the widest dtype of the three, then in x's own.

    x (B, H, prefix + n, D); cos and sin as :func:`table_rows` takes them; place (B, n) or None -> x's shape.
    """
    patches = x[:, :, prefix:] if prefix else x
    rows_cos, rows_sin = table_rows(cos, place, 1.0), table_rows(sin, place, 0.0)
    rotated = (patches * rows_cos + turned(patches, half) * rows_sin).to(x.dtype)
    return torch.cat([x[:, :, :prefix], rotated], dim=2) if prefix else rotated


def rotate_tokens_backward(
    grad: Tensor, cos: Tensor, sin: Tensor, place: Tensor | None, prefix: int, half: bool
) -> Tensor:
    """Transpose :func:`rotate_tokens` in x: ``grad cos - turned(grad sin)``."""
    patches = grad[:, :, prefix:] if prefix else grad
    rows_cos, rows_sin = table_rows(cos, place, 1.0), table_rows(sin, place, 0.0)
    turned_back = (patches * rows_cos - turned(patches * rows_sin, half)).to(grad.dtype)
    return torch.cat([grad[:, :, :prefix], turned_back], dim=2) if prefix else turned_back


def rotate_tokens_table_backward(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, place: Tensor | None, prefix: int, half: bool
) -> tuple[Tensor, Tensor]:
    """Return the table's gradients, ``grad x`` and ``grad turned(x)``, each summed over the tokens at a place."""
    grad, x = grad[:, :, prefix:], x[:, :, prefix:]
    dtype = torch.promote_types(torch.promote_types(grad.dtype, cos.dtype), torch.float32)
    parts = grad.to(dtype) * x.to(dtype), grad.to(dtype) * turned(x, half).to(dtype)
    found = tuple(_table_sums(part, like, place) for part, like in zip(parts, (cos, sin), strict=True))
    return found[0], found[1]


def _table_sums(part: Tensor, like: Tensor, place: Tensor | None) -> Tensor:
    """Sum (B, H, n, D) over the tokens, heads and images that share a row of ``like``."""
    images, heads, patches, _ = like[(None,) * (4 - like.ndim)].shape
    if heads == 1:
        part = part.sum(1, keepdim=True)
    if place is not None:
        seated = (place >= 0)[:, None, :, None]
        index = place.long().clamp_min(0)[:, None, :, None].expand_as(part)
        empty = part.new_zeros(part.shape[0], part.shape[1], patches, part.shape[3])
        part = empty.scatter_add(2, index, part * seated)
    if images == 1:
        part = part.sum(0, keepdim=True)
    return part.reshape(like.shape).to(like.dtype)
