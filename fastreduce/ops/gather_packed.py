"""``gather_packed`` and ``unpack_tokens``: images of different lengths in one row of tokens, without padding."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import (
    check_bool,
    check_count,
    check_floating,
    check_index,
    check_pair,
    check_same,
    check_shape,
    shape_of,
)
from ._library import differentiates_again, operator, wants_gradient

__all__ = ["check_offsets", "gather_packed", "token_offsets", "unpack_tokens"]


def check_offsets(name: str, offsets: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless ``offsets`` are (B + 1,) int32 on the device of ``like``."""
    check_shape(name, offsets, "B+1")
    check_same(like_name, like, name, offsets)
    if offsets.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {offsets.dtype}")
    if offsets.shape[0] < 1:
        raise ValueError(f"{name} must have one entry more than there are images, got shape {shape_of(offsets)}")


def _check_packed(name: str, tensor: Tensor) -> None:
    """Raise unless the tensor is (1, T, C) floating point."""
    check_shape(name, tensor, "1 T C")
    check_floating(name, tensor)
    if tensor.shape[0] != 1:
        raise ValueError(f"{name} must have shape (1, T, C), got {shape_of(tensor)}")


@operator("gather_packed.token_offsets", reference.token_offsets)
def _offsets(valid: Tensor) -> Tensor:
    return valid.new_empty(valid.shape[0] + 1, dtype=torch.int32)


def token_offsets_unchecked(valid: Tensor, *, backend: Resolved) -> Tensor:
    """Call :func:`token_offsets` without checks, by the backend named."""
    return reference.token_offsets(valid) if backend == "reference" else _offsets(valid)


def token_offsets(valid: Tensor, *, backend: str | None = None) -> Tensor:
    """Return where the tokens of every image begin when packed, and where the last image ends.

    Equivalent PyTorch::

        torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).int()

    Args:
        valid: (B, N) bool, which tokens are real.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B + 1,) int32 on the device of ``valid``; the host does not wait for it.

    Raises:
        ValueError: a wrong shape.
        TypeError: valid not bool.
    """
    check_shape("valid", valid, "B N")
    check_bool("valid", valid)
    return token_offsets_unchecked(valid, backend=resolve(backend, valid))


@operator("gather_packed.gather_packed", reference.gather_packed, dense="x residual", whole="source target")
def _gather(
    x: Tensor, index: Tensor, source: Tensor, target: Tensor, prefix: int, num_out: int, residual: Tensor | None
) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(1, num_out, x.shape[2], dtype=dtype)


@operator("gather_packed.gather_packed_backward", reference.gather_packed_backward, dense="grad", whole="source target")
def _gather_backward(grad: Tensor, index: Tensor, source: Tensor, target: Tensor, prefix: int, num_in: int) -> Tensor:
    return grad.new_empty(1, num_in, grad.shape[2])


