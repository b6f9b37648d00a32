"""Matrix products that give an image the same bits in every batch.

MKL splits one product among its threads differently from the products of a batch. On the CPU every image is therefore
multiplied on its own. In a captured graph (``torch.compile``) there is one product, and PyTorch's compiler decides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._export import cdist

__all__ = ["bmm", "each_image", "image_parts", "is_captured", "matmul", "pair_distances"]

WORKSPACE = 256 << 20  # bytes of the matrices in memory at a time; one image may take more


def is_captured() -> bool:
    """Return whether tensors stand for others, as under torch.compile, torch.func or torch.jit.trace.

    Then there is no loop over images, whose number a trace would make a constant, and nothing is changed in place.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def each_image(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call ``function`` on tensors (B, ...), on the CPU image by image -> (B, ...)."""
    first = tensors[0]
    whole = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if whole or first.device.type != "cpu" or first.shape[0] <= 1:
        return function(*tensors)
    return torch.cat([function(*image) for image in zip(*(tensor.split(1) for tensor in tensors), strict=True)])


def image_parts(images: int, bytes_each: int) -> list[slice]:
    """Cut all images into parts whose matrices take WORKSPACE bytes at most; return one part under capture."""
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
