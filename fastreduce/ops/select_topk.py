"""``select_topk``: indices of the highest scores, in a deterministic order."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_floating, check_shape
from ._library import operator

__all__ = ["select_topk"]


@operator(
    "select_topk.select_topk",
    lambda scores, k: reference.select_topk(scores, k).clone(memory_format=torch.contiguous_format),
)
def _select(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty(scores.shape[0], k, dtype=torch.int64)


def select_topk_unchecked(scores: Tensor, k: int, *, backend: Resolved) -> Tensor:
    """Call :func:`select_topk` without checks, by the backend named."""
    if scores.requires_grad:
        scores = scores.detach()
    if backend == "reference":
        return reference.select_topk(scores, k)
    return _select(scores, k)


def select_topk(scores: Tensor, k: int, *, backend: str | None = None) -> Tensor:
    """Return the indices of the k highest scores of every image, highest first.

    Ties go to the lower index, ``-0.0`` equals ``0.0``, and NaN counts as lower than ``-inf``.

    Equivalent PyTorch: ``torch.sort(-scores, dim=1, stable=True).indices[:, :k]``.

    Args:
        scores: (B, N) scores of any strides. float32, float16, bfloat16 (reference: any floating dtype).
        k: number of indices, 0 .. N. With k = N they are the order that :func:`fuse_tokens` takes.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, k) int64. No gradient flows through indices.

    Raises:
        ValueError: wrong shape, or a k outside 0 .. N.
        TypeError: scores not floating point, or k not an integer.
    """
    check_shape("scores", scores, "B N")
    check_floating("scores", scores)
    k = check_count("k", k, 0, scores.shape[1])
    return select_topk_unchecked(scores, k, backend=resolve(backend, scores))
