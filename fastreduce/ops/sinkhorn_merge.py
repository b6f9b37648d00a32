"""``sinkhorn_merge``: sums of normalised tokens, weighted by a transport plan that is not written to memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_flag, check_floating, check_number, check_same, check_shape, shape_of
from ._library import differentiates_again, gradients_again, operator, wants_gradient

__all__ = ["sinkhorn_merge"]


def _padded(clusters: int) -> int:
    """Return the number of columns of similarities and cluster biases: the next multiple of 16, for the kernels."""
    return (clusters + 15) // 16 * 16


def _reference_forward(x: Tensor, centers: Tensor, eps: float, iters: int, head: Tensor | None) -> tuple[Tensor, ...]:
    outputs = reference.sinkhorn_merge(x, centers, eps, iters, head)
    merged, similarity, token_bias, inverse_norm, token_shifts, token_scales, biases = outputs
    missing = _padded(centers.shape[0]) - centers.shape[0]
    biases = torch.nn.functional.pad(torch.cat([-similarity.amax(1, keepdim=True), biases], dim=1), (0, missing))
    scales = torch.exp(biases[:, 1:] - biases[:, :-1])
    similarity = torch.nn.functional.pad(similarity, (0, missing), value=-math.inf)
    return merged, similarity, token_bias, inverse_norm, token_shifts, token_scales, biases, scales


def _reference_backward(
    grad: Tensor,
    x: Tensor,
    centers: Tensor,
    similarity: Tensor,
    inverse_norm: Tensor,
    token_shifts: Tensor,
    token_scales: Tensor,
    cluster_biases: Tensor,
    cluster_scales: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    clusters = centers.shape[0]
    similarity, biases = similarity[..., :clusters], cluster_biases[:, 1:, :clusters]
    saved = (similarity, inverse_norm, token_shifts, token_scales, biases)
    return reference.sinkhorn_merge_backward(grad, x, centers, *saved, eps)


def _fake_merged(x: Tensor, centers: Tensor, head: Tensor | None) -> Tensor:
    rows = centers.shape[0] + (0 if head is None else head.shape[1])
    dtype = x.dtype if head is None else torch.promote_types(x.dtype, head.dtype)
    return x.new_empty(x.shape[0], rows, x.shape[2], dtype=dtype)


@operator("sinkhorn_merge.sinkhorn_merge", _reference_forward, dense="x centers head")
def _forward(x: Tensor, centers: Tensor, eps: float, iters: int, head: Tensor | None) -> list[Tensor]:
    (batch, tokens, _), padded = x.shape, _padded(centers.shape[0])
    of_tokens, of_clusters = (batch, iters, tokens), (batch, iters, padded)
    shapes = (batch, tokens, padded), (batch, tokens), (batch, tokens), of_tokens, of_tokens
    numbers = reference.accumulator(x.dtype)
    vectors = [x.new_empty(shape, dtype=numbers) for shape in (*shapes, (batch, iters + 1, padded), of_clusters)]
    return [_fake_merged(x, centers, head), *vectors]


@operator("sinkhorn_merge_backward.sinkhorn_merge_backward", _reference_backward, dense="grad x centers")
def _backward(
    grad: Tensor,
    x: Tensor,
    centers: Tensor,
    similarity: Tensor,
    inverse_norm: Tensor,
    token_shifts: Tensor,
    token_scales: Tensor,
    cluster_biases: Tensor,
    cluster_scales: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), centers.new_empty(centers.shape)


def _reference_inference(
    x: Tensor, centers: Tensor, eps: float, iters: int, head: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    merged, token_bias, biases = reference.sinkhorn_merge_inference(x, centers, eps, iters, head)
    return merged, token_bias, torch.nn.functional.pad(biases, (0, _padded(centers.shape[0]) - centers.shape[0], 1, 0))


@operator("sinkhorn_merge.sinkhorn_merge_inference", _reference_inference, dense="x centers head")
def _inference(
    x: Tensor, centers: Tensor, eps: float, iters: int, head: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, tokens, _), numbers = x.shape, reference.accumulator(x.dtype)
    biases = x.new_empty(batch, iters + 1, _padded(centers.shape[0]), dtype=numbers)
    return _fake_merged(x, centers, head), x.new_empty(batch, tokens, dtype=numbers), biases


class SinkhornMerge(torch.autograd.Function):
    """Merged rows. Gradients go through all iterations, from the saved similarities and biases."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, centers: Tensor, eps: float, iters: int, head: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        merged, similarity, token_bias, *saved = _forward(x, centers, eps, iters, head)
        ctx.save_for_backward(x, centers, similarity, *saved)
        ctx.eps, ctx.iters, ctx.num_head = eps, iters, 0 if head is None else head.shape[1]
        ctx.head_dtype = None if head is None else head.dtype
        cluster_biases = saved[3]
        ctx.mark_non_differentiable(similarity, token_bias, cluster_biases)
        ctx.set_materialize_grads(False)  # None, not zeros, where there is no gradient
        return merged, similarity, token_bias, cluster_biases

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 5
        grad = grads[0]
        grad_x = grad_centers = grad_head = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            upstream = grad[:, ctx.num_head :]
            if differentiates_again():
                inputs = *ctx.saved_tensors[:2], ctx.eps, ctx.iters, None
                grad_x, grad_centers, *_ = gradients_again(reference.sinkhorn_merge, inputs, (upstream,))
            else:
                grad_x, grad_centers = _backward(upstream, *ctx.saved_tensors, ctx.eps)
        if ctx.needs_input_grad[4]:
            grad_head = grad[:, : ctx.num_head].to(ctx.head_dtype)
        return grad_x, grad_centers, None, None, grad_head


