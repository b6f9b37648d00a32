"""timm's CaiT: talking heads among patches, and a class token that looks at them behind the last block."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import cait
from torch import Tensor, nn

from ..parts import is_idle_dropout
from ..registry import Looks, register_host, register_parts
from .eva import EvaParts
from .hosts import TimmHost

__all__ = ["CaitHost", "TalkingParts"]


class TalkingParts(EvaParts):
    """``LayerScaleBlock``: heads mix their logits before the softmax, and their weights behind it."""

    attentions: tuple[type, ...] = (cait.TalkingHeadAttn,)
    tail_names = ("drop_path",)
    mixes_heads = True

    def mixed_logits(self, block: Any, logits: Tensor) -> Tensor:
        """Mix by ``proj_l``."""
        return block.attn.proj_l(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def mixed_weights(self, block: Any, weights: Tensor, sizes: Tensor | None) -> Tensor:
        """Mix by ``proj_w``, whose bias counts once a patch; dropout."""
        attn = block.attn
        mixed = attn.proj_w(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if sizes is not None and attn.proj_w.bias is not None:
            mixed = mixed + (attn.proj_w.bias[:, None, None] * (sizes - 1)[:, None, None, :]).to(mixed.dtype)
        return attn.attn_drop(mixed)

    def softmax(self, block: Any) -> tuple[bool, float | None]:
        """Return False, and the probability that attention drops a weight now."""
        return False, 0.0 if is_idle_dropout(block.attn.attn_drop) else None

    def path1(self, block: Any) -> nn.Module | None:
        """Return ``drop_path``, which both halves share."""
        return block.drop_path

    def path2(self, block: Any) -> nn.Module | None:
        """Return ``drop_path``."""
        return block.drop_path

    def second_half(self, block: Any, x: Tensor, normed: Tensor | None) -> Tensor:
        """Apply norm, MLP, layer scale, drop path, and the residual."""
        made = block.mlp(block.norm2(x) if normed is None else normed)
        return x + block.drop_path(block.gamma_2 * made)


class CaitHost(TimmHost):
    """``Cait``: blocks see patches alone; the class token attends to what is left of them in blocks of its own.

    There every row is one key, so merged tokens are laid out as their patches first.
    """

    base = cait.Cait
    methods = tuple(name for name in TimmHost.methods if hasattr(cait.Cait, name))  # timm 1.0.0 has the first alone

    def prefix(self, model: Any) -> int:
        """Return 0: the class token comes behind the blocks."""
        return 0

    def has_class_token(self, model: Any) -> bool:
        """Return False, for the same reason."""
        return False

    def looks(self, model: Any) -> Looks:
        """Return ``"patches"``: the class token attends to them. Pruned of it, the model hands out what is left."""
        return "tokens" if model.blocks_token_only is None and not model.global_pool else "patches"

    def weighs(self, model: Any) -> str | None:
        """Say that attention takes every row."""
        if model.blocks_token_only is None:
            return super().weighs(model)
        return "the attention of this model's class token, behind the blocks, cannot respect"

    def pooled_prefix(self, model: Any) -> int:
        """Return 0."""
        return 0

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the tokens; blocks are called with nothing else."""
        return model.pos_drop(model.patch_embed(images) + model.pos_embed), [{}] * len(model.blocks)

    def features(self, model: Any, x: Tensor, images: Tensor) -> Tensor:
        """Put the class token in front, and norm."""
        if model.blocks_token_only is not None:
            token = model.cls_token.expand(x.shape[0], -1, -1)
            for block in model.blocks_token_only:
                token = block(x, token)
            x = torch.cat((token, x), dim=1)
        return model.norm(x)


register_parts(cait.LayerScaleBlock, TalkingParts())
register_host(cait.Cait, CaitHost())
