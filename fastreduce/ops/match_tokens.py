"""``match_tokens``: ToMe's bipartite soft matching, from the metric to the output slot of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_floating, check_shape, shape_of
from ._library import operator

__all__ = ["match_tokens", "match_tokens_groups"]


def _reference(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    slot = reference.match_tokens(metric, r, prefix)
    return slot, *reference.group_slots(slot, metric.shape[-2] - r)


@operator("match_tokens.match_tokens", _reference, dense="metric")
def _match(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = metric.shape[0], metric.shape[-2]
    order, offsets = (metric.new_empty(batch, count, dtype=torch.int32) for count in (tokens, tokens - r + 1))
    return metric.new_empty(batch, tokens, dtype=torch.int64), order, offsets


def match_tokens_groups_unchecked(
    metric: Tensor, r: int, *, prefix: int = 1, backend: Resolved
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Call :func:`match_tokens_groups` without checks, by the backend named."""
    if metric.requires_grad:
        metric = metric.detach()
    if backend == "reference":
        return reference.match_tokens(metric, r, prefix), None
    slot, order, offsets = _match(metric, r, prefix)
    return slot, (order, offsets)


def match_tokens_unchecked(metric: Tensor, r: int, *, prefix: int = 1, backend: Resolved) -> Tensor:
    """Call :func:`match_tokens` without checks, by the backend named."""
    return match_tokens_groups_unchecked(metric, r, prefix=prefix, backend=backend)[0]


def match_tokens(metric: Tensor, r: int, *, prefix: int = 1, backend: str | None = None) -> Tensor:
    """Match tokens of even position with tokens of odd position and merge the r closest pairs (ToMe, section 3).

    Every token of even position finds the token of odd position with the highest cosine similarity. The r tokens with
    the highest similarities move into the slot of their partner; all others keep a slot of their own. Slots are
    numbered in this order: the prefix, the even tokens that stay, the odd tokens. Ties go to the lower position, of
    partners and of moving tokens. A zero vector has similarity 0 to all; NaN counts as -2. Prefix tokens neither move
    nor receive.

    Equivalent PyTorch, without prefix::

        metric = metric.mean(1)  # of keys: float32 sums, rounded once
        unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(dim=-1)
        moving = (-best).sort(dim=1, stable=True).indices[:, :r]

    Args:
        metric: (B, N, D), N at least 2: the vectors that are compared. Or keys (B, H, N, D) of any strides, such as a
            view of a packed qkv, whose mean over the heads is the metric (ToMe). Up to 1,024 tokens besides the class
            token, the kernels take this mean as they read the keys. It takes a launch before if rows are not aligned
            to 16 bytes, if half precision has more than 128 channels, or if float32 has more than 16 heads. float32,
            float16, bfloat16 (reference: any). Products are summed in float32.
        r: number of tokens to merge, 0 .. (N - prefix) // 2.
        prefix: number of leading tokens that are never reduced (class, distillation, registers).
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        slot (B, N) int64, values 0 .. N - r - 1, for :func:`merge_tokens` with ``num_out = N - r``. No gradient.

    Raises:
        ValueError: wrong shape, fewer than 2 tokens, r or prefix out of range.
        TypeError: metric not floating point, r or prefix not an integer.
    """
    return match_tokens_groups(metric, r, prefix=prefix, backend=backend)[0]


def match_tokens_groups(
    metric: Tensor, r: int, *, prefix: int = 1, backend: str | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Match as :func:`match_tokens` does, and return the groups for :func:`merge_tokens` from the same launch.

    Returns:
        slot (B, N), and the groups as :func:`prepare_merge` returns them: None for the reference.
    """
    check_shape("metric", metric, "B H N D" if isinstance(metric, Tensor) and metric.ndim == 4 else "B N D")
    check_floating("metric", metric)
    if metric.ndim == 4 and metric.shape[1] == 0:
        raise ValueError(f"keys must have at least one head, got shape {shape_of(metric)}")
    tokens = metric.shape[-2]
    if tokens < 2:
        raise ValueError(f"metric must have at least 2 tokens, got shape {shape_of(metric)}")
    if metric.shape[-1] < 1:
        raise ValueError(f"metric must have at least 1 channel, got shape {shape_of(metric)}")
    prefix = check_count("prefix", prefix, 0, tokens)
    r = check_count("r", r, 0, (tokens - prefix) // 2)
    return match_tokens_groups_unchecked(metric, r, prefix=prefix, backend=resolve(backend, metric))
