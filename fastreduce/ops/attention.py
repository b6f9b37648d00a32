"""``attention`` without the N x N matrix: with policy, bias, chosen queries, packed images; and what it says of keys.

Launches: forward 1, backward 2; with a policy 2 and 3; a differentiable bias adds 1 to the backward pass, an index 2,
of packed images 1.
``attention_scores``: forward 2 for the class token's attention, 3 for the received one; backward 2.
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
from ._library import dense_rows, differentiates_again, gradients_again, register, wants_gradient

__all__ = ["attention", "attention_logsumexp", "attention_scores"]

MAX_HEAD_DIM = 256  # of the kernels
KINDS = ("class", "received")


def _sequence_first(tensor: Tensor) -> Tensor:
    """(B, H, M, D) in the memory order (B, M, H, D), which the next projection reads without a copy."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_like(tensor: Tensor, rows: int | None = None) -> Tensor:
    batch, heads, own_rows, head_dim = tensor.shape
    return tensor.new_empty(batch, own_rows if rows is None else rows, heads, head_dim).transpose(1, 2)


def _pair(query_offsets: Tensor | None, key_offsets: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if query_offsets is None or key_offsets is None else (query_offsets, key_offsets)


def _triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    scale: float,
    eps: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    num_out: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import attention as kernels

    offsets, longest = _pair(query_offsets, key_offsets), (longest_queries, longest_keys)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    return kernels.attention(q, k, v, policy, scale, eps, bias, index, prefix, offsets, longest, num_out)


def _reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    scale: float,
    eps: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    num_out: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    offsets = _pair(query_offsets, key_offsets)
    out, *sums = reference.attention_with_sums(q, k, v, policy, scale, eps, bias, index, prefix, offsets, num_out)
    return _sequence_first(out), sums[0], sums[1], sums[2]


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    scale: float,
    eps: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    num_out: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, queries, head_dim = q.shape
    if index is not None:
        queries = prefix + index.shape[1] if query_offsets is None else num_out
    dtype = reference.accumulator(q.dtype)
    logsumexp = q.new_empty(batch, heads, queries, dtype=dtype)
    total = q.new_empty(batch, heads, 0 if policy is None else queries, dtype=dtype)
    mean = q.new_empty(batch, heads, 0 if policy is None else head_dim, dtype=dtype)
    return _empty_like(q, queries), logsumexp, total, mean


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
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    grad_logsumexp: Tensor | None = None,
    grad_scores: Tensor | None = None,
    kind: str = "",
    with_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import attention as kernels

    offsets, longest = _pair(query_offsets, key_offsets), (longest_queries, longest_keys)
    grad, q, k, v = dense_rows(grad), dense_rows(q), dense_rows(k), dense_rows(v)
    grads = kernels.attention_backward(
        *(grad, q, k, v, policy, out, logsumexp, total, mean, scale, eps),
        *(bias, index, prefix, offsets, longest, grad_logsumexp, grad_scores, kind, with_bias),
    )
    if index is None:
        return grads
    of_chosen = grads[0].transpose(1, 2).flatten(2)
    if offsets is not None:
        from ..kernels import gather_packed

        rows = gather_packed.gather_packed_backward(of_chosen, index, offsets[1], offsets[0], prefix, q.shape[2])
    else:
        from ..kernels import merge_tokens

        # Queries that an index names twice add up.
        rows = merge_tokens.sum_slots(of_chosen, reference.with_prefix(index, prefix), q.shape[2])
    return rows.unflatten(2, (q.shape[1], q.shape[3])).transpose(1, 2), *grads[1:]


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
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    grad_logsumexp: Tensor | None = None,
    grad_scores: Tensor | None = None,
    kind: str = "",
    with_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    offsets = _pair(query_offsets, key_offsets)
    *grads, grad_keys = reference.attention_backward(
        *(grad, q, k, v, policy, out, logsumexp, total, mean, scale, eps),
        *(bias, index, prefix, offsets, grad_logsumexp, grad_scores, kind),
    )
    if bias is not None and not with_bias:
        grad_keys = grad_keys.new_empty(q.shape[0], 0)
    return _sequence_first(grads[0]), _sequence_first(grads[1]), _sequence_first(grads[2]), grad_keys


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
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 0,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    longest_queries: int = 0,
    longest_keys: int = 0,
    grad_logsumexp: Tensor | None = None,
    grad_scores: Tensor | None = None,
    kind: str = "",
    with_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_keys = policy if policy is not None else bias
    if of_keys is None:
        grad_keys = q.new_empty(q.shape[0], 0)
    else:
        grad_keys = of_keys.new_empty(q.shape[0], k.shape[2] if policy is not None or with_bias else 0)
    return _empty_like(q), _empty_like(k), _empty_like(v), grad_keys


def _fake_scores(
    q: Tensor, k: Tensor, logsumexp: Tensor, kind: str, bias: Tensor | None, prefix: int, scale: float
) -> Tensor:
    return logsumexp.new_empty(k.shape[0], k.shape[2] - (prefix if kind == "class" else 0))


_OPTIONS = (
    "Tensor? bias=None, Tensor? index=None, int prefix=0, Tensor? query_offsets=None, Tensor? key_offsets=None,"
    " SymInt longest_queries=0, SymInt longest_keys=0"
)
_forward = register(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? policy, float scale, float eps, {_OPTIONS}, SymInt num_out=0)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    triton=_triton_forward,
    reference=_reference_forward,
    fake=_fake_forward,
)
_backward = register(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? policy, Tensor out, Tensor logsumexp,"
    f" Tensor total, Tensor mean, float scale, float eps, {_OPTIONS}, Tensor? grad_logsumexp=None,"
    ' Tensor? grad_scores=None, str kind="", bool with_bias=True) -> (Tensor, Tensor, Tensor, Tensor)',
    triton=_triton_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)
