"""timm's blocks whose attention and MLP, or several attentions, run side by side."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from ...reducers.block import is_bare
from ..parts import Geometry, Linear, are_plain, as_input, is_idle_dropout
from ..registry import register_parts
from .differential import difference, maps
from .parts import BlockParts, TimmParts, is_timms

__all__ = ["DiffScalingParts", "ScalingParts", "ThingsParts"]


class ScalingParts(TimmParts):
    """``ParallelScalingBlock``: one projection makes MLP, queries, keys and values; one, or two, bring them together.

    The MLP of a row stands beside its attention, in front of the output projection: there is no second half.
    """

    def strange(self, block: Any, *, opened: bool) -> tuple[type[Exception], str] | None:
        """Say so where the input projection is not a bare layer, whose rows can be taken apart."""
        if not is_timms(block, type(block)):
            return ValueError, "block {index} has a forward of its own, which a reduced block would not call"
        strange = self.geometry(block).strange if opened else None
        return (
            (ValueError, f"block {{index}} is to be reduced in its attention, but that {strange}") if strange else None
        )

    def attention(self, block: Any) -> nn.Module | None:
        """Return None: the block does it itself."""
        return None

    def geometry(self, block: Any) -> Geometry:
        """Return what the block's own attention is."""
        bare = is_bare(block.in_proj)
        return Geometry(None, block.scale, strange=None if bare else "has an in_proj that cannot be taken apart")

    def norm1(self, block: Any) -> nn.Module | None:
        """Return ``in_norm``."""
        return block.in_norm

    def norm2(self, block: Any) -> nn.Module | None:
        """Return None: there is no second half."""
        return None

    def _slice(self, block: Any, normed: Tensor, first: int, last: int) -> Tensor:
        """Apply sections ``first`` to ``last`` of the input projection: MLP, query, key, value."""
        sizes, proj = block.in_split, block.in_proj
        rows = slice(sum(sizes[:first]), sum(sizes[:last]))
        return F.linear(normed, proj.weight[rows], None if proj.bias is None else proj.bias[rows])

    def splits(self, block: Any) -> bool:
        """Return whether the norm of queries treats rows alike; the projection is bare."""
        return are_plain((block.q_norm,), self.row_by_row)

    def project(self, block: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """Return the sections behind the MLP's, each (B, H, N, D)."""
        together = self._slice(block, normed, 1 + first, 1 + last)
        made = self.apart(together, block.num_heads, last - first)
        norms = (block.q_norm, block.k_norm, None)[first:last]
        return tuple(head if norm is None else norm(head) for head, norm in zip(made, norms, strict=True))

    def softmax(self, block: Any) -> tuple[bool, float | None]:
        """Return ``fused_attn``, and the probability that attention drops a weight now."""
        drop = block.attn_drop
        if block.fused_attn:
            return True, getattr(drop, "p", 0.0) if block.training else 0.0
        return False, 0.0 if is_idle_dropout(drop) else None

    def dropped(self, block: Any, weights: Tensor) -> Tensor:
        """Return attention weights behind ``attn_drop``."""
        return block.attn_drop(weights)

    def gated(self, block: Any) -> bool:
        """Return True: the MLP of a row is made from the row."""
        return True

    def inner(self, block: Any, out: Tensor, rows: Tensor | None) -> Tensor:
        """Put attention and the activated MLP of the same rows side by side: (B, M, C + hidden)."""
        assert rows is not None
        hidden = self._slice(block, rows, 0, 1)
        if block.mlp_bias is not None:
            hidden = hidden + block.mlp_bias
        return torch.cat([out, block.mlp_drop(block.mlp_act(hidden))], dim=-1)

    def project_out(self, block: Any, attended: Tensor, linear: Linear) -> Tensor:
        """Apply the output projection, or the one of each half."""
        if getattr(block, "out_proj", None) is not None:
            return linear(block.out_proj, attended)
        width = attended.shape[-1] - block.in_split[0]
        first, second = attended[..., :width], attended[..., width:]
        return linear(block.attn_out_proj, first) + linear(block.mlp_out_proj, second)

    def branch(self, block: Any, attended: Tensor) -> Tensor:
        """Apply output projection, layer scale, drop path."""
        return block.drop_path(self.tail(block, self.project_out(block, attended, _call)))

    def tail(self, block: Any, projected: Tensor) -> Tensor:
        """Apply the layer scale."""
        return block.ls(projected)

    def _out(self, block: Any) -> tuple[Any, ...]:
        names = ("out_proj", "attn_out_proj", "mlp_out_proj")
        return tuple(one for name in names if (one := block._modules.get(name)) is not None)

    def bias(self, block: Any) -> Tensor | None:
        """Return what becomes of the output projections' biases."""
        found = [as_input(one.bias) for one in self._out(block) if one.bias is not None]
        return self.tail(block, sum(found[1:], found[0])) if found else None

    def is_rowwise(self, block: Any) -> bool:
        """Return whether MLP, projections, layer scale and drop path treat rows alike."""
        activation = (nn.GELU, nn.SiLU, nn.ReLU, nn.Identity)
        tail = (*self._out(block), block.mlp_drop, block.ls, block.drop_path)
        return are_plain(tail, self.row_by_row) and are_plain((block.mlp_act,), activation)

    def is_linear(self, block: Any) -> bool:
        """Return whether projections, layer scale and drop path are linear in each row."""
        return all(map(is_bare, self._out(block))) and are_plain((block.ls, block.drop_path), self.scales)

    def path1(self, block: Any) -> nn.Module | None:
        """Return ``drop_path``."""
        return block.drop_path

    def path2(self, block: Any) -> nn.Module | None:
        """Return None."""
        return None

    def whole_attention(self, block: Any, normed: Tensor, beside: Any) -> Tensor | None:
        """Return attention and MLP as timm has them, from one product."""
        sections = torch.split(block.in_proj(normed), block.in_split, dim=-1)
        out = self._attend(block, *sections[1:])
        hidden = sections[0] if block.mlp_bias is None else sections[0] + block.mlp_bias
        hidden = block.mlp_drop(block.mlp_act(hidden))
        if getattr(block, "out_proj", None) is None:  # a slice of both together would be multiplied by another route
            return block.attn_out_proj(out) + block.mlp_out_proj(hidden)
        return block.out_proj(torch.cat([out, hidden], dim=-1))

    def _attend(self, block: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend as timm does, from (B, N, C) each to (B, N, C)."""
        q, k, v = (one.unflatten(2, (block.num_heads, -1)) for one in (q, k, v))
        q, k, v = block.q_norm(q).transpose(1, 2), block.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        fused, dropout = self.softmax(block)
        if fused:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout or 0.0)
        else:
            out = self.dropped(block, ((q * block.scale) @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return out.transpose(1, 2).flatten(2)

    def mlp(self, block: Any, x: Tensor, normed: Tensor | None, linear: Linear) -> Tensor:
        """Return nothing to be added."""
        return torch.zeros_like(x)

    def second_half(self, block: Any, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return the tokens as they are."""
        return x


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


class DiffScalingParts(ScalingParts):
    """``DiffParallelScalingBlock``: the same with differential attention."""

    def project(self, block: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """Return queries, keys and values of both maps."""
        together = self._slice(block, normed, 1 + first, 1 + last)
        return maps(block, together.chunk(last - first, dim=-1), first)

    def inner(self, block: Any, out: Tensor, rows: Tensor | None) -> Tensor:
        """Put the difference beside the activated MLP of the same rows."""
        return super().inner(block, difference(block, out), rows)

    def is_rowwise(self, block: Any) -> bool:
        """Return whether the norm of the difference treats rows alike too."""
        return are_plain((block.sub_norm,), self.row_by_row) and super().is_rowwise(block)

    def _attend(self, block: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend as timm does: fused, each map apart; else both from one product."""
        heads = block.num_heads
        q, k = (one.unflatten(2, (2 * heads, -1)).transpose(1, 2) for one in (q, k))
        v = v.unflatten(2, (heads, -1)).transpose(1, 2)
        q, k = block.q_norm(q), block.k_norm(k)
        share = block._compute_lambda().type_as(q)
        fused, dropout = self.softmax(block)
        if fused:
            queries, keys = q.unflatten(1, (heads, 2)), k.unflatten(1, (heads, 2))
            first, second = (
                F.scaled_dot_product_attention(queries[:, :, one], keys[:, :, one], v, dropout_p=dropout or 0.0)
                for one in (0, 1)
            )
            out = first - share * second
        else:
            weights = self.dropped(block, ((q * block.scale) @ k.transpose(-2, -1)).softmax(dim=-1))
            weights = weights.unflatten(1, (heads, 2))
            out = (weights[:, :, 0] - share * weights[:, :, 1]) @ v
        return (block.sub_norm(out) * (1 - block.lambda_init)).transpose(1, 2).flatten(2)


class ThingsParts(BlockParts):
    """``ParallelThingsBlock``: several attentions side by side, and several MLPs, each with a norm of its own.

    Together the attentions are one with all their heads, whose output projections are summed.
    """

    def strange(self, block: Any, *, opened: bool) -> tuple[type[Exception], str] | None:
        """Say so where one of the branches is not as timm has it."""
        if not is_timms(block, type(block)):
            return ValueError, "block {index} has a forward of its own, which a reduced block would not call"
        strange = self.geometry(block).strange if opened else None
        return (
            (ValueError, f"block {{index}} is to be reduced in its attention, but that {strange}") if strange else None
        )

    def attention(self, block: Any) -> nn.Module | None:
        """Return None: there are several."""
        return None

    def geometry(self, block: Any) -> Geometry:
        """Return the sizes of one of the attentions, which all share."""
        strange = None
        for branch in block.attns:
            attn = branch.attn
            if type(attn) is not vit.Attention or "forward" in attn.__dict__:
                strange = "has a forward of its own, which would not be called"
            elif not are_plain((attn, branch), (vit.Attention, nn.Sequential)):
                strange = "has hooks, and several attentions are done as one"
            elif getattr(attn, "gate", None) is not None or not isinstance(
                getattr(attn, "norm", None), (nn.Identity, type(None))
            ):
                strange = "has a norm or gate of its own"
        return Geometry(None, block.attns[0].attn.scale, strange=strange)

    def norm1(self, block: Any) -> nn.Module | None:
        """Return None: every attention has its own."""
        return None

    def norm2(self, block: Any) -> nn.Module | None:
        """Return None: so has every MLP."""
        return None

    def splits(self, block: Any) -> bool:
        """Return whether every packed projection is bare, and every norm treats rows alike."""
        norms = [part for branch in block.attns for part in (branch.norm, branch.attn.q_norm)]
        return all(is_bare(branch.attn.qkv) for branch in block.attns) and are_plain(tuple(norms), self.row_by_row)

    def project(self, block: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """Return the slices of every attention, heads behind one another."""
        usual = super().project
        made = [usual(branch, branch.norm(normed), first, last, linear) for branch in block.attns]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*made, strict=True))

    def softmax(self, block: Any) -> tuple[bool, float | None]:
        """Return what the first attention does, which all share."""
        return super().softmax(block.attns[0])

    def dropped(self, block: Any, weights: Tensor) -> Tensor:
        """Drop every attention's weights (B, H, M, N) by its own dropout."""
        parts = weights.chunk(len(block.attns), dim=1)
        return torch.cat([branch.attn.attn_drop(part) for branch, part in zip(block.attns, parts, strict=True)], dim=1)

    def inner(self, block: Any, out: Tensor, rows: Tensor | None) -> Tensor:
        """Return it as it is."""
        return out

    def gated(self, block: Any) -> bool:
        """Return False."""
        return False

    def branch(self, block: Any, attended: Tensor) -> Tensor:
        """Sum of all output projections, layer scales and drop paths."""
        parts = attended.chunk(len(block.attns), dim=-1)
        made = [
            branch.drop_path(branch.ls(branch.attn.proj_drop(branch.attn.proj(part))))
            for branch, part in zip(block.attns, parts, strict=True)
        ]
        return torch.stack(made).sum(dim=0)

    def project_out(self, block: Any, attended: Tensor, linear: Linear) -> Tensor:
        """Apply :meth:`branch`, which leaves no tail."""
        return self.branch(block, attended)

    def tail(self, block: Any, projected: Tensor) -> Tensor:
        """Return it as it is."""
        return projected

    def bias(self, block: Any) -> Tensor | None:
        """Return the sum of what becomes of the projections' biases."""
        biases = [(branch.ls, branch.attn.proj.bias) for branch in block.attns]
        found = [scale(as_input(bias)) for scale, bias in biases if bias is not None]
        return sum(found[1:], found[0]) if found else None

    def is_rowwise(self, block: Any) -> bool:
        """Return whether every layer behind the attentions treats rows alike."""
        tails = [p for one in block.attns for p in (one.attn.proj, one.attn.proj_drop, one.ls, one.drop_path)]
        return are_plain(tuple(tails), self.row_by_row)

    def is_linear(self, block: Any) -> bool:
        """Return whether every branch is linear in each row.

        A drop path of its own each would need a draw of its own.
        """
        for branch in block.attns:
            dropping = branch.drop_path.training and not isinstance(branch.drop_path, nn.Identity)
            if dropping or not is_bare(branch.attn.proj) or not is_idle_dropout(branch.attn.proj_drop):
                return False
            if not are_plain((branch.ls, branch.drop_path), self.scales):
                return False
        return True

    def path1(self, block: Any) -> nn.Module | None:
        """Return None: every branch has its own."""
        return None

    def path2(self, block: Any) -> nn.Module | None:
        """Return None."""
        return None

    def whole_attention(self, block: Any, normed: Tensor, beside: Any) -> Tensor | None:
        """Sum of the branches, as timm has it."""
        return torch.stack([branch(normed) for branch in block.attns]).sum(dim=0)

    def mlp(self, block: Any, x: Tensor, normed: Tensor | None, linear: Linear) -> Tensor:
        """Sum of the MLPs."""
        return torch.stack([ffn(x) for ffn in block.ffns]).sum(dim=0)

    def second_half(self, block: Any, x: Tensor, normed: Tensor | None) -> Tensor:
        """Apply the MLPs and add the residual."""
        return x + self.mlp(block, x, normed, _call)


register_parts(vit.ParallelScalingBlock, ScalingParts())
if hasattr(vit, "DiffParallelScalingBlock"):  # not in older versions of timm 1.0
    register_parts(vit.DiffParallelScalingBlock, DiffScalingParts())
register_parts(vit.ParallelThingsBlock, ThingsParts())
