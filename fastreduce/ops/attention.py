"""``attention`` without the N x N matrix: with a bias and chosen queries, of packed images, and under a policy.

The forward pass takes one launch, the backward pass two. A policy adds one to each. In the backward pass a
differentiable bias adds one, an index two, and an index of packed images one.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import (
    check_count,
    check_floating,
    check_index,
    check_number,
    check_pair,
    check_same,
    check_scale,
    check_shape,
    shape_of,
)
from ._library import dense_rows, differentiates_again, gradients_again, operator, wants_gradient

__all__ = ["attention", "attention_packed", "attention_policy"]

MAX_HEAD_DIM = 256  # limit of the kernels


def _sequence_first(tensor: Tensor) -> Tensor:
    """Copy (B, H, M, D) into the memory order (B, M, H, D), which the output projection reads without a copy."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_like(tensor: Tensor, rows: int | None = None) -> Tensor:
    batch, heads, own_rows, head_dim = tensor.shape
    return tensor.new_empty(batch, own_rows if rows is None else rows, heads, head_dim).transpose(1, 2)


def _pair(query_offsets: Tensor | None, key_offsets: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if query_offsets is None or key_offsets is None else (query_offsets, key_offsets)


def _reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    num_out: int = 0,
) -> tuple[Tensor, Tensor]:
    offsets = _pair(query_offsets, key_offsets)
    out, logsumexp = reference.attention_with_sums(q, k, v, scale, bias, index, prefix, offsets, num_out)
    return _sequence_first(out), logsumexp


@operator("attention.attention", _reference_forward, dense="q k v", whole="query_offsets key_offsets")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    num_out: int = 0,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    if index is not None:
        queries = prefix + index.shape[1] if query_offsets is None else num_out
    logsumexp = q.new_empty(batch, heads, queries, dtype=reference.accumulator(q.dtype))
    return _empty_like(q, queries), logsumexp


def _triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    grad_scores: Tensor | None = None,
    kind: str = "",
    with_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import attention_backward as kernels

    grad, q, k, v = dense_rows(grad), dense_rows(q), dense_rows(k), dense_rows(v)
    grads = kernels.attention_backward(
        *(grad, q, k, v, out, logsumexp, scale, bias, index, prefix),
        *(query_offsets, key_offsets, longest_queries, longest_keys, grad_scores, kind, with_bias),
    )
    if index is None:
        return grads
    of_chosen = grads[0].transpose(1, 2).flatten(2)
    if query_offsets is not None and key_offsets is not None:
        from ..kernels import gather_packed

        rows = gather_packed.gather_packed_backward(of_chosen, index, key_offsets, query_offsets, prefix, q.shape[2])
    else:
        from ..kernels import merge_tokens

        # The gradients of a query that the index names twice add up.
        rows = merge_tokens.sum_slots(of_chosen, reference.with_prefix(index, prefix), q.shape[2])
    return rows.unflatten(2, (q.shape[1], q.shape[3])).transpose(1, 2), *grads[1:]


def _reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    grad_scores: Tensor | None = None,
    kind: str = "",
    with_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    offsets = _pair(query_offsets, key_offsets)
    *grads, grad_bias = reference.attention_backward(
        grad, q, k, v, out, logsumexp, scale, bias, index, prefix, offsets, grad_scores, kind
    )
    if not with_bias:
        grad_bias = grad_bias.new_empty(q.shape[0], 0)
    return _sequence_first(grads[0]), _sequence_first(grads[1]), _sequence_first(grads[2]), grad_bias


@operator(_triton_backward, _reference_backward, name="attention_backward", whole="query_offsets key_offsets")
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    grad_scores: Tensor | None = None,
    kind: str = "",
    with_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = 0 if bias is None or not with_bias else k.shape[2]
    grad_bias = (q if bias is None else bias).new_empty(q.shape[0], columns)
    return _empty_like(q), _empty_like(k), _empty_like(v), grad_bias


