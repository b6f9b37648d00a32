"""timm's Gemma 4 vision tower: the halves of a head are turned by two axes, and four norms stand around a block."""

from __future__ import annotations

from typing import Any

from timm.models import gemma4_vit
from torch import Tensor, nn

from ..parts import Beside, Linear
from ..registry import register_host, register_parts
from .eva import EvaParts, TowerHost
from .parts import check_no_mask

__all__ = ["Gemma4Host", "Gemma4Parts"]


def _together(x: Tensor) -> Tensor:
    """Put quarters of x (..., D), (column, its partner, row, its partner), in the order (column, row, both partners).

    So one rotation of channel i with i + D / 2 turns both axes. Queries and keys in the same order have the same
    products.
    """
    return x.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)


class Gemma4Parts(EvaParts):
    """``Gemma4Block``: norm, attention, norm; norm, gated MLP, norm. A merge does not pass the norms."""

    attentions: tuple[type, ...] = (gemma4_vit.Gemma4Attention,)
    row_by_row = (*EvaParts.row_by_row, gemma4_vit.Gemma4ClippableLinear)
    tail_names = ("norm2", "drop_path")

    def geometry(self, block: Any) -> Any:
        """Turn channel i with i + D / 2, in the order of :func:`_together`."""
        return super().geometry(block)._replace(half=True)

    def beside(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
        """Read cosines and sines, (B, P, D) each; take no mask."""
        given = {**dict(zip(("rope_cos", "rope_sin", "attn_mask"), args, strict=False)), **kwargs}
        check_no_mask(block, (), given)
        cos, sin = given["rope_cos"], given["rope_sin"]
        return Beside((_together(cos)[:, None], _together(sin)[:, None]), call={"rope_cos": cos, "rope_sin": sin})

    def call(self, beside: Beside) -> dict[str, Any]:
        """Put a table back into the order of timm's; the way there and back is the same."""
        assert beside.table is not None
        cos, sin = (_together(one)[:, 0] for one in beside.table)
        return {"rope_cos": cos, "rope_sin": sin}

    def splits(self, block: Any) -> bool:
        """Return whether the layer of queries and its norm treat rows alike."""
        return self.treats_rows_alike(block.attn.q_proj, block.attn.q_norm)

    def project(self, block: Any, normed: Tensor, first: int, last: int, linear: Linear) -> tuple[Tensor, ...]:
        """Apply three layers, with a norm behind each."""
        attn, found = block.attn, []
        for name in "qkv"[first:last]:
            made = linear(getattr(attn, f"{name}_proj"), normed).unflatten(2, (-1, attn.head_dim))
            made = getattr(attn, f"{name}_norm")(made).transpose(1, 2)
            found.append(made if name == "v" else _together(made))
        return tuple(found)

    def inner(self, block: Any, out: Tensor, rows: Tensor | None) -> Tensor:
        """Return it as it is."""
        return out

    def project_out(self, block: Any, attended: Tensor, linear: Linear) -> Tensor:
        """Apply output projection and dropout."""
        return block.attn.proj_drop(linear(block.attn.o_proj, attended))

    def tail(self, block: Any, projected: Tensor) -> Tensor:
        """Apply the norm."""
        return block.norm2(projected)

    def bias(self, block: Any) -> Tensor | None:
        """Return None: there is none."""
        return None

    def is_rowwise(self, block: Any) -> bool:
        """Return whether projection, dropout, norm and drop path treat rows alike."""
        return self.treats_rows_alike(block.attn.o_proj, block.attn.proj_drop, block.norm2, block.drop_path)

    def is_linear(self, block: Any) -> bool:
        """Return False: the norm is not linear."""
        return False

    def path1(self, block: Any) -> nn.Module | None:
        """Return ``drop_path``, which both halves share."""
        return block.drop_path

    def path2(self, block: Any) -> nn.Module | None:
        """Return ``drop_path``."""
        return block.drop_path

    def norm2(self, block: Any) -> nn.Module | None:
        """Return ``norm3``."""
        return block.norm3

    def mlp(self, block: Any, x: Tensor, normed: Tensor | None, linear: Linear) -> Tensor:
        """Apply norm, MLP, norm."""
        return block.norm4(block.mlp(block.norm3(x) if normed is None else normed))

    def second_half(self, block: Any, x: Tensor, normed: Tensor | None) -> Tensor:
        """Apply norm, MLP, norm, drop path, and the residual."""
        return x + block.drop_path(block.norm4(block.mlp(block.norm3(x) if normed is None else normed)))


class Gemma4Host(TowerHost):
    """``Gemma4VitEncoder``, called with images: it pools cells of neighbouring patches behind its blocks."""

    base = gemma4_vit.Gemma4VitEncoder

    def shape_grid(self, model: Any) -> tuple[int, int]:
        """Return the grid of the images that timm names: the model has no size of its own."""
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 768, 768))[-2:]
        return size[0] // model.patch_size[0], size[1] // model.patch_size[1]

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the tokens, and the tables that every block is called with."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ValueError("a reduced Gemma 4 tower takes images (B, 3, height, width) here, not patches")
        x, positions, _ = model.patch_embed(images)
        cos, sin = model.rotary_emb(x, positions)
        return x, [{"rope_cos": cos, "rope_sin": sin}] * len(model.blocks)

    def features(self, model: Any, x: Tensor, images: Tensor) -> Tensor:
        """Return every patch, (B, P, C)."""
        return x


register_parts(gemma4_vit.Gemma4Block, Gemma4Parts())
register_host(gemma4_vit.Gemma4VitEncoder, Gemma4Host())
