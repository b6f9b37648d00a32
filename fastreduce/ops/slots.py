"""``group_slots`` and ``prepare_merge``: tokens grouped by slot, once for several merges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_index, check_pair, check_same, check_shape, shape_of
from ._library import operator

__all__ = ["group_slots", "prepare_merge"]


@operator(
    "slots.group_slots",
    lambda slot, num_out: reference.group_slots(slot.contiguous(), num_out),  # a sort keeps the strides
)
def grouped(slot: Tensor, num_out: int) -> tuple[Tensor, Tensor]:
    batch, tokens = slot.shape
    return slot.new_empty(batch, tokens, dtype=torch.int32), slot.new_empty(batch, num_out + 1, dtype=torch.int32)


def check_slot(slot: Tensor) -> None:
    """Raise unless the slots are (B, N) integers."""
    check_shape("slot", slot, "B N")
    check_index("slot", slot)


def check_groups(groups: Any, slot: Tensor, num_out: int) -> None:
    """Raise unless groups have the shapes, dtype and device that :func:`group_slots` gives for these slots."""
    check_pair("groups", groups, "order and offsets")
    shapes = shape_of(slot), (slot.shape[0], num_out + 1)
    for name, tensor, shape in zip(("order of groups", "offsets of groups"), groups, shapes, strict=True):
        check_shape(name, tensor, "B N")
        check_same("slot", slot, name, tensor)
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")
        if shape_of(tensor) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {shape_of(tensor)}")


def group_slots_unchecked(slot: Tensor, num_out: int, *, backend: Resolved) -> tuple[Tensor, Tensor]:
    """Call :func:`group_slots` without checks, by the backend named."""
    return reference.group_slots(slot, num_out) if backend == "reference" else grouped(slot, num_out)


def prepare_merge_unchecked(slot: Tensor, num_out: int, *, backend: Resolved) -> tuple[Tensor, Tensor] | None:
    """Call :func:`prepare_merge` without checks, by the backend named."""
    return None if backend == "reference" else grouped(slot, num_out)


def group_slots(slot: Tensor, num_out: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Group tokens by slot, for several :func:`merge_tokens` over the same slots.

    Args:
        slot: (B, N) int64 or int32, values -1 .. num_out - 1; -1 is no slot.
        num_out: number of slots.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        order (B, N) and offsets (B, num_out + 1), int32: slot m holds the tokens
        ``order[b, offsets[b, m] : offsets[b, m + 1]]``, in ascending index.
    """
    check_slot(slot)
    num_out = check_count("num_out", num_out, 1, 2**31 - 2)
    return group_slots_unchecked(slot, num_out, backend=resolve(backend, slot))


def prepare_merge(slot: Tensor, num_out: int, *, backend: str | None = None) -> tuple[Tensor, Tensor] | None:
    """Return the groups that several :func:`merge_tokens` over one slot share; None for the reference."""
    check_slot(slot)
    num_out = check_count("num_out", num_out, 1, 2**31 - 2)
    return prepare_merge_unchecked(slot, num_out, backend=resolve(backend, slot))
