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

__all__ = ["bmm", "each_image", "image_parts", "is_captured", "matmul", "pair_distances"]

WORKSPACE = 256 << 20  # bytes of the matrices that are in memory at a time, or one image's if that is larger


def is_captured() -> bool:
    """Return whether tensors stand for others, as under torch.compile or torch.func.

    Then there is no loop over images, and nothing is changed in place.

    Under torch.jit.trace too, which would make a constant of the number of images.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def each_image(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call ``function`` of tensors (B, ...) for every image on its own on the CPU -> (B, ...)."""
    first = tensors[0]
    whole = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if whole or first.device.type != "cpu" or first.shape[0] <= 1:
        return function(*tensors)
    return torch.cat([function(*image) for image in zip(*(tensor.split(1) for tensor in tensors), strict=True)])


def image_parts(images: int, bytes_each: int) -> list[slice]:
    """Cut all images into parts whose matrices take WORKSPACE bytes at most; captured, a single part."""
    if is_captured() or images * bytes_each <= WORKSPACE:
        return [slice(None)]
    size = max(1, WORKSPACE // bytes_each)
    return [slice(start, start + size) for start in range(0, images, size)]


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (B, M, K), (B, K, N) -> (B, M, N)."""
    return each_image(torch.bmm, left, right)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (B, ..., M, K), (B, ..., K, N) -> (B, ..., M, N)."""
    return each_image(torch.matmul, left, right)


def pair_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Return Euclidean distances, as ``torch.cdist`` rounds them: (B, M, C), (B, N, C) -> (B, M, N)."""
    return each_image(cdist, rows, columns)
