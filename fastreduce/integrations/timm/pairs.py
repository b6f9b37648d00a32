"""timm's models that add a bias to the logit of every pair of tokens: BEiT, and ViTs with relative positions."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import beit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor

from ..parts import Beside
from ..registry import register_host, register_parts
from .eva import EvaParts, PostNormParts
from .hosts import TimmHost
from .parts import BlockParts

__all__ = ["BeitHost", "BeitParts", "RelPosHost", "RelPosParts"]


class BeitParts(EvaParts):
    """``beit.Block``: as EVA's, with a bias of its own or the model's for every pair of tokens."""

    attentions: tuple[type, ...] = (beit.Attention,)
    reads_itself = True

    def beside(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
        """Read the model's bias; the block's own is made when it is needed."""
        shared: Any = args[0] if args else kwargs.get("shared_rel_pos_bias")
        attn = block.attn
        if shared is None and attn.relative_position_bias_table is None:
            return None

        def pair() -> Tensor:
            if attn.relative_position_bias_table is None:
                return shared[(None,) * (4 - shared.ndim)]
            own = attn._get_rel_pos_bias()
            return own if shared is None else own + shared

        return Beside(pair=pair, call={"shared_rel_pos_bias": shared})


class BeitHost(TimmHost):
    """``Beit``."""

    base = beit.Beit

    def positions(self, model: Any) -> bool:
        """Say that pairs have a bias by where they are."""
        return True

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the tokens, and the bias that every block is called with."""
        x = model.patch_embed(images)
        x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if model.pos_embed is not None:
            x = x + model.pos_embed
        bias = None if model.rel_pos_bias is None else model.rel_pos_bias()
        return model.pos_drop(x), [{"shared_rel_pos_bias": bias}] * len(model.blocks)


def _relative(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
    """Read the model's bias, which stands in for the block's own where it has none."""
    shared: Any = args[0] if args else kwargs.get("shared_rel_pos")
    own = block.attn.rel_pos
    if shared is None and own is None:
        return None

    def pair() -> Tensor:
        return shared if own is None else own.get_bias()

    return Beside(pair=pair, call={"shared_rel_pos": shared})


class RelPosParts(BlockParts):
    """``RelPosBlock``: as the usual block, with a bias for every pair."""

    attentions: tuple[type, ...] = (relpos.RelPosAttention,)
    reads_itself = True

    def beside(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
        """Read the bias."""
        return _relative(block, args, kwargs)


class RelPosPostParts(PostNormParts):
    """``ResPostRelPosBlock``: the same with its norms behind attention and MLP."""

    attentions: tuple[type, ...] = (relpos.RelPosAttention,)
    reads_itself = True

    def beside(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
        """Read the bias."""
        return _relative(block, args, kwargs)


class RelPosHost(TimmHost):
    """``VisionTransformerRelPos``."""

    base = relpos.VisionTransformerRelPos

    def positions(self, model: Any) -> bool:
        """Say that pairs have a bias by where they are."""
        return True

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the tokens, and the bias that every block is called with."""
        x = model.patch_embed(images)
        if model.cls_token is not None:
            x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        shared = None if model.shared_rel_pos is None else model.shared_rel_pos.get_bias()
        return x, [{"shared_rel_pos": shared}] * len(model.blocks)


register_parts(beit.Block, BeitParts())
register_parts(relpos.RelPosBlock, RelPosParts())
register_parts(relpos.ResPostRelPosBlock, RelPosPostParts())
register_host(beit.Beit, BeitHost())
register_host(relpos.VisionTransformerRelPos, RelPosHost())
