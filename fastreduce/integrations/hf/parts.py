"""Parts of the layers of Hugging Face's encoders: one skeleton under many names."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...reducers.block import is_bare, is_captured
from ..parts import Beside, Geometry, Linear, Parts, are_plain, as_input, is_idle_dropout
from ..registry import register_parts
from .hidden_states import PASS

__all__ = ["Layer", "NestedLayer", "RotaryLayer", "VJEPA2Layer", "VideoMAELayer"]


def _is_librarys(kind: Any, endings: tuple[str, ...]) -> bool:
    return kind.__name__.endswith(endings) and kind.__module__.startswith("transformers.")


def _hooked_by_user(module: nn.Module) -> bool:
    """Return whether hooks hang on a module beside the library's own.

    The library's hooks collect hidden states and attentions.
    """
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    hooks = module._forward_hooks
    return bool(hooks) and any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks.values())


class Layer(Parts):
    """Norm, attention, scale; norm, MLP, scale, under the names of one class of layers.

    Args:
        kind: name of the class of its attention.
        norms: attributes of the two norms.
        attention: attribute of the attention.
        qkv: attributes of the three projections, in the attention.
        out: attribute of the output projection, in the attention.
        drop: attribute of the probability that attention drops a weight.
        mlp: attribute of the MLP.
        scaled: whether there are ``layer_scale1`` and ``layer_scale2``.
    """

    wanted = "a layer of Hugging Face's"

    def __init__(
        self,
        kind: str,
        norms: tuple[str, str],
        attention: str = "attention",
        qkv: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
        out: str = "o_proj",
        drop: str = "attention_dropout",
        mlp: str = "mlp",
        scaled: bool = False,
    ):
        self.kind, self.norms, self.attn, self.qkv, self.out = kind, norms, attention, qkv, out
        self.drop, self.mlp_name, self.scaled = drop, mlp, scaled

    def attention(self, block: Any) -> Any:
        """Return the layer's attention."""
        return getattr(block, self.attn)

    def inside(self, block: Any) -> Any:
        """Return the module that has the three projections."""
        return getattr(block, self.attn)

    def strange(self, block: Any, *, opened: bool) -> tuple[type[Exception], str] | None:
        """Say why a layer cannot be done in parts: another attention, or a forward that is not the library's."""
        inside = self.inside(block)
        if type(inside).__name__ != self.kind:
            return TypeError, (
                f"{{model}} cannot be reduced: block {{index}} has a {type(inside).__name__} attention, where a "
                f"{self.kind} is wanted"
            )
        if missing := [name for name in self.qkv if name not in inside._modules]:
            return TypeError, (
                f"{{model}} cannot be reduced: the {self.kind} of block {{index}} has no {missing[0]}: it is that of "
                "another version of transformers, where 5.0 or newer is wanted"
            )
        strange = self.geometry(block).strange if opened else None
        if strange:
            return ValueError, f"block {{index}} is to be reduced in its attention, but that {strange}"
        return None

    def geometry(self, block: Any) -> Geometry:
        """Return what the attention is now."""
        inside, attention = self.inside(block), self.attention(block)
        kind: Any = type(inside)
        strange = None
        if kind.__name__ != self.kind:
            strange = f"is a {kind.__name__}, of which the reducers do not know what it does"
        elif "forward" in inside.__dict__ or not kind.forward.__module__.startswith("transformers."):
            strange = "has a forward of its own, which would not be called"
        elif inside is not attention and _hooked_by_user(inside):
            strange = f"has hooks on its {kind.__name__}, which would not be called: hang them on the attention"
        scale = inside.scaling if hasattr(inside, "scaling") else inside.scale
        return Geometry(attention if _hooked_by_user(attention) else None, scale, 1, self.half(), strange)

    def half(self) -> bool:
        """Return whether a rotation pairs channels half a head apart."""
        return True

    def beside(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
        """Take a mask of padding, at the first reduced block; models may make one of ones where none was given."""
        masks = [one for one in (*args, kwargs.get("attention_mask")) if one is not None]
        if kwargs.get("position_mask") is not None or len(masks) > 1:
            raise ValueError(
                "a reduced encoder takes no mask of positions: it is of the input's tokens, others are left"
            )
        if not masks or block._site.index != block._site.model.reducers.first:
            return None
        # A checkpointed layer runs again in the backward pass, by when PASS is of another pass or another thread.
        again = block.training and getattr(block, "gradient_checkpointing", False) and not is_captured()
        if not (PASS.masked or again):
            return None
        real = _real_tokens(masks[0])
        # Of a mask that hides nothing, newer versions of the library make none.
        hides = is_captured() or torch.jit.is_tracing() or not bool(real.all())
        return Beside(valid=real) if hides else None

    def of_fewer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Leave out the mask: what is left of it, if anything, the tokens know."""
        without = kwargs | {"attention_mask": None} if "attention_mask" in kwargs else kwargs
        return (None,) * len(args), without

    def norm1(self, block: Any) -> Any:
        """Return the norm before attention."""
        return getattr(block, self.norms[0])

    def norm2(self, block: Any) -> Any:
        """Return the norm before the MLP."""
        return getattr(block, self.norms[1])

    def splits(self, block: Any) -> bool:
        """Return whether the projection of queries is bare."""
        return is_bare(getattr(self.inside(block), self.qkv[0]))

    def project(self, block: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """Call the projections, which are modules of their own."""
        inside = self.inside(block)
        width = inside.head_dim if hasattr(inside, "head_dim") else inside.attention_head_size
        made = (linear(getattr(inside, name), normed) for name in self.qkv[first:last])
        return tuple(one.unflatten(2, (-1, width)).transpose(1, 2) for one in made)

    def softmax(self, block: Any) -> tuple[bool, float | None]:
        """Return whether the attention implementation is a fused one, and the probability that it drops a weight."""
        inside = self.inside(block)
        return inside.config._attn_implementation != "eager", getattr(inside, self.drop) if inside.training else 0.0

    def dropped(self, block: Any, weights: Tensor) -> Tensor:
        """Return attention weights behind dropout."""
        inside = self.inside(block)
        return F.dropout(weights, getattr(inside, self.drop), inside.training)

    def whole_attention(self, block: Any, normed: Tensor, beside: Beside | None) -> Tensor | None:
        """Call the attention, with the implementation that the model has chosen."""
        return self.attention(block)(normed)[0]

    def as_returned(self, projected: Tensor) -> Any:
        """Return the pair that the attention returns."""
        return projected, None

    def as_added(self, returned: Any) -> Tensor:
        """Return the first of the pair."""
        return returned[0]

    def project_out(self, block: Any, attended: Tensor, linear: Linear) -> Tensor:
        """Apply the output projection."""
        return linear(getattr(self.inside(block), self.out), attended)

    def tail(self, block: Any, projected: Tensor) -> Tensor:
        """Apply dropout and layer scale, of layers that have them."""
        if (drop := block._modules.get("dropout")) is not None:
            projected = drop(projected)
        return block.layer_scale1(projected) if self.scaled else projected

    def _outs(self, block: Any) -> tuple[Any, ...]:
        """Return output projection, dropout, layer scale and drop path, None for those that it has not."""
        names = "dropout", "layer_scale1", "drop_path"
        return getattr(self.inside(block), self.out), *map(block._modules.get, names)

    def is_rowwise(self, block: Any) -> bool:
        """Return whether every layer between attention and residual treats rows alike, with nothing hung on it."""
        outs = self._outs(block)
        known = tuple(type(one) for one in outs if _is_librarys(type(one), ("LayerScale", "DropPath")))
        return are_plain(outs, (*self.row_by_row, *known))

    def is_linear(self, block: Any) -> bool:
        """Return whether projection, tail and drop path are linear in each row now."""
        out, drop, *tail = self._outs(block)
        known = tuple(type(one) for one in tail if _is_librarys(type(one), ("LayerScale", "DropPath")))
        return is_bare(out) and is_idle_dropout(drop) and are_plain(tuple(tail), (nn.Identity, *known))

    def bias(self, block: Any) -> Tensor | None:
        """Return what becomes of the projection's bias."""
        bias = self._outs(block)[0].bias
        return None if bias is None else self.tail(block, as_input(bias))

    def path1(self, block: Any) -> nn.Module | None:
        """Return the drop path, one for both halves."""
        return block._modules.get("drop_path")

    def path2(self, block: Any) -> nn.Module | None:
        """Return the drop path, one for both halves."""
        return block._modules.get("drop_path")

    def mlp(self, block: Any, x: Tensor, normed: Tensor | None, linear: Linear) -> Tensor:
        """Apply norm, MLP, dropout, layer scale."""
        made = getattr(block, self.mlp_name)(self.norm2(block)(x) if normed is None else normed)
        if (drop := block._modules.get("dropout")) is not None:
            made = drop(made)
        return block.layer_scale2(made) if self.scaled else made


def _real_tokens(mask: Tensor) -> Tensor:
    """Read a mask (B, N), or (B, 1, N, N) bool or additive, -> (B, N) bool; ValueError if it is not of keys alone."""
    if mask.ndim == 2:
        return mask.bool()
    if mask.ndim != 4:
        raise ValueError(f"a reduced encoder takes a mask (B, N) or (B, 1, N, N), got {tuple(mask.shape)}")
    real = mask if mask.dtype == torch.bool else mask >= 0
    row = real[:, 0, 0]
    if not is_captured() and not torch.jit.is_tracing() and not bool((real == row[:, None, None]).all()):
        raise ValueError(
            "a reduced encoder takes a mask of padding, which hides the same tokens from all: this one hides others "
            "from each, and after a reduction other tokens are left"
        )
    return row


class RotaryLayer(Layer):
    """A layer that is handed a rotary table, of DINOv3."""

    def beside(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
        """Take the table of all patches."""
        found = super().beside(block, args, kwargs)
        table = kwargs.get("position_embeddings")
        return found if table is None else Beside(table=table, valid=None if found is None else found.valid)

    def whole_attention(self, block: Any, normed: Tensor, beside: Beside | None) -> Tensor | None:
        """Call the attention with the rows of the tokens at hand."""
        assert beside is not None
        return self.attention(block)(normed, position_embeddings=beside.table)[0]


class VJEPA2Layer(Layer):
    """A layer whose attention counts the tokens to know where they are, of V-JEPA 2."""

    reads_itself = True
    returns_tuple = True

    def half(self) -> bool:
        """Return False: neighbouring channels are paired."""
        return False

    def beside(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
        """Make the table that the attention stands for."""
        if PASS.masked:
            raise ValueError("V-JEPA 2's layers take no mask of padding")
        return Beside(table=functools.partial(_table_of_clip, self.inside(block)))

    def whole_attention(self, block: Any, normed: Tensor, beside: Beside | None) -> Tensor | None:
        """Call the attention while all tokens are there, in order."""
        assert beside is not None
        return super().whole_attention(block, normed, None) if callable(beside.table) else None


def _table_of_clip(attention: Any, patches: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (patches, D).

    A third of the channels is turned by frame, row and column each, the rest stays still.

    As the released weights have it, the angles of a third are repeated one after another, while neighbours are paired.
    """
    weight = attention.query.weight
    place = torch.arange(patches, device=weight.device)
    side = attention.grid_size
    axes = place // (side * side), place // side % side, place % side
    angles = []
    for position, width in zip(axes, (attention.d_dim, attention.h_dim, attention.w_dim), strict=True):
        steps = torch.arange(width // 2, dtype=weight.dtype, device=weight.device)
        angle = position[:, None] * (1.0 / 10000 ** (steps / (width / 2.0)))
        angles += [angle, angle]
    still = attention.attention_head_size - 2 * sum(angle.shape[1] for angle in angles[::2])
    together = torch.cat([*angles, weight.new_zeros(patches, still)], dim=1)
    return together.cos(), together.sin()


class NestedLayer(Layer):
    """A layer whose attention is a module of modules: in transformers up to 5.9 that of every kin of ViT."""

    def inside(self, block: Any) -> Any:
        """Return the self-attention in the attention."""
        return getattr(block.attention, "attention", block.attention)

    def whole_attention(self, block: Any, normed: Tensor, beside: Beside | None) -> Tensor | None:
        """Call the attention, which returns a tensor."""
        return block.attention(normed)

    def as_returned(self, projected: Tensor) -> Any:
        """Return the tensor."""
        return projected

    def as_added(self, returned: Any) -> Tensor:
        """Return the tensor."""
        return returned

    def project_out(self, block: Any, attended: Tensor, linear: Linear) -> Tensor:
        """Apply output projection and dropout."""
        output = block.attention.output
        return output.dropout(linear(output.dense, attended))

    def _outs(self, block: Any) -> tuple[Any, ...]:
        """Return output projection, dropout, layer scale and drop path, None for those that it has not."""
        output = block.attention.output
        return output.dense, output.dropout, *map(block._modules.get, ("layer_scale1", "drop_path"))


class VideoMAELayer(NestedLayer):
    """A layer whose MLP is two modules too, the second of which adds the residual."""

    def project(self, block: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """Call the projections; up to transformers 5.4 VideoMAE has the biases of queries and values beside them."""
        made = super().project(block, normed, first, last, linear)
        own = self.inside(block)._parameters
        if own.get("q_bias") is None:
            return made
        biases = (own["q_bias"], None, own["v_bias"])[first:last]
        pairs = zip(made, biases, strict=True)
        return tuple(one if bias is None else one + bias.view(one.shape[1], 1, -1) for one, bias in pairs)

    def mlp(self, block: Any, x: Tensor, normed: Tensor | None, linear: Linear) -> Tensor:
        """Apply norm and MLP, without the residual that the library's output adds."""
        made = block.intermediate(self.norm2(block)(x) if normed is None else normed)
        return block.output.dropout(linear(block.output.dense, made))

    def second_half(self, block: Any, x: Tensor, normed: Tensor | None) -> Tensor:
        """Call the modules, the last of which adds the residual."""
        return block.output(block.intermediate(self.norm2(block)(x) if normed is None else normed), x)


_VIT = ("layernorm_before", "layernorm_after")
_CLIP = ("layer_norm1", "layer_norm2")
_DINO = ("norm1", "norm2")

_QKV = ("query", "key", "value")


def _is_nested(kind: type, name: str) -> bool:
    """Return whether this version of the library has the attention of a class of layers in two modules."""
    return hasattr(sys.modules[kind.__module__], f"{name}SelfAttention")


def _kin_of_vit(name: str, kind: type) -> Parts:
    if _is_nested(kind, name):
        return VideoMAELayer(f"{name}SelfAttention", _VIT, qkv=_QKV, drop="dropout_prob")
    return Layer(f"{name}Attention", _VIT)


def _kin_of_dinov2(name: str, kind: type) -> Parts:
    if _is_nested(kind, name):
        return NestedLayer(f"{name}SelfAttention", _DINO, qkv=_QKV, drop="dropout_prob", scaled=True)
    return Layer(f"{name}Attention", _DINO, scaled=True)


for _name in ("ViT", "DeiT", "ViTMSN", "IJepa", "Vivit", "AST"):
    register_parts(f"transformers.{_name}Layer", functools.partial(_kin_of_vit, _name))
for _name in ("CLIP", "MetaClip2", "Siglip", "Siglip2"):
    _parts = Layer(f"{_name}Attention", _CLIP, attention="self_attn", out="out_proj", drop="dropout")
    register_parts(f"transformers.{_name}EncoderLayer", _parts)
for _name in ("Dinov2", "Dinov2WithRegisters"):
    register_parts(f"transformers.{_name}Layer", functools.partial(_kin_of_dinov2, _name))
register_parts("transformers.DINOv3ViTLayer", RotaryLayer("DINOv3ViTAttention", _DINO, drop="dropout", scaled=True))
register_parts(
    "transformers.Aimv2EncoderLayer",
    Layer("Aimv2Attention", ("rms_norm1", "rms_norm2"), out="out_proj", drop="dropout", mlp="ffn"),
)
register_parts(
    "transformers.VideoMAELayer", VideoMAELayer("VideoMAESelfAttention", _VIT, qkv=_QKV, drop="dropout_prob")
)
register_parts(
    "transformers.VJEPA2Layer", VJEPA2Layer("VJEPA2RopeAttention", _DINO, qkv=_QKV, out="proj", drop="dropout_prob")
)
