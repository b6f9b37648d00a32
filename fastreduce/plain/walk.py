"""State that a plain model carries from block to block, and the functions of rows that all methods share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Walk",
    "check_unpatched",
    "distances",
    "embed",
    "logits_of",
    "moved",
    "prefix_of",
    "rotated",
    "rows_of",
    "run_through",
]


@dataclasses.dataclass
class Walk:
    """State that one forward pass carries from block to block."""

    x: Tensor  # (B, N, C), prefix first
    patches: int  # patch tokens before any reduction
    size: Tensor | None = None  # (B, N) patches that each token stands for
    home: Tensor | None = None  # (B, patches) the token that each patch is in
    mass: Tensor | None = None  # (B, n) patches that each patch token stands for, with fractions, of soft merges
    valid: Tensor | None = None  # (B, N) False for padding
    matrix: Tensor | None = None  # (B, H, N, N) attention of the block before
    place: Tensor | None = None  # (B, N - prefix) the patch at whose place each token is, -1 for none, if blocks rotate
    tables: list[Tensor] | None = None  # each block's (P, 2 D) or (H, P, 2 D), sines first, or None
    decisions: list[Tensor] = dataclasses.field(default_factory=list)  # (B, patches) each: 1 for kept


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows of x (B, N, C) by index (B, K) -> (B, K, C)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def distances(x: Tensor) -> Tensor:
    """Measure distances (B, N, C) -> (B, N, N), in float32 for half precision, as autocast does."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return torch.cdist(x, x)


def embed(model: Any, images: Tensor) -> tuple[Tensor, list[Tensor] | None]:
    """Embed images (B, 3, height, width) as tokens (B, N, C), and return each block's rotary table too."""
    if hasattr(model, "blocks_token_only"):
        return model.pos_drop(model.patch_embed(images) + model.pos_embed), None
    found = model._pos_embed(model.patch_embed(images))
    if not isinstance(found, tuple):
        return model.norm_pre(model.patch_drop(found)), None
    x, rope = found
    x = model.norm_pre(x) if hasattr(model, "norm_pre") else x
    if rope is None:
        return x, None
    mixed = getattr(model, "rope_mixed", False)
    return x, [rope[index] if mixed else rope for index in range(len(model.blocks))]


def run_through(model: Any, images: Tensor, walk: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """Turn images (B, 3, height, width) into logits, with ``walk(x, tables)`` in place of the blocks.

    A model of another library than timm has a ``bind``, which takes the walk, and then runs by itself.
    """
    if (bind := getattr(model, "bind", None)) is not None:
        bind(walk)
        return model(images)
    return logits_of(model, walk(*embed(model, images)))


def moved(place: Tensor | None, index: Tensor) -> Tensor | None:
    """Return the places (B, m) of tokens from the places (B, n) before and the token (B, m) each comes from, or -1."""
    return None if place is None else torch.where(index < 0, -1, place.gather(1, index.clamp_min(0)))


def rotated(x: Tensor, table: Tensor, place: Tensor, prefix: int, half: bool) -> Tensor:
    """Turn x (B, H, prefix + n, D) behind the prefix by the table's rows at (B, n) places; -1 turns nothing."""
    rows = table.expand(x.shape[1], *table.shape[-2:])[:, place.clamp_min(0)].transpose(0, 1)  # (B, H, n, 2 D)
    sin, cos = rows.chunk(2, dim=-1)
    patches = x[:, :, prefix:]
    if half:
        turned = torch.cat([-patches[..., x.shape[3] // 2 :], patches[..., : x.shape[3] // 2]], dim=-1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    found = torch.where((place < 0)[:, None, :, None], patches, patches * cos + turned * sin)
    return torch.cat([x[:, :, :prefix], found.to(x.dtype)], dim=2)


_MODELS = ("VisionTransformer", "Eva", "Cait")
_BLOCKS = ("Block", "ResPostBlock", "EvaBlock", "EvaBlockPostNorm", "LayerScaleBlock")


def check_unpatched(model: Any) -> None:
    """Raise ValueError for a model that is patched, or of which no plain form is written."""
    if hasattr(model, "reducers"):
        raise ValueError("the plain form needs the unpatched model; call fastreduce.unpatch first, or give it a copy")
    if hasattr(model, "bind"):  # the plain view of another library's model
        return
    strange = [type(block).__name__ for block in model.blocks if type(block).__name__ not in _BLOCKS]
    if strange or not any(kind.__name__ in _MODELS for kind in type(model).__mro__):
        what = f"blocks of {strange[0]}" if strange else f"a {type(model).__name__}"
        raise ValueError(
            f"no plain form of the methods is written for {what}, to be compared with; fastreduce.patch reduces it"
        )


def prefix_of(model: Any) -> int:
    """Return how many leading tokens the blocks see: CaiT's class token comes behind them."""
    return 0 if hasattr(model, "blocks_token_only") else model.num_prefix_tokens


def logits_of(model: Any, x: Tensor) -> Tensor:
    """Return what the model makes of the tokens (B, N, C) behind its blocks."""
    if hasattr(model, "blocks_token_only"):
        token = model.cls_token.expand(len(x), -1, -1)
        for block in model.blocks_token_only:
            token = block(x, token)
        x = torch.cat([token, x], dim=1)
    return model.forward_head(model.norm(x))