def sinkhorn_merge_unchecked(
    x: Tensor,
    centers: Tensor,
    *,
    eps: float = 1.0,
    iters: int = 3,
    head: Tensor | None = None,
    similarity: bool = True,
    backend: Resolved,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Call :func:`sinkhorn_merge` without checks, by the backend named."""
    by_reference = backend == "reference"
    clusters = centers.shape[0]
    arguments = x, centers, eps, iters, head
    recorded = wants_gradient(x, centers, head)
    if recorded and not by_reference:
        merged, products, token_bias, biases = SinkhornMerge.apply(*arguments)
    elif similarity or recorded:
        merge: Any = reference.sinkhorn_merge if by_reference else _forward
        merged, products, token_bias, *saved = merge(*arguments)
        biases = saved[3]
    else:
        merge = reference.sinkhorn_merge_inference if by_reference else _inference
        merged, token_bias, biases = merge(*arguments)
    return merged, products[..., :clusters] if similarity else None, token_bias, biases[:, -1, :clusters]


def sinkhorn_merge(
    x: Tensor,
    centers: Tensor,
    *,
    eps: float = 1.0,
    iters: int = 3,
    head: Tensor | None = None,
    similarity: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Replace the tokens by K sums of normalised tokens, weighted by a Sinkhorn transport plan (Sinkhorn Tokenizer).

    Equivalent PyTorch::

        y = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        similarity = y @ centers.T / eps
        token_bias = torch.zeros(B, N)
        for _ in range(iters):
            cluster_bias = -torch.logsumexp(similarity + token_bias[:, :, None], dim=1)
            token_bias = -torch.logsumexp(similarity + cluster_bias[:, None], dim=2)
        weights = torch.exp(similarity + token_bias[:, :, None] + cluster_bias[:, None])  # rows sum to one
        merged = torch.cat([head, weights.mT @ y], dim=1)

    Args:
        x: (B, N, C) tokens, at least one token and one channel. Any strides; with a dense last axis, such as
            ``tokens[:, 1:]``, it is not copied. float32, float16, bfloat16 (reference: any).
        centers: (K, C), at least one, rows already normalised, of any floating dtype.
        eps: temperature of the plan, positive; sums are in the log domain, so 0.01 does not overflow.
        iters: how many times both biases are updated, at least 1.
        head: (B, P, C) rows to put before the merged ones, unchanged, or None.
        similarity: False returns None for the similarity. Where no gradient is wanted, it is then in memory for as many
            images at a time as 256 MB hold; an image takes ``4 * N * K`` bytes.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        merged (B, P + K, C) in x's dtype or, with a head, the promoted one, differentiable in x, centers and head; and,
        without gradient and in float32 (float64 for float64 x), similarity (B, N, K), token_bias (B, N) and
        cluster_bias (B, K). ``similarity + token_bias[:, :, None] + cluster_bias[:, None]`` is the plan's logarithm.

    Raises:
        ValueError: wrong shapes, devices that differ, no token, centre or channel, ``eps <= 0``, ``iters < 1``.
        TypeError: x, centers or head not floating point, eps not a number, iters not an integer.
    """
    check_shape("x", x, "B N C")
    check_floating("x", x)
    check_shape("centers", centers, "K C")
    check_floating("centers", centers)
    check_same("x", x, "centers", centers)
    batch, tokens, channels = x.shape
    if centers.shape[1] != channels:
        raise ValueError(f"centers must have x's {channels} channels, got shape {shape_of(centers)}")
    if min(tokens, channels) < 1:
        raise ValueError(f"x must have at least one token and one channel, got shape {shape_of(x)}")
    if centers.shape[0] < 1:
        raise ValueError(f"centers must have at least one row, got shape {shape_of(centers)}")
    eps = check_number("eps", eps, positive=True)
    iters = check_count("iters", iters, 1, 2**31 - 1)
    tensors = [x, centers]
    if head is not None:
        check_shape("head", head, "B P C")
        check_floating("head", head)
        check_same("x", x, "head", head)
        if (head.shape[0], head.shape[2]) != (batch, channels):
            raise ValueError(f"head must have shape ({batch}, P, {channels}), got {shape_of(head)}")
        tensors.append(head)
    similarity = check_flag("similarity", similarity)
    options: dict[str, Any] = {"eps": eps, "iters": iters, "head": head, "similarity": similarity}
    return sinkhorn_merge_unchecked(x, centers, **options, backend=resolve(backend, *tensors))
