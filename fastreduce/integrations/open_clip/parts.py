"""Parts of the blocks of open_clip's image towers."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...reducers.block import is_bare, is_plain_tensor, is_unhooked
from ..parts import Beside, Geometry, Linear, Parts, are_plain, is_idle_dropout
from ..registry import name_of, register_parts

__all__ = ["CustomParts", "ResidualParts"]

_NORMS = ("open_clip.LayerNorm", "open_clip.LayerNormFp32")
_SCALES = ("open_clip.LayerScale",)


def _kinds(modules: tuple[nn.Module | None, ...], names: tuple[str, ...]) -> tuple[type, ...]:
    """Return the classes of modules that have one of these names."""
    return tuple(type(one) for one in modules if one is not None and name_of(type(one)) in names)


class _Parts(Parts):
    """Parts of both layouts: ``ln_1``, ``attn`` with one weight for all projections, ``ls_1``, ``ln_2``, ``mlp``.

    Attributes:
        kind: ``"library.ClassName"`` of the attention.
    """

    wanted = "a block of open_clip"
    kind: str

    def strange(self, block: Any, *, opened: bool) -> tuple[type[Exception], str] | None:
        """Say why a block cannot be done in parts."""
        strange = self.geometry(block).strange
        if strange and (opened or name_of(type(block.attn)) != self.kind):
            return TypeError, f"{{model}} cannot be reduced: the attention of block {{index}} {strange}"
        return None

    def geometry(self, block: Any) -> Geometry:
        """Return what ``attn`` is now."""
        attn = block.attn
        strange = None
        if name_of(type(attn)) != self.kind:
            strange = f"is a {type(attn).__name__}, of which the reducers do not know what it does"
        elif "forward" in attn.__dict__:
            strange = "has a forward of its own, which would not be called"
        else:
            strange = self.obstacle(attn)
        return Geometry(attn, attn.head_dim**-0.5 if strange is None else 1.0, strange=strange)

    def obstacle(self, attn: Any) -> str | None:
        """Say what about an attention of the right class cannot be done in parts."""
        return None

    def beside(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
        """Take no mask, and no keys and values from elsewhere."""
        if any(one is not None for one in (*args, *kwargs.values())):
            raise ValueError("a reduced tower takes no attn_mask: its tokens are not the input's")
        return None

    def norm1(self, block: Any) -> Any:
        """Return ``ln_1``."""
        return block.ln_1

    def norm2(self, block: Any) -> Any:
        """Return ``ln_2``."""
        return block.ln_2

    def splits(self, block: Any) -> bool:
        """Return whether the weight of the projections is a plain one."""
        return is_plain_tensor(block.attn.in_proj_weight)

    def project(self, block: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """Apply the thirds of the one weight; queries and keys pass their norms, if they have any."""
        attn = block.attn
        weight, bias = attn.in_proj_weight, attn.in_proj_bias
        width = weight.shape[0] // 3
        rows = slice(first * width, last * width)
        together = F.linear(normed, weight[rows], None if bias is None else bias[rows])
        batch, tokens, _ = together.shape
        made = together.view(batch, tokens, last - first, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        norms = getattr(attn, "ln_q", None), getattr(attn, "ln_k", None), None
        pairs = zip(made, norms[first:last], strict=True)
        return tuple(one if norm is None else norm(one) for one, norm in pairs)

    def project_out(self, block: Any, attended: Tensor, linear: Linear) -> Tensor:
        """Apply the output projection and its dropout."""
        made = linear(block.attn.out_proj, attended)
        drop = block.attn._modules.get("out_drop")
        return made if drop is None else drop(made)

    def tail(self, block: Any, projected: Tensor) -> Tensor:
        """Apply the norm, if there is one, and layer scale."""
        norm = block._modules.get("ln_attn")
        return block.ls_1(projected if norm is None else norm(projected))

    def is_rowwise(self, block: Any) -> bool:
        """Return whether every layer between attention and residual treats rows alike, with nothing hung on it."""
        inside, names = block.attn._modules, ("out_drop", "ln_inner")
        after = (*map(inside.get, names), block._modules.get("ln_attn"), block.ls_1)
        known = _kinds(after, (*_NORMS, *_SCALES))
        return self._is_bare(block) and are_plain(after, (*self.row_by_row, *known))

    def _is_bare(self, block: Any) -> bool:
        """Return whether the output projection is a linear map and nothing else."""
        return is_bare(block.attn.out_proj)

    def is_linear(self, block: Any) -> bool:
        """Return whether projection and tail are linear in each row now."""
        tail = block._modules.get("ln_attn"), block.ls_1
        idle = is_idle_dropout(block.attn._modules.get("out_drop"))
        return idle and self._is_bare(block) and are_plain(tail, (nn.Identity, *_kinds(tail, _SCALES)))

    def bias(self, block: Any) -> Tensor | None:
        """Return what becomes of the projection's bias; a copy, since a layer scale may work in place."""
        bias = block.attn.out_proj.bias
        return None if bias is None else self.tail(block, bias.clone())

    def mlp(self, block: Any, x: Tensor, normed: Tensor | None, linear: Linear) -> Tensor:
        """Apply norm, MLP, layer scale."""
        return block.ls_2(block.mlp(block.ln_2(x) if normed is None else normed))


