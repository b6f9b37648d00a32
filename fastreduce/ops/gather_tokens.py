"""``gather_tokens``: the rows that stay, in one pass with the residual addition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import resolve
from ._check import check_floating, check_index, check_same, check_shape, shape_of
from ._library import dense_rows, register

__all__ = ["gather_tokens"]


def _triton_forward(x: Tensor, index: Tensor, prefix: int, residual: Tensor | None) -> Tensor:
    from ..kernels import gather_tokens as kernels

    return kernels.gather_tokens(dense_rows(x), index, prefix, None if residual is None else dense_rows(residual))


def _triton_backward(grad: Tensor, index: Tensor, prefix: int, num_in: int) -> Tensor:
    from ..kernels import merge_tokens as kernels

    rows = reference.with_prefix(index, prefix)
    return kernels.sum_slots(dense_rows(grad), rows, num_in)


def _fake_forward(x: Tensor, index: Tensor, prefix: int, residual: Tensor | None) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape[0], prefix + index.shape[1], x.shape[2], dtype=dtype)


def _fake_backward(grad: Tensor, index: Tensor, prefix: int, num_in: int) -> Tensor:
    return grad.new_empty(grad.shape[0], num_in, grad.shape[2])


_forward = register(
    "gather_tokens(Tensor x, Tensor index, int prefix, Tensor? residual) -> Tensor",
    triton=_triton_forward,
    reference=reference.gather_tokens,
    fake=_fake_forward,
)
_backward = register(
    "gather_tokens_backward(Tensor grad, Tensor index, int prefix, SymInt num_in) -> Tensor",
    triton=_triton_backward,
    reference=reference.scatter_tokens,
    fake=_fake_backward,
)


class GatherTokens(torch.autograd.Function):
    """Gradient: the rows go back where they came from; the residual's gradient is the output's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, prefix: int, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(index)
        ctx.prefix, ctx.num_in, ctx.x_dtype = prefix, x.shape[1], x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return _forward(x, index, prefix, residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        grad = grads[0]
        grad_x = grad_residual = None
        if ctx.needs_input_grad[0]:
            grad_x = _backward(grad, ctx.saved_tensors[0], ctx.prefix, ctx.num_in).to(ctx.x_dtype)
        if ctx.needs_input_grad[3]:
            grad_residual = grad.to(ctx.residual_dtype)
        return grad_x, None, None, grad_residual


def gather_tokens(
    x: Tensor, index: Tensor, *, prefix: int = 1, residual: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Keep the prefix and the chosen patch tokens, in the order of ``index``, and add a residual to them.

    Equivalent PyTorch::

        rows = torch.cat([torch.arange(prefix).expand(B, prefix), index + prefix], dim=1)
        x.gather(1, rows.unsqueeze(-1).expand(-1, -1, C)) + residual

    Args:
        x: (B, N, C) tokens, the first ``prefix`` of them are always kept. float32, float16, bfloat16 (reference: any).
        index: (B, K) int64 or int32, positions among the N - prefix patch tokens. Values are not checked.
            An index may occur twice; its gradients add up.
        prefix: number of leading tokens that are never reduced (class, distillation, registers).
        residual: (B, prefix + K, C) to be added, or None.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, prefix + K, C), in x's dtype or, with a residual, the promoted one. Differentiable in x and residual.

    Raises:
        ValueError: wrong shapes, devices that differ, a prefix outside 0 .. N.
        TypeError: x not floating point, index not an integer tensor.
    """
    check_shape("x", x, "B N C")
    check_shape("index", index, "B K")
    check_floating("x", x)
    check_index("index", index)
    check_same("x", x, "index", index)
    if not 0 <= prefix <= x.shape[1]:
        raise ValueError(f"prefix must be between 0 and the number of tokens {x.shape[1]}, got {prefix}")
    if index.shape[0] != x.shape[0]:
        raise ValueError(f"index must have x's batch size {x.shape[0]}, got shape {shape_of(index)}")
    if residual is not None:
        check_same("x", x, "residual", residual)
        expected = (x.shape[0], prefix + index.shape[1], x.shape[2])
        if shape_of(residual) != expected:
            raise ValueError(f"residual must have shape {expected}, got {shape_of(residual)}")
    if resolve(backend, x, *(() if residual is None else (residual,))) == "reference":
        return reference.gather_tokens(x, index, prefix, residual)
    return GatherTokens.apply(x, index, prefix, residual)