_scores = register(
    "attention_scores(Tensor q, Tensor k, Tensor logsumexp, str kind, Tensor? bias, int prefix, float scale) -> Tensor",
    triton="attention.key_scores",
    dense="q k",
    reference=reference.key_scores,
    fake=_fake_scores,
)


class Attention(torch.autograd.Function):
    """The result and its logsumexp. Gradient: the logits once more in tiles, from the sums of every row."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        policy: Tensor | None,
        scale: float,
        eps: float,
        bias: Tensor | None = None,
        index: Tensor | None = None,
        prefix: int = 0,
        query_offsets: Tensor | None = None,
        key_offsets: Tensor | None = None,
        longest_queries: int = 0,
        longest_keys: int = 0,
        num_out: int = 0,
    ) -> tuple[Tensor, Tensor]:
        options = (bias, index, prefix, query_offsets, key_offsets, longest_queries, longest_keys, num_out)
        out, logsumexp, total, mean = _forward(q, k, v, policy, scale, eps, *options)
        ctx.save_for_backward(q, k, v, policy, out, logsumexp, total, mean, bias, index, query_offsets, key_offsets)
        ctx.numbers = (scale, eps, prefix, longest_queries, longest_keys)
        ctx.set_materialize_grads(False)
        if policy is not None:
            ctx.mark_non_differentiable(logsumexp)
        return out, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, bias, index, query_offsets, key_offsets = ctx.saved_tensors
        scale, eps, prefix, *longest = ctx.numbers
        upstream, grad_logsumexp = grads
        if upstream is None and grad_logsumexp is None:
            return (None,) * 14
        if differentiates_again():
            q, k, v, policy, out = saved[:5]
            inputs = q, k, v, policy, scale, eps, bias, index, prefix, _pair(query_offsets, key_offsets), out.shape[2]
            found = gradients_again(reference.attention_with_sums, inputs, grads)
            return *found[:9], *[None] * 5
        with_bias = len(ctx.needs_input_grad) > 6 and ctx.needs_input_grad[6]
        grad_q, grad_k, grad_v, grad_keys = _backward(
            torch.zeros_like(saved[4]) if upstream is None else upstream,
            *(*saved, scale, eps, bias, index, prefix, query_offsets, key_offsets, *longest),
            *(grad_logsumexp, None, "", with_bias),
        )
        grad_policy = grad_keys if ctx.needs_input_grad[3] else None
        grad_bias = grad_keys if len(ctx.needs_input_grad) > 6 and ctx.needs_input_grad[6] else None
        return grad_q, grad_k, grad_v, grad_policy, None, None, grad_bias, *[None] * 7


def _attention_scores(
    q: Tensor, k: Tensor, v: Tensor, kind: str, bias: Tensor | None, prefix: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As ``reference.attention_scores``, of operators that all have second derivatives."""
    out, logsumexp, *_ = reference.attention_with_sums(q, k, v, None, scale, 0.0, bias)
    return out, reference.key_scores(q, k, logsumexp, kind, bias, prefix, scale)


