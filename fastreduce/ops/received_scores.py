"""``received_scores``: the attention that every key receives. Reference only: there is no kernel for it yet."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..backends import check_backend
from ._check import check_floating, check_same, check_shape, shape_of

__all__ = ["received_scores"]


def received_scores(q: Tensor, k: Tensor, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """Attention received by every key, summed over heads and queries.

    Args:
        q: (B, H, M, D) queries.
        k: (B, H, N, D) keys.
        scale: factor of the logits; None for ``D ** -0.5``.
        backend: ``"auto"`` and ``"reference"`` run the reference on every device, one head's (M, N) matrix at a time.

    Returns:
        (B, N) float32 (float64 for float64 inputs); each row sums to H * M. Differentiable.

    Raises:
        ValueError: wrong shapes, devices that differ.
        TypeError: inputs that are not floating point or of two dtypes.
        NotImplementedError: ``backend="triton"``: there is no kernel yet, and an explicit choice never falls back.
    """
    check_shape("q", q, "B H M D")
    check_shape("k", k, "B H N D")
    check_floating("q", q)
    check_same("q", q, "k", k, dtype=True)
    if shape_of(q)[:2] != shape_of(k)[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in B, H and D, got {shape_of(q)} and {shape_of(k)}")
    if backend is not None and check_backend(backend) == "triton":
        raise NotImplementedError("received_scores has no Triton kernel yet; use backend='auto' or 'reference'")
    return reference.received_scores(q, k, q.shape[3] ** -0.5 if scale is None else scale)
