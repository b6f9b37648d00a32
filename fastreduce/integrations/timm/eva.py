"""timm's rotary models: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, Sapiens 2; and post-norm blocks."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import eva
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from ..parts import Beside, Linear, are_plain
from ..registry import register_host, register_parts
from .hosts import TimmHost
from .parts import TimmParts, check_no_mask

__all__ = ["EvaHost", "EvaParts", "PostNormParts"]

_ROTARY = (eva.EvaAttention, *filter(None, [getattr(timm.layers, "AttentionRope", None)]))


class EvaParts(TimmParts):
    """``EvaBlock``: norm, attention with a rotary table, layer scale ``gamma_1``; norm, MLP, ``gamma_2``."""

    attentions: tuple[type, ...] = (*_ROTARY, vit.Attention)

    def beside(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
        """Read the rotary table (..., P, 2 D), sines first; take no mask."""
        check_no_mask(block, args[1:], kwargs)
        rope = args[0] if args else kwargs.get("rope")
        if rope is None:
            return None
        sin, cos = rope.chunk(2, -1)
        return Beside((cos, sin), call={"rope": rope})

    def call(self, beside: Beside) -> dict[str, Any]:
        """Put a table together as timm has it."""
        assert beside.table is not None
        cos, sin = beside.table
        return {"rope": torch.cat([sin, cos], dim=-1)}

    def splits(self, block: Any) -> bool:
        """Return whether queries can be projected apart: always where the three have layers of their own."""
        attn = block.attn
        if getattr(attn, "qkv", None) is not None:
            return super().splits(block)
        return are_plain((attn.q_proj, getattr(attn, "q_norm", None)), self.row_by_row)

    def project(self, block: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """Project by one packed layer, with biases of its own or apart, or by three layers.

        Keys and values may have fewer heads.
        """
        attn = block.attn
        if getattr(attn, "qkv", None) is None:
            layers = (attn.q_proj, attn.k_proj, attn.v_proj)[first:last]
            channels = attn.head_dim
            made = [linear(layer, normed).unflatten(2, (-1, channels)).transpose(1, 2) for layer in layers]
            return self.normed(attn, made, first)
        if getattr(attn, "q_bias", None) is None:
            return super().project(block, normed, first, last, linear)
        biases = (attn.q_bias, attn.k_bias, attn.v_bias)[first:last]
        bias = torch.cat(biases)
        if last - first < 3:
            width = attn.qkv.out_features // 3
            together = F.linear(normed, attn.qkv.weight[first * width : last * width], bias)
        elif getattr(attn, "qkv_bias_separate", False):
            together = linear(attn.qkv, normed) + bias
        else:
            together = F.linear(normed, attn.qkv.weight, bias)  # as timm: the layer itself is not called
        return self.normed(attn, self.apart(together, attn.num_heads, last - first), first)

    def tail(self, block: Any, projected: Tensor) -> Tensor:
        """Apply the layer scale."""
        gamma = getattr(block, "gamma_1", None)
        return projected if gamma is None else gamma * projected

    def mlp(self, block: Any, x: Tensor, normed: Tensor | None, linear: Linear) -> Tensor:
        """Apply norm, MLP, layer scale."""
        made = super().mlp(block, x, normed, linear)
        gamma = getattr(block, "gamma_2", None)
        return made if gamma is None else gamma * made

    def second_half(self, block: Any, x: Tensor, normed: Tensor | None) -> Tensor:
        """Apply norm, MLP, layer scale, drop path, and the residual."""
        made = block.mlp(block.norm2(x) if normed is None else normed)
        gamma = getattr(block, "gamma_2", None)
        return x + block.drop_path2(made if gamma is None else gamma * made)


class PostNormParts(EvaParts):
    """``EvaBlockPostNorm`` and ``ResPostBlock``: attention, norm; MLP, norm. A merge does not pass the norm."""

    tail_names = ("norm1", "drop_path1")

    def norm1(self, block: Any) -> nn.Module | None:
        """Return None: attention takes the tokens as they are."""
        return None

    def norm2(self, block: Any) -> nn.Module | None:
        """Return None: so does the MLP."""
        return None

    def tail(self, block: Any, projected: Tensor) -> Tensor:
        """Apply the norm."""
        return block.norm1(projected)

    def is_linear(self, block: Any) -> bool:
        """Return False: the norm is not linear."""
        return False

    def mlp(self, block: Any, x: Tensor, normed: Tensor | None, linear: Linear) -> Tensor:
        """Apply MLP and norm."""
        return block.norm2(block.mlp(x))

    def second_half(self, block: Any, x: Tensor, normed: Tensor | None) -> Tensor:
        """Apply MLP, norm, drop path, and the residual."""
        return x + block.drop_path2(block.norm2(block.mlp(x)))


class EvaHost(TimmHost):
    """``Eva``: one table for all blocks, or for mixed rotations one for each."""

    base = eva.Eva

    def positions(self, model: Any) -> bool:
        """Return whether there is a rotary embedding."""
        return model.rope is not None

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the tokens, and the table that each block is called with."""
        x, rope = model._pos_embed(model.patch_embed(images))
        if hasattr(model, "norm_pre"):
            x = model.norm_pre(x)
        mixed = rope is not None and getattr(model, "rope_mixed", False)
        return x, [{"rope": rope[index] if mixed else rope} for index in range(len(model.blocks))]


register_parts(eva.EvaBlock, EvaParts())
register_parts(eva.EvaBlockPostNorm, PostNormParts())
register_parts(vit.ResPostBlock, PostNormParts())
register_host(eva.Eva, EvaHost())


def _register_language_towers() -> None:
    """Register vision towers of language models, where timm has them: what follows their blocks needs every patch."""
    try:
        from timm.models import deepseek_vit, qwen3_vit
    except ImportError:  # timm before 1.0.30
        return
    register_parts(deepseek_vit.DeepseekVitBlock, EvaParts())
    for kind in (deepseek_vit.DeepseekVitEncoder, qwen3_vit.Qwen3VitEncoder):
        register_host(kind, type(f"{kind.__name__}Host", (TowerHost,), {"base": kind})())


class TowerHost(TimmHost):
    """A vision tower that gives a map, or groups of neighbouring patches: dropped ones show their last value."""

    needs_grid = True

    def positions(self, model: Any) -> bool:
        """Return True: every block rotates."""
        return True

    def has_class_token(self, model: Any) -> bool:
        """Return False: there is no class token."""
        return False

    def looks(self, model: Any) -> Any:
        """Return ``"tokens"``: every patch, in its place."""
        return "tokens"

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the tokens, and the table that every block is called with."""
        x, rope = model._pos_embed(model.patch_embed(images))
        return x, [{"rope": rope}] * len(model.blocks)

    def features(self, model: Any, x: Tensor, images: Tensor) -> Tensor:
        """Return the map of features, (B, height, width, C)."""
        x = model.norm(x) if hasattr(model, "norm") else x
        return x.unflatten(1, model.patch_embed.dynamic_feat_size(images.shape[-2:]))


_register_language_towers()
