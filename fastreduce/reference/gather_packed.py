"""Packed tokens: all images in one row, image b in ``offsets[b] .. offsets[b + 1]``, zeros past the last."""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import add_residual, with_prefix

__all__ = ["gather_packed", "gather_packed_backward", "token_offsets", "unpack_tokens", "unpack_tokens_backward"]


def token_offsets(valid: Tensor) -> Tensor:
    """Compute ``offsets[b] = sum(valid[:b])``: (B, N) bool -> (B + 1,) int32."""
    return torch.nn.functional.pad(valid.sum(1).cumsum(0, dtype=torch.int32), (1, 0))


def _places(target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the image and the place within it of every packed row, (target[B],) each."""
    row = torch.arange(int(target[-1]), dtype=target.dtype, device=target.device)
    image = torch.searchsorted(target[1:], row, right=True)
    return image, row - target.index_select(0, image)


def _sources(index: Tensor, source: Tensor, target: Tensor, prefix: int) -> Tensor:
    """Return the packed row of x that every packed row of the result comes from, (target[B],)."""
    image, place = _places(target)
    rows = with_prefix(index, prefix) + source[:-1, None]
    return rows.reshape(-1).index_select(0, torch.add(place, image, alpha=rows.shape[1]))


def _with_room(rows: Tensor, num_rows: int) -> Tensor:
    """Pad rows (R, C) with zeros at the end -> (1, num_rows, C)."""
    room = num_rows - len(rows)
    return (torch.nn.functional.pad(rows, (0, 0, 0, room)) if room else rows).unsqueeze(0)


def gather_packed(
    x: Tensor, index: Tensor, source: Tensor, target: Tensor, prefix: int, num_out: int, residual: Tensor | None
) -> Tensor:
    """Gather rows of packed images.

    ``out[target[b] + j] = x[source[b] + row[b, j]] (+ residual[target[b] + j])``, j < ``target[b+1] - target[b]``.

    x (1, T, C), index (B, K), source and target (B + 1,), residual (1, num_out, C) or None -> (1, num_out, C), with
    ``row = [0 .. prefix-1, index + prefix]``; rows from ``target[B]`` on are 0.
    """
    sources = _sources(index, source, target, prefix)
    kept = x[0].index_select(0, sources)
    return _with_room(add_residual(kept, None if residual is None else residual[0, : len(sources)]), num_out)


def gather_packed_backward(
    grad: Tensor, index: Tensor, source: Tensor, target: Tensor, prefix: int, num_in: int
) -> Tensor:
    """Transpose :func:`gather_packed`: grad (1, num_out, C) -> (1, num_in, C), zeros in rows that were not gathered."""
    sources = _sources(index, source, target, prefix)
    total = torch.zeros(num_in, grad.shape[2], dtype=grad.dtype, device=grad.device)
    return total.index_copy_(0, sources, grad[0, : len(sources)]).unsqueeze(0)


def unpack_tokens(x: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Unpack (1, T, C) -> (B, longest, C).

    ``out[b, j] = x[offsets[b] + j]`` for ``j < offsets[b+1] - offsets[b]``, else 0.
    """
    rows = offsets[:-1, None] + torch.arange(longest, dtype=offsets.dtype, device=offsets.device)
    real = rows < offsets[1:, None]
    tokens = x[0] if x.shape[1] else torch.nn.functional.pad(x[0], (0, 0, 0, 1))  # a row for places past the end
    out = tokens.index_select(0, rows.masked_fill(~real, 0).view(-1)).view(*rows.shape, x.shape[2])
    return out.masked_fill_(~real.unsqueeze(2), 0.0)


def unpack_tokens_backward(grad: Tensor, offsets: Tensor, num_in: int) -> Tensor:
    """Transpose :func:`unpack_tokens`: grad (B, longest, C) -> (1, num_in, C)."""
    batch, longest, channels = grad.shape
    image, place = _places(offsets)
    rows = grad.reshape(batch * longest, channels).index_select(0, torch.add(place, image, alpha=longest))
    return _with_room(rows, num_in)
