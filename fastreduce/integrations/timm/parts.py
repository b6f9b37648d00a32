"""Parts of timm's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch.nn.functional as F
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from ...reducers.block import is_bare, is_unhooked
from ..parts import Beside, Geometry, Linear, Parts, are_plain, as_input, is_idle_dropout
from ..registry import register_parts
from .differential import DIFFERENTIAL, difference, maps

__all__ = ["BlockParts", "TimmParts", "check_no_mask", "is_timms"]

_NORMS = tuple(
    getattr(timm.layers, name)
    for name in ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm")
    if hasattr(timm.layers, name)
)


def is_timms(module: nn.Module, known: type) -> bool:
    """Return whether a module is of a class of timm's, whose forward nobody has replaced."""
    return type(module) is known and known.forward.__module__.startswith("timm.")  # type: ignore[attr-defined]


class TimmParts(Parts):
    """Parts common to timm's layouts: a block has ``attn``, ``norm1``, ``norm2``, ``mlp`` and two drop paths.

    Attributes:
        attentions: classes of attention that this layout knows.
        tail_names: the block's layers between the output projection and the residual.
    """

    wanted = "a timm Block"
    attentions: tuple[type, ...] = (vit.Attention,)
    tail_names: tuple[str, ...] = ("drop_path1",)
    row_by_row = (nn.Identity, nn.Linear, nn.Dropout, nn.LayerNorm, vit.LayerScale, timm.layers.DropPath, *_NORMS)
    scales = (nn.Identity, vit.LayerScale, timm.layers.DropPath)
    layer_norms = (nn.LayerNorm, timm.layers.LayerNorm)

    def strange(self, block: Any, *, opened: bool) -> tuple[type[Exception], str] | None:
        """Say why a block cannot be done in parts: another attention, or a forward that is not timm's."""
        if type(block.attn) not in self.attentions:
            return TypeError, (
                f"{{model}} cannot be reduced: block {{index}} has a {type(block.attn).__name__} attention, of which "
                "the reducers do not know what it does with positions, or between its heads"
            )
        strange = self.geometry(block).strange if opened else None
        if strange:
            return ValueError, f"block {{index}} is to be reduced in its attention, but that {strange}"
        if not is_timms(block, type(block)):
            return ValueError, "block {index} has a forward of its own, which a reduced block would not call"
        return None

    def geometry(self, block: Any) -> Geometry:
        """Return what ``attn`` is now."""
        attn = block.attn
        kind: Any = type(attn)
        strange = None
        if kind not in self.attentions:
            strange = f"is a {kind.__name__}, of which the reducers do not know whether it depends on positions"
        elif "forward" in attn.__dict__ or not kind.forward.__module__.startswith("timm."):
            strange = "has a forward of its own, which would not be called"
        groups, half = getattr(attn, "num_kv_groups", 1), getattr(attn, "rotate_half", False)
        return Geometry(attn, getattr(attn, "scale", 1.0), groups, half, strange)

    def beside(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
        """Take no mask."""
        check_no_mask(block, args, kwargs)
        return None

    def norm1(self, block: Any) -> nn.Module | None:
        """Return ``norm1``."""
        return block.norm1

    def norm2(self, block: Any) -> nn.Module | None:
        """Return ``norm2``."""
        return block.norm2

    def splits(self, block: Any) -> bool:
        """Return whether the packed projection is bare."""
        attn = block.attn
        norm = getattr(attn, "q_norm", None)
        # The usual one first, without a call.
        bare = norm is None or (type(norm) is nn.Identity and not norm._forward_hooks and not norm._forward_pre_hooks)
        return is_bare(attn.qkv) and (bare or are_plain((norm,), self.row_by_row))

    def project(self, block: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """Apply the thirds of the packed projection; queries and keys pass their norms."""
        attn = block.attn
        if type(attn) in DIFFERENTIAL:
            return maps(attn, self.sections(attn, normed, first, last, linear), first)
        qkv = attn.qkv
        if last - first == 3:
            together = linear(qkv, normed)
        else:
            width = qkv.out_features // 3
            rows = slice(first * width, last * width)
            bias = None if qkv.bias is None else qkv.bias[rows]
            together = F.linear(normed, qkv.weight[rows], bias)
        # As apart and normed have it, without their calls: this is the usual layout.
        (batch, tokens, width), parts, heads = together.shape, last - first, attn.num_heads
        made = together.view(batch, tokens, parts, heads, width // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)
        if "q_norm" not in attn._modules:
            return made
        if first == 0:
            q = attn.q_norm(made[0])
            return (q,) if last == 1 else (q, attn.k_norm(made[1]), made[2])
        return attn.k_norm(made[0]), made[1]

    def sections(self, attn: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """Return the slices ``first`` to ``last`` of the packed projection, (B, N, C) each, with heads together."""
        if last - first == 3:
            return linear(attn.qkv, normed).chunk(3, dim=2)
        width = attn.qkv.out_features // 3
        rows = slice(first * width, last * width)
        bias = None if attn.qkv.bias is None else attn.qkv.bias[rows]
        return F.linear(normed, attn.qkv.weight[rows], bias).chunk(last - first, dim=2)

    def apart(self, together: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
        """View (B, N, parts * H * D) as parts, each (B, H, N, D)."""
        batch, tokens, width = together.shape
        return together.view(batch, tokens, parts, heads, width // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)

    def normed(self, attn: Any, made: Sequence[Tensor], first: int) -> tuple[Tensor, ...]:
        """Return queries and keys, (B, H, N, D) each, behind their norms if there are any; values as they are."""
        names = ("q_norm", "k_norm", "")[first : first + len(made)]
        found = []
        for head, name in zip(made, names, strict=True):
            norm = attn._modules.get(name)
            found.append(head if norm is None else norm(head))
        return tuple(found)

    def softmax(self, block: Any) -> tuple[bool, float | None]:
        """Return ``fused_attn``, and the probability that attention drops a weight now."""
        attn = block.attn
        if attn.fused_attn:  # timm reads the number, and does not call the module
            return True, getattr(attn.attn_drop, "p", 0.0) if attn.training else 0.0
        return False, 0.0 if is_idle_dropout(attn.attn_drop) else None

    def dropped(self, block: Any, weights: Tensor) -> Tensor:
        """Return attention weights behind ``attn_drop``."""
        return block.attn.attn_drop(weights)

    def inner(self, block: Any, out: Tensor, rows: Tensor | None) -> Tensor:
        """Apply timm's optional norm and gate."""
        attn = block.attn
        if type(attn) in DIFFERENTIAL:
            out = difference(attn, out)
        if (norm := getattr(attn, "norm", None)) is not None:
            out = norm(out)
        if (gate := getattr(attn, "gate", None)) is not None:
            out = out * gate(rows).sigmoid()
        return out

    def gated(self, block: Any) -> bool:
        """Return whether there is a gate."""
        return getattr(block.attn, "gate", None) is not None

    def project_out(self, block: Any, attended: Tensor, linear: Linear) -> Tensor:
        """Apply output projection and dropout."""
        attn = block.attn
        return attn.proj_drop(linear(attn.proj, attended))

    def is_rowwise(self, block: Any) -> bool:
        """Return whether every layer between attention and residual treats rows alike, with nothing hung on it."""
        attn, tail = block.attn, map(block._modules.get, self.tail_names)
        inside = (*map(attn._modules.get, ("sub_norm", "norm", "gate")), attn.proj, attn.proj_drop)
        return are_plain((*inside, *tail), self.row_by_row)

    def is_linear(self, block: Any) -> bool:
        """Return whether projection, tail and drop path are linear in each row now."""
        attn = block.attn
        idle = is_idle_dropout(attn.proj_drop) and is_bare(attn.proj)
        return idle and are_plain(tuple(map(block._modules.get, self.tail_names)), self.scales)

    def bias(self, block: Any) -> Tensor | None:
        """Return what becomes of the projection's bias."""
        bias = block.attn.proj.bias
        return None if bias is None else self.tail(block, block.attn.proj_drop(as_input(bias)))

    def path1(self, block: Any) -> nn.Module | None:
        """Return ``drop_path1``."""
        return block.drop_path1

    def path2(self, block: Any) -> nn.Module | None:
        """Return ``drop_path2``."""
        return block.drop_path2

    def mlp(self, block: Any, x: Tensor, normed: Tensor | None, linear: Linear) -> Tensor:
        """Apply norm and MLP; the products of timm's own through ``linear``."""
        mlp, normed = block.mlp, block.norm2(x) if normed is None else normed
        if not is_timms(mlp, vit.Mlp) or not is_unhooked(mlp):
            return mlp(normed)
        hidden = mlp.norm(mlp.drop1(mlp.act(linear(mlp.fc1, normed))))
        return mlp.drop2(linear(mlp.fc2, hidden))


def check_no_mask(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError for a mask, as the model's host has it: it is of the input's tokens, and others are left."""
    given = (*args, kwargs.get("attn_mask"), kwargs.get("is_causal"))
    if any(one is not None and one is not False for one in given):
        raise ValueError(block._site.host.no_mask)


class BlockParts(TimmParts):
    """``vision_transformer.Block``: norm, attention, layer scale; norm, MLP, layer scale."""

    attentions: tuple[type, ...] = (*TimmParts.attentions, *DIFFERENTIAL)
    tail_names = ("ls1", "drop_path1")

    def branch(self, block: Any, attended: Tensor) -> Tensor:
        """Apply projection, layer scale, drop path."""
        attn = block.attn
        return block.drop_path1(block.ls1(attn.proj_drop(attn.proj(attended))))

    def tail(self, block: Any, projected: Tensor) -> Tensor:
        """Apply the layer scale."""
        return block.ls1(projected)

    def mlp(self, block: Any, x: Tensor, normed: Tensor | None, linear: Linear) -> Tensor:
        """Apply norm, MLP, layer scale."""
        return block.ls2(super().mlp(block, x, normed, linear))

    def second_half(self, block: Any, x: Tensor, normed: Tensor | None) -> Tensor:
        """Apply norm, MLP, layer scale, drop path, and the residual."""
        normed = block.norm2(x) if normed is None else normed
        return x + block.drop_path2(block.ls2(block.mlp(normed)))


register_parts(vit.Block, BlockParts())