class ResidualParts(_Parts):
    """``ResidualAttentionBlock``, whose attention is torch's own."""

    kind = "torch.MultiheadAttention"

    def obstacle(self, attn: Any) -> str | None:
        """Say what about torch's attention cannot be done in parts."""
        if not attn.batch_first:
            return "has batch_first=False, with tokens before images: make the model with batch_first=True"
        if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
            return "has keys or values of another width, or some of its own, which the reducers do not know"
        return None

    def whole_attention(self, block: Any, normed: Tensor, beside: Beside | None) -> Tensor | None:
        """Call the block's attention."""
        return block.attention(q_x=normed)

    def as_returned(self, projected: Tensor) -> Any:
        """Return the pair that the attention returns."""
        return projected, None

    def as_added(self, returned: Any) -> Tensor:
        """Return the first of the pair."""
        return returned[0]

    def softmax(self, block: Any) -> tuple[bool, float | None]:
        """Return True: attention is torch's own, and may drop weights."""
        return True, block.attn.dropout if block.attn.training else 0.0

    def _is_bare(self, block: Any) -> bool:
        """Return whether torch's class of linear layers that are not quantised stands for its weight."""
        out = block.attn.out_proj
        known = type(out).__name__ in ("Linear", "NonDynamicallyQuantizableLinear")
        return known and is_plain_tensor(out.weight) and is_unhooked(out)


class CustomParts(_Parts):
    """``CustomResidualAttentionBlock``: norms of queries and keys, scaled heads, an inner norm, a norm behind."""

    kind = "open_clip.Attention"

    def obstacle(self, attn: Any) -> str | None:
        """Say what about open_clip's attention cannot be done in parts."""
        return "is a scaled cosine one, which the reducers do not know" if attn.logit_scale is not None else None

    def softmax(self, block: Any) -> tuple[bool, float | None]:
        """Return the probability that attention drops a weight, which is read and not called."""
        return True, block.attn.attn_drop.p if block.attn.training else 0.0

    def inner(self, block: Any, out: Tensor, rows: Tensor | None) -> Tensor:
        """Scale heads, and norm."""
        attn = block.attn
        if attn.head_scale is not None:
            out = (out.unflatten(2, (attn.num_heads, -1)) * attn.head_scale[:, 0]).flatten(2)
        return attn.ln_inner(out)


register_parts("open_clip.ResidualAttentionBlock", ResidualParts())
register_parts("open_clip.CustomResidualAttentionBlock", CustomParts())