def _reference_policy(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, *sums = reference.attention_policy_with_sums(q, k, v, policy, scale, eps)
    return _sequence_first(out), sums[0], sums[1], sums[2]


@operator("attention.attention_policy", _reference_policy, dense="q k v")
def _policy_forward(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = q.new_empty(q.shape[:3], dtype=reference.accumulator(q.dtype))
    return _empty_like(q), sums, torch.empty_like(sums), sums.new_empty(*q.shape[:2], q.shape[3])


def _reference_policy_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *grads, grad_policy = reference.attention_policy_backward(
        grad, q, k, v, policy, out, logsumexp, total, mean, scale, eps
    )
    return _sequence_first(grads[0]), _sequence_first(grads[1]), _sequence_first(grads[2]), grad_policy


@operator("attention_backward.attention_policy_backward", _reference_policy_backward, dense="grad q k v")
def _policy_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_like(q), _empty_like(k), _empty_like(v), policy.new_empty(policy.shape)


class Attention(torch.autograd.Function):
    """The attention of :func:`attention`. The gradient recomputes the logits in tiles and uses the saved logsumexp."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        bias: Tensor | None = None,
        index: Tensor | None = None,
        prefix: int = 0,
        query_offsets: Tensor | None = None,
        key_offsets: Tensor | None = None,
        longest_queries: int = 0,
        longest_keys: int = 0,
        num_out: int = 0,
    ) -> Tensor:
        options = (bias, index, prefix, query_offsets, key_offsets, longest_queries, longest_keys, num_out)
        out, logsumexp = forward(q, k, v, scale, *options)
        ctx.save_for_backward(q, k, v, out, logsumexp, bias, index, query_offsets, key_offsets)
        ctx.numbers = (scale, prefix, longest_queries, longest_keys)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, bias, index, query_offsets, key_offsets = ctx.saved_tensors
        scale, prefix, *longest = ctx.numbers
        if differentiates_again():
            q, k, v, out = saved[:4]
            offsets = _pair(query_offsets, key_offsets)
            inputs = q, k, v, scale, bias, index, prefix, offsets, out.shape[2]
            return *gradients_again(reference.attention_with_sums, inputs, grads)[:7], *[None] * 5
        with_bias = len(ctx.needs_input_grad) > 4 and ctx.needs_input_grad[4]
        options = (bias, index, prefix, query_offsets, key_offsets, *longest)
        grad_q, grad_k, grad_v, grad_bias = backward(grads[0], *saved, scale, *options, None, "", with_bias)
        return grad_q, grad_k, grad_v, None, grad_bias if with_bias else None, *[None] * 7


class AttentionPolicy(torch.autograd.Function):
    """The attention under a policy. The gradient recomputes the logits in tiles and uses the saved sums."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, policy: Tensor, scale: float, eps: float) -> Tensor:
        out, *sums = _policy_forward(q, k, v, policy, scale, eps)
        ctx.save_for_backward(q, k, v, policy, out, *sums)
        ctx.numbers = (scale, eps)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if differentiates_again():
            inputs = *ctx.saved_tensors[:4], *ctx.numbers
            return tuple(gradients_again(reference.attention_policy, inputs, grads))
        *found, grad_policy = _policy_backward(grads[0], *ctx.saved_tensors, *ctx.numbers)
        return *found, grad_policy if ctx.needs_input_grad[3] else None, None, None


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, fewest_keys: int = 1) -> None:
    for name, tensor, layout in (("q", q, "B H M D"), ("k", k, "B H N D"), ("v", v, "B H N D")):
        check_shape(name, tensor, layout)
        check_floating(name, tensor)
        check_same("q", q, name, tensor, dtype=True)
    batch, heads, _, head_dim = q.shape
    keys = k.shape[2]
    expected: tuple[int, ...] = (batch, heads, keys, head_dim)
    for name, tensor in (("k", k), ("v", v)):
        if shape_of(tensor) != expected:
            raise ValueError(f"{name} must have shape {expected} to go with q {shape_of(q)}, got {shape_of(tensor)}")
    if min(heads, head_dim) < 1 or keys < fewest_keys:
        raise ValueError(f"k must have at least one head, key and channel, got shape {shape_of(k)}")


def check_of_keys(name: str, value: Tensor, q: Tensor, k: Tensor) -> None:
    check_shape(name, value, "B N")
    check_floating(name, value)
    check_same("q", q, name, value)
    if shape_of(value) != (k.shape[0], k.shape[2]):
        raise ValueError(f"{name} must have shape {(k.shape[0], k.shape[2])}, one entry a key, got {shape_of(value)}")


def _check_index(index: Tensor, prefix: Any, q: Tensor, images: int | None = None) -> int:
    """Raise unless the index and the prefix fit q; return the prefix as an int."""
    check_shape("index", index, "B K")
    check_index("index", index)
    check_same("q", q, "index", index)
    prefix = check_count("prefix", prefix, 0, q.shape[2] if images is None else sys.maxsize)
    if images is None and index.shape[0] != q.shape[0]:
        raise ValueError(f"index must have q's batch size {q.shape[0]}, got shape {shape_of(index)}")
    if images is not None and index.shape[0] != images:
        raise ValueError(f"index must have a row for each of the {images} images, got shape {shape_of(index)}")
    if images is None and index.shape[1] and prefix == q.shape[2]:
        raise ValueError(f"q of shape {shape_of(q)} has no query behind the prefix of {prefix} to be chosen")
    return prefix


def _check_offsets(offsets: Any, longest: Any, q: Tensor) -> tuple[int, int]:
    """Raise unless offsets and longest fit q; return longest as ints."""
    check_pair("offsets", offsets, "int32 tensors of shape (B + 1,)")
    if q.shape[0] != 1:
        raise ValueError(f"with offsets q, k and v hold the rows of all images, (1, H, T, D), got q {shape_of(q)}")
    check_pair("longest", longest, "counts")
    for name, bounds in zip(("offsets of queries", "offsets of keys"), offsets, strict=True):
        check_shape(name, bounds, "B")
        check_same("q", q, name, bounds)
        if bounds.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {bounds.dtype}")
        if shape_of(bounds) != shape_of(offsets[0]) or bounds.shape[0] < 1:
            raise ValueError(
                f"offsets must be of one length, images + 1, got {shape_of(offsets[0])} and {shape_of(offsets[1])}"
            )
    queries, keys = (check_count("longest", count, 0, 2**31 - 1) for count in longest)
    return queries, keys


def check_head_dim(q: Tensor) -> None:
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"the kernels take up to {MAX_HEAD_DIM} channels a head, got {q.shape[3]}; use 'reference'")


