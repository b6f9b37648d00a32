"""``attention``: scaled dot-product attention with a differentiable policy on the keys, without the N x N matrix.

Launches: forward 1, backward 2; with a policy 2 and 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import resolve
from ._check import check_floating, check_same, check_shape, shape_of
from ._library import dense_rows, register

__all__ = ["attention"]

MAX_HEAD_DIM = 256  # of the kernels


def _sequence_first(tensor: Tensor) -> Tensor:
    """(B, H, M, D) in the memory order (B, M, H, D), which the next projection reads without a copy."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_like(tensor: Tensor) -> Tensor:
    batch, heads, rows, head_dim = tensor.shape
    return tensor.new_empty(batch, rows, heads, head_dim).transpose(1, 2)


def _triton_forward(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor | None, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import attention as kernels

    return kernels.attention(dense_rows(q), dense_rows(k), dense_rows(v), policy, scale, eps)


def _reference_forward(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor | None, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, *sums = reference.attention_with_sums(q, k, v, policy, scale, eps)
    return _sequence_first(out), sums[0], sums[1], sums[2]


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor | None, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, queries, head_dim = q.shape
    dtype = reference.accumulator(q.dtype)
    logsumexp = q.new_empty(batch, heads, queries, dtype=dtype)
    total = q.new_empty(batch, heads, 0 if policy is None else queries, dtype=dtype)
    return _empty_like(q), logsumexp, total, q.new_empty(batch, heads, 0 if policy is None else head_dim, dtype=dtype)


def _triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import attention as kernels

    grad, q, k, v = dense_rows(grad), dense_rows(q), dense_rows(k), dense_rows(v)
    return kernels.attention_backward(grad, q, k, v, policy, out, logsumexp, total, mean, scale, eps)


def _reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *grads, grad_policy = reference.attention_backward(grad, q, k, v, policy, out, logsumexp, total, mean, scale, eps)
    return _sequence_first(grads[0]), _sequence_first(grads[1]), _sequence_first(grads[2]), grad_policy


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_policy = q.new_empty(q.shape[0], 0) if policy is None else policy.new_empty(policy.shape)
    return _empty_like(q), _empty_like(k), _empty_like(v), grad_policy


_forward = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? policy, float scale, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    triton=_triton_forward,
    reference=_reference_forward,
    fake=_fake_forward,
)
_backward = register(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? policy, Tensor out, Tensor logsumexp,"
    " Tensor total, Tensor mean, float scale, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    triton=_triton_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)


class Attention(torch.autograd.Function):
    """Gradient: the logits once more in tiles, from the logsumexp and the denominator of every row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, policy: Tensor | None, scale: float, eps: float) -> Tensor:
        out, logsumexp, total, mean = _forward(q, k, v, policy, scale, eps)
        ctx.save_for_backward(q, k, v, policy, out, logsumexp, total, mean)
        ctx.scale, ctx.eps = scale, eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k, grad_v, grad_policy = _backward(grads[0], *ctx.saved_tensors, ctx.scale, ctx.eps)
        return grad_q, grad_k, grad_v, grad_policy if ctx.needs_input_grad[3] else None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    policy: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Attend, with keys that a policy hides softly from all queries but their own (DynamicViT, section 3.3).

    Equivalent PyTorch::

        logits = scale * q @ k.transpose(2, 3)
        own = torch.eye(N)
        visible = policy[:, None, None, :]
        weights = torch.exp(logits - logits.amax(-1, keepdim=True)) * (visible + (1 - visible) * own)
        ((weights + eps / N) / (weights.sum(-1, keepdim=True) + eps)) @ v  # without a policy: softmax(logits) @ v

    The kernels keep no matrix of queries by keys, forward or backward; the reference does.

    Args:
        q: (B, H, M, D) queries. float32, float16, bfloat16 (reference: any); logits and sums are float32.
        k: (B, H, N, D) keys, in q's dtype. Any strides; with a dense last axis, as views of a packed qkv have it,
            neither q nor k nor v is copied.
        v: (B, H, N, D) values, in q's dtype.
        policy: (B, N) floating point, how visible each key is, 0 (hidden) .. 1 (not checked), or None for plain
            attention. Query m is token m, so M must equal N. Hidden keys count for the maximum and for ``eps / N``.
        scale: factor on the dot products; None means ``D ** -0.5``.
        eps: smoothing of the weights under a policy, not negative; plain attention has none.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, H, M, D) in q's dtype. Differentiable in q, k, v and policy.

    Raises:
        ValueError: wrong shapes, devices that differ, no head, key or channel, a negative eps, or more than 256
            channels a head for the kernels.
        TypeError: a tensor that is not floating point, or q, k, v of several dtypes.
    """
    for name, tensor, layout in (("q", q, "B H M D"), ("k", k, "B H N D"), ("v", v, "B H N D")):
        check_shape(name, tensor, layout)
        check_floating(name, tensor)
        check_same("q", q, name, tensor, dtype=True)
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    expected: tuple[int, ...] = (batch, heads, keys, head_dim)
    for name, tensor in (("k", k), ("v", v)):
        if shape_of(tensor) != expected:
            raise ValueError(f"{name} must have shape {expected} to go with q {shape_of(q)}, got {shape_of(tensor)}")
    if min(heads, keys, head_dim) < 1:
        raise ValueError(f"k must have at least one head, key and channel, got shape {shape_of(k)}")
    tensors: tuple[Tensor, ...] = (q, k, v)
    if policy is not None:
        check_shape("policy", policy, "B N")
        check_floating("policy", policy)
        check_same("q", q, "policy", policy)
        if shape_of(policy) != (batch, keys):
            raise ValueError(f"policy must have shape {(batch, keys)}, one entry a key, got {shape_of(policy)}")
        if queries != keys:
            raise ValueError(f"a policy needs as many queries as keys, got {queries} queries and {keys} keys")
        tensors = (q, k, v, policy)
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    scale = head_dim**-0.5 if scale is None else float(scale)
    if resolve(backend, *tensors) == "reference":
        return reference.attention(q, k, v, policy, scale, eps)
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"the kernels take up to {MAX_HEAD_DIM} channels a head, got {head_dim}; use 'reference'")
    return Attention.apply(q, k, v, policy, scale, float(eps))
