"""Positions: what a model gave its blocks for every patch of the grid, gathered for the tokens that are left."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..tokens import Tokens, compose_slots
from .parts import Beside

__all__ = ["pairs_at", "rows_at", "table_at"]


def table_at(tokens: Tokens) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Return table and place for :func:`fastreduce.ops.rotate_tokens`: place (B, n), None for rows in order."""
    found = tokens.beside.table
    table: tuple[Tensor, Tensor] = found(tokens.patches) if callable(found) else found
    if len(tokens.plans) == 0:  # torch.compile knows no truth of a tuple
        return table, None
    if tokens.beside.positions == "mean":
        return _mean_rows(table[0], table[1], tokens), None
    return table, tokens.place


def rows_at(tokens: Tokens) -> Beside:
    """Return what the model would have given the tokens at hand: tables (B, 1 or H, n, D), of each its own rows."""
    (cos, sin), place = table_at(tokens)
    table = reference.table_rows(cos, place, 1.0), reference.table_rows(sin, place, 0.0)
    return tokens.beside._replace(table=table, call=None)


def _mean_rows(cos: Tensor, sin: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return the mean angle of the patches in every token, (B, 1 or H, n, D) each, on the unit circle.

    There is none where angles cancel.

    A patch that was dropped is in no token.
    """
    slot = compose_slots(tokens.plans, tokens.batch).long()  # (B, P), -1 for dropped
    return reference.mean_rows(cos, sin, slot, tokens.num_patches)


def pairs_at(pair: Tensor, tokens: Tokens) -> Tensor:
    """Turn (1 or B, H, T, T) biases on the full grid into (1 or B, H, N, N) at hand; zero for a token of no place."""
    if len(tokens.plans) == 0:
        return pair
    place, prefix = tokens.place, tokens.prefix
    assert place is not None
    head = torch.arange(prefix, device=place.device).expand(place.shape[0], prefix)
    index = torch.cat([head, place.long().clamp_min(0) + prefix], dim=1)  # (B, N)
    pair = pair.expand(place.shape[0], -1, -1, -1)
    heads, columns = pair.shape[1], pair.shape[3]
    pair = pair.gather(2, index[:, None, :, None].expand(-1, heads, -1, columns))
    pair = pair.gather(3, index[:, None, None, :].expand(-1, heads, pair.shape[2], -1))
    none = torch.cat([head.new_zeros(head.shape, dtype=torch.bool), place < 0], dim=1)
    return pair.masked_fill(none[:, None, :, None] | none[:, None, None, :], 0.0)