class AttentionScores(torch.autograd.Function):
    """The result and the scores of the keys. Gradient: both in one, the scores' at the cost of one sweep over K."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kind: str, bias: Tensor | None, prefix: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, logsumexp, total, mean = _forward(q, k, v, None, scale, 0.0, bias)
        ctx.save_for_backward(q, k, v, out, logsumexp, total, mean, bias)
        ctx.kind, ctx.prefix, ctx.scale = kind, prefix, scale
        ctx.set_materialize_grads(False)
        return out, _scores(q, k, logsumexp, kind, bias, prefix, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp, total, mean, bias = ctx.saved_tensors
        upstream, grad_scores = grads
        if upstream is None and grad_scores is None:
            return (None,) * 7
        if differentiates_again():
            inputs = q, k, v, ctx.kind, bias, ctx.prefix, ctx.scale
            return tuple(gradients_again(_attention_scores, inputs, grads))
        grad_q, grad_k, grad_v, grad_bias = _backward(
            torch.zeros_like(out) if upstream is None else upstream,
            *(q, k, v, None, out, logsumexp, total, mean, ctx.scale, 0.0, bias, None, ctx.prefix),
            *(None, None, 0, 0, None, grad_scores, ctx.kind, ctx.needs_input_grad[4]),
        )
        return grad_q, grad_k, grad_v, None, grad_bias if ctx.needs_input_grad[4] else None, None, None


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, *, fewest_keys: int = 1) -> None:
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


def _check_of_keys(name: str, value: Tensor, q: Tensor, k: Tensor) -> None:
    check_shape(name, value, "B N")
    check_floating(name, value)
    check_same("q", q, name, value)
    if shape_of(value) != (k.shape[0], k.shape[2]):
        raise ValueError(f"{name} must have shape {(k.shape[0], k.shape[2])}, one entry a key, got {shape_of(value)}")


def _check_index(index: Tensor, prefix: Any, q: Tensor, images: int | None = None) -> int:
    """Raise if they do not fit together; returns the prefix as an int."""
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
    """Raise if they do not fit together; returns longest as ints."""
    check_pair("offsets", offsets, "int32 tensors of shape (B + 1,)")
    if q.shape[0] != 1:
        raise ValueError(f"with offsets q, k and v hold the rows of all images, (1, H, T, D), got q {shape_of(q)}")
    if longest is None:
        raise ValueError("offsets need longest=(most queries of an image, most keys of an image)")
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


def _check_head_dim(q: Tensor) -> None:
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"the kernels take up to {MAX_HEAD_DIM} channels a head, got {q.shape[3]}; use 'reference'")


def attention_unchecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    policy: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 1,
    offsets: tuple[Tensor, Tensor] | None = None,
    longest: tuple[int, int] | None = None,
    num_out: int | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    backend: Resolved,
) -> Tensor:
    """:func:`attention` without checks, by the backend named."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    prefix = 0 if index is None else prefix
    if backend == "reference":
        return reference.attention(q, k, v, policy, scale, eps, bias, index, prefix, offsets, num_out or 0)
    arguments: tuple[Any, ...] = q, k, v, policy, scale, float(eps), bias, index, prefix
    if offsets is not None:
        arguments = *arguments, *offsets, *(longest or (0, 0)), num_out or 0
    if wants_gradient(q, k, v, policy, bias):
        return Attention.apply(*arguments)[0]
    return _forward(*arguments)[0]


