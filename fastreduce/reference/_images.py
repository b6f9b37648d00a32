"""Matrix products that give an image the same bits whatever its batch.

MKL shares the products of a batch out among its threads, and splits a single one differently from several: on the CPU
every image is therefore multiplied on its own. Where the graph of a batch is captured (``torch.compile``), the product
is one, and PyTorch's compiler decides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._export import cdist

__all__ = ["bmm", "each_image", "is_captured", "matmul", "pair_distances"]


def is_captured() -> bool:
    """Whether tensors stand for others, under torch.compile or torch.func: no loop over images, nothing in place.

    Under torch.jit.trace too, which would make a constant of the number of images.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def each_image(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function`` of tensors (B, ...), for every image on its own on the CPU -> (B, ...)."""
    first = tensors[0]
    whole = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if whole or first.device.type != "cpu" or first.shape[0] <= 1:
        return function(*tensors)
    return torch.cat([function(*image) for image in zip(*(tensor.split(1) for tensor in tensors), strict=True)])


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """(B, M, K), (B, K, N) -> (B, M, N)."""
    return each_image(torch.bmm, left, right)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """(B, ..., M, K), (B, ..., K, N) -> (B, ..., M, N)."""
    return each_image(torch.matmul, left, right)


def pair_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(B, M, C), (B, N, C) -> (B, M, N) Euclidean distances, as ``torch.cdist`` rounds them."""
    return each_image(cdist, rows, columns)
