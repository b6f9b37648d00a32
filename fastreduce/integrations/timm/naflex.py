"""timm's NaFlexVit, for images: patches of one grid, without padding."""

from __future__ import annotations

from typing import Any

from timm.models import naflexvit
from torch import Tensor, nn

from ..registry import register_host
from .hosts import TimmHost

__all__ = ["NaFlexHost"]


class NaFlexHost(TimmHost):
    """``NaFlexVit``, called with images (B, 3, height, width); dictionaries of patches are refused by the blocks."""

    base = naflexvit.NaFlexVit
    methods = ("forward_features",)
    no_mask = "a reduced NaFlexVit takes images (B, 3, height, width), not dictionaries of patches, and no attn_mask"

    def embedding(self, model: Any) -> Any:
        """Return ``embeds``."""
        return model.embeds

    def shape_grid(self, model: Any) -> tuple[int, int]:
        """Return the grid of the model's learned positions: it has no image size of its own."""
        grid = getattr(model.embeds, "pos_embed_grid_size", None) or getattr(model.embeds, "grid_size", None)
        if grid is None:
            size = model.pretrained_cfg.get("input_size", (3, 224, 224))[-2:] if model.pretrained_cfg else (224, 224)
            grid = model.embeds.dynamic_feat_size(size)
        return tuple(grid)

    def has_class_token(self, model: Any) -> bool:
        """Return whether the embedding puts one in front."""
        return bool(model.has_class_token)

    def positions(self, model: Any) -> bool:
        """Return whether there is a rotary embedding."""
        return model.rope is not None

    def keeps_every_patch(self, model: Any) -> bool:
        """Return whether there is no patch dropout."""
        return model.patch_drop is None or isinstance(model.patch_drop, nn.Identity)

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the tokens, and the table that each block is called with."""
        if not isinstance(images, Tensor):
            raise ValueError(self.no_mask)
        made = model._forward_embeds(images, patch_coord=None, patch_valid=None, attn_mask=None)
        rope = made.get("rope_embeds")
        if rope is None:
            return made["patches"], [{}] * len(model.blocks)
        tables = list(rope) if model.rope_is_mixed else [rope] * len(model.blocks)
        return made["patches"], [{"rope": table} for table in tables]


register_host(naflexvit.NaFlexVit, NaFlexHost())