def attention_unchecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 1,
    scale: float | None = None,
    backend: Resolved,
) -> Tensor:
    """Call :func:`attention` without checks, by the backend named."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    prefix = 0 if index is None else prefix
    if backend == "reference":
        return reference.attention(q, k, v, scale, bias, index, prefix)
    if wants_gradient(q, k, v, bias):
        return Attention.apply(q, k, v, scale, bias, index, prefix)
    return forward(q, k, v, scale, bias, index, prefix)[0]


def attention_packed_unchecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 1,
    num_out: int | None = None,
    scale: float | None = None,
    backend: Resolved,
) -> Tensor:
    """Call :func:`attention_packed` without checks, by the backend named."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    prefix = 0 if index is None else prefix
    if backend == "reference":
        return reference.attention(q, k, v, scale, bias, index, prefix, offsets, num_out or 0)
    arguments = q, k, v, scale, bias, index, prefix, *offsets, *longest, num_out or 0
    return Attention.apply(*arguments) if wants_gradient(q, k, v, bias) else forward(*arguments)[0]


def attention_policy_unchecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    backend: Resolved,
) -> Tensor:
    """Call :func:`attention_policy` without checks, by the backend named."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if backend == "reference":
        return reference.attention_policy(q, k, v, policy, scale, eps)
    if wants_gradient(q, k, v, policy):
        return AttentionPolicy.apply(q, k, v, policy, scale, float(eps))
    return _policy_forward(q, k, v, policy, scale, float(eps))[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend, with a bias on every key (ToMe, section 3) or for chosen queries only (ATS, section 3.2).

    Equivalent PyTorch::

        rows = torch.cat([torch.arange(prefix).expand(B, prefix), index + prefix], dim=1)
        q = q.gather(2, rows[:, None, :, None].expand(-1, H, -1, D))  # with an index
        logits = scale * q @ k.transpose(2, 3) + bias[:, None, None, :]
        torch.softmax(logits, dim=-1) @ v  # zeros where every bias of the image is -inf

    The kernels keep no matrix of queries by keys.

    Args:
        q: (B, H, M, D) queries. float32, float16, bfloat16 (reference: any); logits and sums are float32.
        k: (B, H, N, D) keys, in q's dtype. Any strides; q, k and v with a dense last axis, such as views of a packed
            qkv, are not copied.
        v: (B, H, N, D) values, in q's dtype.
        bias: (B, N) floating point of any dtype, added to every query's logits (the logarithm of the tokens' sizes), or
            None. -inf hides a key from all queries; its rows of k and v must be finite. A query that sees no key gets
            zeros, and has no gradient.
        index: (B, K) int64 or int32, which of the M - prefix queries after the prefix attend, or None for all. No query
            is copied. Values are not checked; one may occur twice.
        prefix: number of leading queries that always attend; only with an index.
        scale: factor on the dot products; None means ``D ** -0.5``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, H, M, D), with an index (B, H, prefix + K, D), in q's dtype. Differentiable in q, k, v and bias.

    Raises:
        ValueError: wrong shapes, devices that differ, no head, key or channel, a prefix outside 0 .. M, or, for the
            kernels, more than 256 channels a head.
        TypeError: a tensor that is not floating point, q, k, v of several dtypes, an index not of integers.
    """
    check_qkv(q, k, v)
    if bias is not None:
        check_of_keys("bias", bias, q, k)
    if index is not None:
        prefix = _check_index(index, prefix, q)
    scale = check_scale(scale, q.shape[3])
    chosen = resolve(backend, q, k, v, *(() if bias is None else (bias,)))
    if chosen == "triton":
        check_head_dim(q)
    return attention_unchecked(q, k, v, bias=bias, index=index, prefix=prefix, scale=scale, backend=chosen)