class GatherPacked(torch.autograd.Function):
    """Kept rows. Each gets the gradient of the row that it became; the residual gets the output's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor,
        source: Tensor,
        target: Tensor,
        prefix: int,
        num_out: int,
        residual: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(index, source, target)
        ctx.prefix, ctx.num_in, ctx.x_dtype = prefix, x.shape[1], x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return _gather(x, index, source, target, prefix, num_out, residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_residual = None
        if ctx.needs_input_grad[0]:
            backward: Any = reference.gather_packed_backward if differentiates_again() else _gather_backward
            grad_x = backward(grads[0], *ctx.saved_tensors, ctx.prefix, ctx.num_in).to(ctx.x_dtype)
        if ctx.needs_input_grad[6]:
            grad_residual = grads[0].to(ctx.residual_dtype)
        return grad_x, None, None, None, None, None, grad_residual


def gather_packed_unchecked(
    x: Tensor,
    index: Tensor,
    offsets: tuple[Tensor, Tensor],
    *,
    num_out: int,
    prefix: int = 1,
    residual: Tensor | None = None,
    backend: Resolved,
) -> Tensor:
    """Call :func:`gather_packed` without checks, by the backend named."""
    arguments = x, index, *offsets, prefix, num_out, residual
    if backend == "reference":
        return reference.gather_packed(*arguments)
    return GatherPacked.apply(*arguments) if wants_gradient(x, residual) else _gather(*arguments)


def gather_packed(
    x: Tensor,
    index: Tensor,
    offsets: tuple[Tensor, Tensor],
    *,
    num_out: int,
    prefix: int = 1,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Keep the prefix and the chosen patch tokens of every image, packed, and add a residual to them.

    As :func:`gather_tokens`, but every image has, and keeps, its own number of tokens. The tokens of image b are the
    rows ``offsets[b] .. offsets[b + 1]``, without padding between images. The numbers stay on the device.

    Equivalent PyTorch, for image b::

        source, target = offsets
        kept = index[b, : target[b + 1] - target[b] - prefix]
        rows = source[b] + torch.cat([torch.arange(prefix), prefix + kept])
        out[0, target[b] : target[b + 1]] = x[0, rows] + residual[0, target[b] : target[b + 1]]

    Args:
        x: (1, T, C) packed tokens. float32, float16, bfloat16 (reference: any).
        index: (B, K) int64 or int32, positions among the image's own patch tokens, ascending and each once, with
            padding last, as :func:`sample_tokens` gives them. Values are not checked.
        offsets: two tensors (B + 1,) int32 from 0: where the images begin in x, and where they begin in the result
            (:func:`token_offsets`). Values are not checked.
        num_out: rows of the result, at least ``offsets[1][B]``. ``B * (prefix + K)`` is always enough, so the host need
            not wait for the device.
        prefix: number of leading tokens of every image that are never reduced (class, distillation, registers).
        residual: (1, num_out, C) to be added, or None.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (1, num_out, C), in x's dtype or, with a residual, the promoted one; zeros from row ``offsets[1][B]`` on.
        Differentiable in x and residual; the gradient of the residual means nothing in these rows.

    Raises:
        ValueError: wrong shapes, devices that differ, a negative prefix or num_out.
        TypeError: x not floating point, index not an integer tensor, offsets not int32.
    """
    _check_packed("x", x)
    check_shape("index", index, "B K")
    check_index("index", index)
    check_same("x", x, "index", index)
    check_pair("offsets", offsets, "int32 tensors of shape (B + 1,)")
    source, target = offsets
    check_offsets("offsets[0]", source, "x", x)
    check_offsets("offsets[1]", target, "x", x)
    if not index.shape[0] == source.shape[0] - 1 == target.shape[0] - 1:
        raise ValueError(
            f"index {shape_of(index)} and offsets {shape_of(source)}, {shape_of(target)} must be of as many images"
        )
    prefix = check_count("prefix", prefix, 0, sys.maxsize)
    num_out = check_count("num_out", num_out, 0, sys.maxsize)
    if residual is not None:
        _check_packed("residual", residual)
        check_same("x", x, "residual", residual)
        if shape_of(residual) != (1, num_out, x.shape[2]):
            raise ValueError(f"residual must have shape {(1, num_out, x.shape[2])}, got {shape_of(residual)}")
    chosen = resolve(backend, x, *(() if residual is None else (residual,)))
    options: dict[str, Any] = {"num_out": num_out, "prefix": prefix, "residual": residual}
    return gather_packed_unchecked(x, index, (source, target), **options, backend=chosen)


@operator("gather_packed.unpack_tokens", reference.unpack_tokens, dense="x", whole="offsets")
def _unpack(x: Tensor, offsets: Tensor, longest: int) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, longest, x.shape[2])


@operator("gather_packed.unpack_tokens_backward", reference.unpack_tokens_backward, dense="grad", whole="offsets")
def _unpack_backward(grad: Tensor, offsets: Tensor, num_in: int) -> Tensor:
    return grad.new_empty(1, num_in, grad.shape[2])


class UnpackTokens(torch.autograd.Function):
    """Padded rows; their gradient is packed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, longest: int) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.num_in = x.shape[1]
        return _unpack(x, offsets, longest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        backward = reference.unpack_tokens_backward if differentiates_again() else _unpack_backward
        return backward(grads[0], ctx.saved_tensors[0], ctx.num_in), None, None


def unpack_tokens_unchecked(x: Tensor, offsets: Tensor, *, longest: int, backend: Resolved) -> Tensor:
    """Call :func:`unpack_tokens` without checks, by the backend named."""
    if backend == "reference":
        return reference.unpack_tokens(x, offsets, longest)
    return UnpackTokens.apply(x, offsets, longest) if wants_gradient(x) else _unpack(x, offsets, longest)


def unpack_tokens(x: Tensor, offsets: Tensor, *, longest: int, backend: str | None = None) -> Tensor:
    """Unpack tokens to one row for each image, with zeros behind shorter images.

    Equivalent PyTorch::

        images = x[0, : offsets[-1]].split(offsets.diff().tolist())
        torch.nn.utils.rnn.pad_sequence(images, batch_first=True)  # (B, longest, C)

    Args:
        x: (1, T, C) packed tokens, at least ``offsets[B]``. float32, float16, bfloat16 (reference: any).
        offsets: (B + 1,) int32, where the images begin, from 0. Values are not checked.
        longest: tokens of an image in the result, at least as many as the longest image has (not checked).
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, longest, C) in x's dtype, differentiable in x.

    Raises:
        ValueError: wrong shapes, devices that differ, a negative longest.
        TypeError: x not floating point, offsets not int32.
    """
    _check_packed("x", x)
    check_offsets("offsets", offsets, "x", x)
    longest = check_count("longest", longest, 0, sys.maxsize)
    return unpack_tokens_unchecked(x, offsets, longest=longest, backend=resolve(backend, x))