def attention_logsumexp_unchecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 1,
    scale: float | None = None,
    backend: Resolved,
) -> tuple[Tensor, Tensor]:
    """:func:`attention_logsumexp` without checks, by the backend named."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    arguments = q, k, v, None, scale, 0.0, bias, index, 0 if index is None else prefix
    if backend == "reference":
        return reference.attention_with_sums(*arguments)[:2]
    return Attention.apply(*arguments) if wants_gradient(q, k, v, bias) else _forward(*arguments)[:2]


def attention_scores_unchecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str,
    bias: Tensor | None = None,
    prefix: int = 1,
    scale: float | None = None,
    backend: Resolved,
) -> tuple[Tensor, Tensor]:
    """:func:`attention_scores` without checks, by the backend named."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if backend == "reference":
        return reference.attention_scores(q, k, v, kind, bias, prefix, scale)
    if wants_gradient(q, k, v, bias):
        return AttentionScores.apply(q, k, v, kind, bias, prefix, scale)
    out, logsumexp, *_ = _forward(q, k, v, None, scale, 0.0, bias)
    return out, _scores(q, k, logsumexp, kind, bias, prefix, scale)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    policy: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 1,
    offsets: tuple[Tensor, Tensor] | None = None,
    longest: tuple[int, int] | None = None,
    num_out: int | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Attend: with a bias on every key, for chosen queries only, within packed images, or with keys softly hidden.

    The bias is that of ToMe (section 3), the queries are those of ATS (section 3.2), and a policy hides keys from all
    queries but their own (DynamicViT, section 3.3).

    Equivalent PyTorch::

        rows = torch.cat([torch.arange(prefix).expand(B, prefix), index + prefix], dim=1)
        q = q.gather(2, rows[:, None, :, None].expand(-1, H, -1, D))  # with an index
        logits = scale * q @ k.transpose(2, 3) + bias[:, None, None, :]
        torch.softmax(logits, dim=-1) @ v  # zeros, where every bias of the image is -inf

        own = torch.eye(N)  # with a policy
        visible = policy[:, None, None, :]
        weights = torch.exp(logits - logits.amax(-1, keepdim=True)) * (visible + (1 - visible) * own)
        ((weights + eps / N) / (weights.sum(-1, keepdim=True) + eps)) @ v

        for b in range(images):  # with offsets; rows past the last image are zeros
            m, n = (slice(bounds[b], bounds[b + 1]) for bounds in offsets)
            out[:, :, m] = attention(q[:, :, m], k[:, :, n], v[:, :, n], bias=bias[:, n])
            kept = index[b : b + 1, : m.stop - m.start - prefix]  # with an index too: q lies as k does
            out[:, :, m] = attention(q[:, :, n], k[:, :, n], v[:, :, n], bias=bias[:, n], index=kept, prefix=prefix)

    The kernels keep no matrix of queries by keys, forward or backward; the reference does with a policy. One launch
    forward, two backward; a policy adds one to each; a bias that needs a gradient adds one backward, an index two, with
    offsets one.

    Args:
        q: (B, H, M, D) queries. float32, float16, bfloat16 (reference: any); logits and sums are float32.
        k: (B, H, N, D) keys, in q's dtype. Any strides; with a dense last axis, as views of a packed qkv have it,
            neither q nor k nor v is copied.
        v: (B, H, N, D) values, in q's dtype.
        policy: (B, N) floating point, how visible each key is, 0 (hidden) .. 1 (not checked), or None for plain
            attention. Query m is token m, so M must equal N. Hidden keys count for the maximum and for ``eps / N``.
            Not together with a bias, an index or offsets.
        bias: (B, N) floating point of any dtype, added to every query's logits (the logarithm of the tokens' sizes), or
            None. -inf for a key that nobody sees; its rows of k and v must be finite. A query that sees no key gets
            zeros, and has no gradient.
        index: (B, K) int64 or int32, positions among the M - prefix queries after the prefix, of those that attend, or
            None for all. They are read where they are. Values are not checked; one may occur twice. With offsets
            (images, K), positions among the patch tokens of the image, ascending and each once, those that are real
            first, as for :func:`gather_packed`.
        prefix: number of leading queries, with offsets of every image, that always attend; only with an index.
        offsets: of the queries and of the keys of every image, (images + 1,) int32 each, ascending from 0, on q's
            device, or None. Then B is 1. Values are not checked, nor read by the host if kernels run. With an index
            the first say where the chosen queries' results lie, and q has a row for every key.
        longest: upper bounds of the queries (of the chosen ones) and of the keys of an image; with offsets only.
        num_out: rows of the result, at least ``offsets[0][images]``; with both an index and offsets only.
        scale: factor on the dot products; None means ``D ** -0.5``.
        eps: smoothing of the weights under a policy, not negative; plain attention has none.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, H, M, D), with an index (B, H, prefix + K, D), of packed images (1, H, num_out, D), in q's dtype.
        Differentiable in q, k, v, policy and bias.

    Raises:
        ValueError: wrong shapes, devices that differ, no head, key or channel (with offsets there may be no key), a
            negative eps, a prefix outside 0 .. M, options that exclude one another, or more than 256 channels a head
            for the kernels.
        TypeError: a tensor that is not floating point, q, k, v of several dtypes, an index or offsets not of integers.
    """
    _check_qkv(q, k, v, fewest_keys=1 if offsets is None else 0)
    for name, option in (("bias", bias), ("index", index), ("offsets", offsets)):
        if policy is not None and option is not None:
            raise ValueError(f"policy and {name} exclude one another")
    if policy is not None:
        _check_of_keys("policy", policy, q, k)
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"a policy needs as many queries as keys, got {q.shape[2]} queries and {k.shape[2]} keys")
    if bias is not None:
        _check_of_keys("bias", bias, q, k)
    if offsets is not None:
        longest = _check_offsets(offsets, longest, q)
    elif longest is not None:
        raise ValueError(f"longest={longest} goes with offsets only")
    if index is not None:
        prefix = _check_index(index, prefix, q, None if offsets is None else offsets[0].shape[0] - 1)
    if index is not None and offsets is not None:
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"queries chosen of packed images lie as the keys, got q {shape_of(q)}, k {shape_of(k)}")
        if num_out is None:
            raise ValueError("an index with offsets needs num_out, the rows of the result")
        num_out = check_count("num_out", num_out, 0, sys.maxsize)
    elif num_out is not None:
        raise ValueError(f"num_out={num_out} goes with both an index and offsets only")
    eps = check_number("eps", eps, low=0.0)
    scale = check_scale(scale, q.shape[3])
    chosen = resolve(backend, q, k, v, *(tensor for tensor in (policy, bias) if tensor is not None))
    if chosen == "triton":
        _check_head_dim(q)
    packed: dict[str, Any] = {"offsets": offsets, "longest": longest, "num_out": num_out}
    options: dict[str, Any] = {
        "policy": policy,
        "bias": bias,
        "index": index,
        "prefix": prefix,
        "scale": scale,
        "eps": eps,
    }
    return attention_unchecked(q, k, v, **options, **packed, backend=chosen)


def attention_logsumexp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    prefix: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention`, and the logsumexp of every query's logits, with which parts of the keys can be put together.

    Equivalent PyTorch::

        logits = scale * q @ k.transpose(2, 3) + bias[:, None, None, :]
        torch.softmax(logits, dim=-1) @ v, torch.logsumexp(logits, dim=-1)

    Launches as :func:`attention`: the sums are there in any case. The reference keeps the matrix of logits.

    Args:
        q: (B, H, M, D) queries, as for :func:`attention`.
        k: (B, H, N, D) keys.
        v: (B, H, N, D) values.
        bias: (B, N) or None.
        index: (B, K) or None.
        prefix: number of leading queries that always attend; only with an index.
        scale: factor on the dot products; None means ``D ** -0.5``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        The result as of :func:`attention`, and (B, H, M) or (B, H, prefix + K), float32 (float64 for float64 inputs),
        -inf for a query that sees no key. Both differentiable in q, k, v and bias.

    Raises:
        ValueError: as :func:`attention`.
        TypeError: as :func:`attention`.
    """
    _check_qkv(q, k, v)
    if bias is not None:
        _check_of_keys("bias", bias, q, k)
    if index is not None:
        prefix = _check_index(index, prefix, q)
    scale = check_scale(scale, q.shape[3])
    chosen = resolve(backend, q, k, v, *(() if bias is None else (bias,)))
    if chosen == "triton":
        _check_head_dim(q)
    options: dict[str, Any] = {"bias": bias, "index": index, "prefix": prefix, "scale": scale}
    return attention_logsumexp_unchecked(q, k, v, **options, backend=chosen)