def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 1,
    num_out: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend within packed images: as :func:`attention`, but all images lie in one row, each with its own keys.

    Equivalent PyTorch::

        for b in range(images):  # rows past the last image are zeros
            m, n = (slice(bounds[b], bounds[b + 1]) for bounds in offsets)
            out[:, :, m] = attention(q[:, :, m], k[:, :, n], v[:, :, n], bias=bias[:, n])
            kept = index[b : b + 1, : m.stop - m.start - prefix]  # with an index, q has the rows of k
            out[:, :, m] = attention(q[:, :, n], k[:, :, n], v[:, :, n], bias=bias[:, n], index=kept, prefix=prefix)

    Args:
        q: (1, H, T, D) queries of all images, as for :func:`attention`; with an index, a row for every key.
        k: (1, H, U, D) keys of all images. An image may have none.
        v: (1, H, U, D) values.
        offsets: of the queries and of the keys of every image, (images + 1,) int32 each, ascending from 0, on q's
            device. Values are not checked, and with kernels the host does not read them. With an index, the first
            offsets say where the results of the chosen queries lie.
        longest: upper bounds of the (chosen) queries and of the keys of an image.
        bias: (1, U) as for :func:`attention`, or None.
        index: (images, K) int64 or int32, positions among the patch tokens of the image, ascending and each once, with
            padding last, as for :func:`gather_packed`; or None for all.
        prefix: number of leading queries of every image that always attend; only with an index.
        num_out: rows of the result, at least ``offsets[0][images]``; with an index only.
        scale: factor on the dot products; None means ``D ** -0.5``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (1, H, T, D), with an index (1, H, num_out, D), in q's dtype. Differentiable in q, k, v and bias.

    Raises:
        ValueError: as :func:`attention`, and if B is not 1, or only one of index and num_out is given.
        TypeError: as :func:`attention`, and if offsets are not int32.
    """
    check_qkv(q, k, v, fewest_keys=0)
    if bias is not None:
        check_of_keys("bias", bias, q, k)
    longest = _check_offsets(offsets, longest, q)
    if index is not None:
        prefix = _check_index(index, prefix, q, offsets[0].shape[0] - 1)
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"queries chosen of packed images lie as the keys, got q {shape_of(q)}, k {shape_of(k)}")
        if num_out is None:
            raise ValueError("an index into packed images needs num_out, the rows of the result")
        num_out = check_count("num_out", num_out, 0, sys.maxsize)
    elif num_out is not None:
        raise ValueError(f"num_out={num_out} goes with an index only")
    scale = check_scale(scale, q.shape[3])
    chosen = resolve(backend, q, k, v, *(() if bias is None else (bias,)))
    if chosen == "triton":
        check_head_dim(q)
    options: dict[str, Any] = {"bias": bias, "index": index, "prefix": prefix, "num_out": num_out, "scale": scale}
    return attention_packed_unchecked(q, k, v, offsets, longest, **options, backend=chosen)


def attention_policy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Attend with keys softly hidden from all queries but their own (DynamicViT, section 3.3).

    Equivalent PyTorch::

        logits = scale * q @ k.transpose(2, 3)
        visible, own = policy[:, None, None, :], torch.eye(N)
        weights = torch.exp(logits - logits.amax(-1, keepdim=True)) * (visible + (1 - visible) * own)
        ((weights + eps / N) / (weights.sum(-1, keepdim=True) + eps)) @ v

    The kernels keep no matrix, the reference does.

    Args:
        q: (B, H, N, D) queries, as for :func:`attention`.
        k: (B, H, N, D) keys.
        v: (B, H, N, D) values.
        policy: (B, N) floating point, how visible each key is, 0 (hidden) .. 1 (not checked). Query m is token m.
            Hidden keys count for the maximum and for ``eps / N``.
        scale: factor on the dot products; None means ``D ** -0.5``.
        eps: smoothing of the weights, not negative.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, H, N, D) in q's dtype. Differentiable in q, k, v and policy.

    Raises:
        ValueError: as :func:`attention`, and if queries and keys differ in number, or eps is negative.
        TypeError: as :func:`attention`.
    """
    check_qkv(q, k, v)
    check_of_keys("policy", policy, q, k)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"a policy needs as many queries as keys, got {q.shape[2]} queries and {k.shape[2]} keys")
    eps = check_number("eps", eps, low=0.0)
    scale = check_scale(scale, q.shape[3])
    chosen = resolve(backend, q, k, v, policy)
    if chosen == "triton":
        check_head_dim(q)
    return attention_policy_unchecked(q, k, v, policy, scale=scale, eps=eps, backend=chosen)
