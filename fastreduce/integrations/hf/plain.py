"""Hugging Face's encoders of images as the plain algorithms take models: blocks under timm's names."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PlainView", "wanted_options"]

_NORMS = (
    ("layernorm_before", "layernorm_after"),
    ("layer_norm1", "layer_norm2"),
    ("norm1", "norm2"),
    ("rms_norm1", "rms_norm2"),
)


def _child(module: nn.Module, *names: str) -> Any:
    """Return the first child of one of these names, or an identity."""
    return next((child for name in names if (child := module._modules.get(name)) is not None), nn.Identity())


class _Attention(nn.Module):
    """An attention under timm's names."""

    def __init__(self, attention: Any, drop: nn.Module):
        super().__init__()
        inside: Any = attention._modules.get("attention", attention)  # of versions that have it in two modules
        self.q_proj, self.k_proj = _child(inside, "q_proj", "query"), _child(inside, "k_proj", "key")
        self.v_proj = _child(inside, "v_proj", "value")
        self.head_dim = inside.head_dim if hasattr(inside, "head_dim") else inside.attention_head_size
        self.num_heads = self.q_proj.out_features // self.head_dim
        self.scale = inside.scaling if hasattr(inside, "scaling") else inside.scale
        self.q_norm, self.k_norm, self.attn_drop = nn.Identity(), nn.Identity(), nn.Identity()
        self.proj, self.proj_drop = _child(attention, "o_proj", "out_proj"), drop
        if "output" in attention._modules:
            self.proj = attention.output.dense
        self.rotate_half = True
        self.own = [attention]  # no child: its parts are children already

    def forward(self, normed: Tensor, rope: Tensor | None = None) -> Tensor:
        """Call the attention itself: (B, N, C) -> (B, N, C)."""
        made = self.own[0](normed, **_options(rope))
        return self.proj_drop(made[0] if isinstance(made, tuple) else made)


def _options(rope: Tensor | None) -> dict[str, Any]:
    """Return (n, 2 D) sines and cosines as the library hands them on."""
    if rope is None:
        return {}
    sin, cos = rope.chunk(2, dim=-1)
    return {"position_embeddings": (cos, sin)}


def wanted_options(layer: nn.Module) -> dict[str, Any]:
    """Return what a layer must be called with that has nothing to say for an image without padding."""
    parameters = inspect.signature(layer.forward).parameters
    return {"attention_mask": None} if "attention_mask" in parameters else {}


class _Block(nn.Module):
    """A layer under the names of timm's blocks, for evaluation: drop path and dropout do nothing."""

    def __init__(self, layer: Any):
        super().__init__()
        first, second = next(names for names in _NORMS if names[0] in layer._modules)
        drop = _child(layer, "dropout")
        self.norm1, self.norm2 = layer._modules[first], layer._modules[second]
        self.attn = _Attention(_child(layer, "self_attn", "attention"), drop)
        self.ls1, self.ls2 = _child(layer, "layer_scale1"), _child(layer, "layer_scale2")
        self.mlp = nn.Sequential(_child(layer, "mlp", "ffn"), drop)
        if "intermediate" in layer._modules:
            self.mlp = nn.Sequential(layer.intermediate, layer.output.dense)
        self.drop_path1 = self.drop_path2 = _child(layer, "drop_path")
        self.own, self.wanted = [layer], wanted_options(layer)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """Call the layer itself: (B, N, C) -> (B, N, C)."""
        made = self.own[0](x, **self.wanted, **_options(rope))
        return made[0] if isinstance(made, tuple) else made


class _Through(nn.Module):
    """The only layer of a model whose layers are walked by somebody else."""

    def __init__(self, depth: int):
        super().__init__()
        self.depth = depth
        self.walk: list[Callable[[Tensor, Any], Tensor]] = []

    def forward(self, x: Tensor, *args: Any, position_embeddings: Any = None, **kwargs: Any) -> Tensor:
        """Take tokens (B, N, C) from the input of the first layer to the output of the last."""
        tables = None
        if position_embeddings is not None:
            cos, sin = position_embeddings
            tables = [torch.cat([sin, cos], dim=-1)] * self.depth
        return self.walk[0](x, tables)


class PlainView(nn.Module):
    """An unreduced model whose layers somebody else walks: the plain algorithms, or the free slice.

    Args:
        model: an :class:`~.images.ImageModel`; parameters and buffers are shared.

    Attributes:
        blocks: its layers, under the names of timm's blocks.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.training = model.training
        shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        twin: Any = copy.deepcopy(model, shared)
        layers = twin.blocks
        self.blocks = nn.ModuleList([_Block(layer) for layer in layers])
        self.through = _Through(len(layers))
        del layers[:]
        layers.append(self.through)
        self.twin = twin
        self.num_prefix_tokens, self.cls_token = model.num_prefix_tokens, model.cls_token
        self.global_pool, self.patch_embed = model.global_pool, model.patch_embed
        self.plain_mean = model.plain_mean

    def bind(self, walk: Callable[[Tensor, Any], Tensor]) -> None:
        """Have the layers done by ``walk(x, tables)``, tokens (B, N, C) to tokens."""
        self.through.walk[:] = [walk]

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, height, width) into the model's own output."""
        return self.twin(images)