def attention_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str,
    bias: Tensor | None = None,
    prefix: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention`, and how much attention the keys get: from the sums of the same pass, without the matrix.

    Equivalent PyTorch::

        weights = torch.softmax(scale * q @ k.transpose(2, 3) + bias[:, None, None, :], dim=-1)
        weights @ v, weights[:, :, 0, prefix:].mean(1)  # kind="class": cls_scores(q[:, :, 0], k, prefix=prefix)
        weights @ v, weights.sum((1, 2))  # kind="received": received_scores(q, k)

    Two launches forward for the class token's attention, which reads K once more; three for the received one, of which
    the second computes the logits again and the third adds up the heads. Backward two, whatever has a gradient; that of
    the scores costs one more product of q and k (with ``kind="class"`` for the first tile of queries only).

    Args:
        q: (B, H, M, D) queries, as for :func:`attention`; ``kind="class"``: the class token's is the first.
        k: (B, H, N, D) keys.
        v: (B, H, N, D) values.
        kind: ``"class"`` or ``"received"``.
        bias: (B, N) as for :func:`attention`, or None; the scores are those of the biased logits.
        prefix: number of leading keys that get no score; for ``kind="class"`` only.
        scale: factor on the dot products; None means ``D ** -0.5``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context. No backend holds the matrix of
            a long sequence: the kernels no N x N at all, the reference 2 ** 20 logits an image outside autograd.

    Returns:
        (B, H, M, D) in q's dtype, and (B, N - prefix) or, received, (B, N), float32 (float64 for float64 inputs).
        Both differentiable in q, k, v and bias.

    Raises:
        ValueError: an unknown kind, no query to take the class token's attention from; else as :func:`attention`.
        TypeError: as :func:`attention`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    _check_qkv(q, k, v)
    if bias is not None:
        _check_of_keys("bias", bias, q, k)
    if kind == "class":
        prefix = check_count("prefix", prefix, 0, k.shape[2])
        if q.shape[2] == 0:
            raise ValueError(f"q must have the class token's query first, got shape {shape_of(q)}")
    else:
        prefix = 0
    scale = check_scale(scale, q.shape[3])
    chosen = resolve(backend, q, k, v, *(() if bias is None else (bias,)))
    if chosen == "triton":
        _check_head_dim(q)
    return attention_scores_unchecked(q, k, v, kind=kind, bias=bias, prefix=prefix, scale=scale, backend=chosen)
