"""``rotate_tokens``: rotary positions of tokens, each with the patch at whose position it stands."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import reference
from ..backends import Resolved, resolve
from ._check import check_count, check_floating, check_index, check_pair, check_same, check_shape, shape_of
from ._library import differentiates_again, operator, wants_gradient

__all__ = ["rotate_tokens"]

Layout = Literal["interleaved", "half"]


def _like(x: Tensor) -> Tensor:
    """Return an empty tensor of x's shape (B, H, N, D) in the memory order (B, N, H, D)."""
    batch, heads, tokens, channels = x.shape
    return x.new_empty(batch, tokens, heads, channels).transpose(1, 2)


def _laid_out(x: Tensor) -> Tensor:
    """Return x (B, H, N, D) with the strides that the kernel gives its result."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@operator(
    "rotate_tokens.rotate_tokens",
    lambda *arguments: _laid_out(reference.rotate_tokens(*arguments)),
    dense="x cos sin",
)
def _forward(x: Tensor, cos: Tensor, sin: Tensor, place: Tensor | None, prefix: int, half: bool) -> Tensor:
    return _like(x)


@operator(
    "rotate_tokens.rotate_tokens_backward",
    lambda *arguments: _laid_out(reference.rotate_tokens_backward(*arguments)),
    dense="grad cos sin",
)
def _backward(grad: Tensor, cos: Tensor, sin: Tensor, place: Tensor | None, prefix: int, half: bool) -> Tensor:
    return _like(grad)


class RotateTokens(torch.autograd.Function):
    """Turned rows. The gradient of x is turned back; the reference computes the gradient of a learned table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, place: Tensor | None, prefix: int, half: bool) -> Tensor:
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if learned else None, cos, sin, place)
        ctx.prefix, ctx.half = prefix, half
        return _forward(x, cos, sin, place, prefix, half)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, place = ctx.saved_tensors
        grad_x = grad_cos = grad_sin = None
        if ctx.needs_input_grad[0]:
            backward = reference.rotate_tokens_backward if differentiates_again() else _backward
            grad_x = backward(grads[0], cos, sin, place, ctx.prefix, ctx.half)
        if x is not None:
            tables = reference.rotate_tokens_table_backward(grads[0], x, cos, sin, place, ctx.prefix, ctx.half)
            grad_cos, grad_sin = tables
        return grad_x, grad_cos, grad_sin, None, None, None


def _check_table(name: str, table: Tensor, x: Tensor, place: Tensor | None, prefix: int) -> None:
    """Raise unless a table has x's channels and a row for every patch, for all images and heads or for each."""
    if not isinstance(table, Tensor):
        raise TypeError(f"table must be a pair of tensors, cosines and sines, got {type(table).__name__} as {name}")
    check_floating(f"table's {name}", table)
    check_same("x", x, f"table's {name}", table)
    batch, heads, tokens, channels = shape_of(x)
    fits = 2 <= table.ndim <= 4 and table.shape[-1] == channels
    fits = fits and (place is not None or table.shape[-2] == tokens - prefix)
    fits = (
        fits and (table.ndim < 3 or table.shape[-3] in (1, heads)) and (table.ndim < 4 or table.shape[0] in (1, batch))
    )
    if not fits:
        raise ValueError(
            f"table's {name} must have shape (P, {channels}), (1 or {heads}, P, {channels}) or (1 or {batch}, 1 or "
            f"{heads}, P, {channels}) with a row for each patch, got {shape_of(table)} for x {shape_of(x)}"
        )


def rotate_tokens_unchecked(
    x: Tensor,
    table: tuple[Tensor, Tensor],
    place: Tensor | None = None,
    *,
    prefix: int = 1,
    layout: Layout = "interleaved",
    backend: Resolved,
) -> Tensor:
    """Call :func:`rotate_tokens` without checks, by the backend named."""
    (cos, sin), half = table, layout == "half"
    if backend == "reference":
        return reference.rotate_tokens(x, cos, sin, place, prefix, half)
    if wants_gradient(x, cos, sin):
        return RotateTokens.apply(x, cos, sin, place, prefix, half)
    return _forward(x, cos, sin, place, prefix, half)


def rotate_tokens(
    x: Tensor,
    table: tuple[Tensor, Tensor],
    place: Tensor | None = None,
    *,
    prefix: int = 1,
    layout: Layout = "interleaved",
    backend: str | None = None,
) -> Tensor:
    """Turn queries or keys by the rotary angles of the patches at their places (Su et al. 2021, section 3.2.2).

    Equivalent PyTorch, for a table of shape (P, D)::

        head, patches = x[:, :, :prefix], x[:, :, prefix:]
        cos, sin = (rows[place][:, None] for rows in table)  # where place is -1, 1 and 0
        first, second = patches[..., ::2], patches[..., 1::2]  # "half": patches.chunk(2, dim=-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)  # "half": torch.cat([-second, first], dim=-1)
        torch.cat([head, patches * cos + turned * sin], dim=2)

    Args:
        x: (B, H, N, D) queries or keys, D even. float32, float16, bfloat16 (reference: any).
        table: cosines and sines of every patch's angles, both (P, D) for all heads, (H, P, D) for each (mixed
            rotations), or (B, 1 or H, P, D) for each image, of any floating dtype.
        place: (B, N - prefix) int32 or int64, the row of the table for each token; a token at -1 is not turned. None
            stands for the P patches in order. Values are not checked.
        prefix: number of leading tokens that are not turned.
        layout: which channels are turned together: 2 i and 2 i + 1 (``"interleaved"``), or i and i + D / 2
            (``"half"``).
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; None follows the context.

    Returns:
        (B, H, N, D) in x's dtype, computed in the widest of x and the table (the kernel: in float32).
        Differentiable in x and in the table.

    Raises:
        ValueError: shapes that do not fit, an odd D, an unknown layout, devices that differ, a prefix outside 0 .. N.
        TypeError: x or table not floating point, place not integer, table not a pair.
    """
    check_shape("x", x, "B H N D")
    check_floating("x", x)
    if x.shape[3] % 2 or x.shape[3] < 2:
        raise ValueError(f"x must have an even number of channels, got shape {shape_of(x)}")
    if layout not in ("interleaved", "half"):
        raise ValueError(f"layout must be 'interleaved' or 'half', got {layout!r}")
    prefix = check_count("prefix", prefix, 0, x.shape[2])
    check_pair("table", table, "cosines and sines")
    if place is not None:
        check_shape("place", place, "B N")
        check_index("place", place)
        check_same("x", x, "place", place)
        if shape_of(place) != (x.shape[0], x.shape[2] - prefix):
            raise ValueError(
                f"place must have shape {(x.shape[0], x.shape[2] - prefix)}, one entry a token behind the prefix of "
                f"{prefix}, got {shape_of(place)}"
            )
    for name, one in zip(("cos", "sin"), table, strict=True):
        _check_table(name, one, x, place, prefix)
    cos, sin = table
    if shape_of(cos) != shape_of(sin):
        raise ValueError(f"table's cos and sin must have one shape, got {shape_of(cos)} and {shape_of(sin)}")
    chosen = resolve(backend, x, cos, sin)
    return rotate_tokens_unchecked(x, table, place, prefix=prefix, layout=layout, backend=chosen)
