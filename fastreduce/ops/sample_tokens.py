"""``sample_tokens``: kept tokens, in a number that depends on the image."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_floating, check_shape, shape_of
from ._library import operator

__all__ = ["sample_tokens"]


@operator("sample_tokens.sample_tokens", reference.sample_tokens)
def _sample(scores: Tensor, budget: int, prefix: int, parts: int | None = None) -> tuple[Tensor, Tensor]:
    batch = scores.shape[0]
    index = scores.new_empty(batch, budget, dtype=torch.int64)
    return index, scores.new_empty(batch, prefix + budget, dtype=torch.bool)


def sample_tokens_unchecked(
    scores: Tensor, budget: int, *, prefix: int = 1, parts: int | None = None, backend: Resolved
) -> tuple[Tensor, Tensor]:
    """Call :func:`sample_tokens` without checks, by the backend named."""
    if scores.requires_grad:
        scores = scores.detach()
    if backend == "reference":
        return reference.sample_tokens(scores, budget, prefix, parts)
    return _sample(scores, budget, prefix, parts)


def sample_tokens(
    scores: Tensor, budget: int, *, prefix: int = 1, parts: int | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Sample tokens by inverse transform of their cumulated scores; an image keeps at most ``budget`` (ATS, section 3).

    Equivalent PyTorch, for one image::

        cdf = (scores / (scores.sum() + 1e-6)).cumsum(0)
        grid = torch.arange(1, 2 * budget, 2) / (2 * parts)  # the middles of the first parts, as in the released code
        index = (grid[:, None] - cdf).abs().argmin(1).unique()  # the lowest token on ties

    Distances are rounded in the dtype of the cdf. A token of weight 0 shares the cdf of the token before it, and is
    never taken unless all weight comes after it. The scale of the scores matters only through the 1e-6: the released
    code sums over heads, and so does :func:`cls_value_scores`, whose result can be passed unchanged.

    Args:
        scores: (B, N) of any strides. float32, float16, bfloat16 (reference: any floating dtype). Negative, NaN and
            infinite scores count as 0; an image whose scores are all 0, or overflow when summed, keeps its first token.
        budget: number of sampling points, at least 1; it may exceed N. ATS's K counts the class token: give K - 1.
        parts: number of parts that cumulated scores are cut into; None for ``budget + 1``, which skips the last part.
        prefix: number of leading columns of ``valid`` for the tokens that are never reduced.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        index (B, budget) int64, the kept tokens ascending and then zeros, and valid (B, prefix + budget) bool, True for
        the prefix and for kept tokens. No gradient flows through either.

    Raises:
        ValueError: wrong shape, no token, a budget below 1, a prefix below 0 or fewer parts than the budget.
        TypeError: scores not floating point, or a budget, prefix or parts that is not an integer.
    """
    check_shape("scores", scores, "B N")
    check_floating("scores", scores)
    if scores.shape[1] < 1:
        raise ValueError(f"scores must have at least one token, got shape {shape_of(scores)}")
    budget = check_count("budget", budget, 1, sys.maxsize)
    prefix = check_count("prefix", prefix, 0, sys.maxsize)
    if parts is not None:
        parts = check_count("parts", parts, budget, sys.maxsize)
    return sample_tokens_unchecked(scores, budget, prefix=prefix, parts=parts, backend=resolve(backend, scores))
