"""What a forward pass of a plain model carries from block to block, and what all methods do with rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

__all__ = ["Walk", "check_unpatched", "distances", "embed", "rows_of"]


@dataclasses.dataclass
class Walk:
    """What one forward pass carries from block to block."""

    x: Tensor  # (B, N, C), prefix first
    patches: int  # patch tokens before any reduction
    size: Tensor | None = None  # (B, N) patches that each token stands for
    home: Tensor | None = None  # (B, patches) the token that each patch is in
    valid: Tensor | None = None  # (B, N) False for padding
    matrix: Tensor | None = None  # (B, H, N, N) attention of the block before
    decisions: list[Tensor] = dataclasses.field(default_factory=list)  # (B, patches) each: 1 for kept


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """X (B, N, C), index (B, K) -> (B, K, C)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def distances(x: Tensor) -> Tensor:
    """X (B, N, C) -> (B, N, N), in float32 for half precision, as autocast does it: not all shapes exist otherwise."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return torch.cdist(x, x)


def embed(model: Any, images: Tensor) -> Tensor:
    """Images (B, 3, height, width) -> tokens (B, N, C) as they enter the first block."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def check_unpatched(model: Any) -> None:
    """ValueError about a model that is patched."""
    if hasattr(model, "reducers"):
        raise ValueError("the plain form needs the unpatched model; call fastreduce.unpatch first, or give it a copy")
