"""open_clip's models, and their image towers alone. Nothing here imports open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...reducers import ModelShape
from ...tokens import Tokens
from ..block import reduced_block
from ..registry import Host, Looks, name_of, register_host
from . import parts as _parts

__all__ = ["TowerHost", "TwoTowersHost"]

assert _parts  # registers the blocks


class TowerHost(Host):
    """open_clip's ``VisionTransformer``."""

    container = None

    def tower(self, model: Any) -> Any:
        """Return the image tower."""
        return model

    def check(self, model: Any) -> None:
        """Raise unless the tower is open_clip's own."""
        kind, tower = type(model).__name__, self.tower(model)
        if name_of(type(tower)) != "open_clip.VisionTransformer":
            inner = getattr(tower, "trunk", None)
            found = (
                f"a {type(tower).__name__}" if inner is None else f"one of timm: give the {type(inner).__name__} alone"
            )
            path = "" if inner is None else ", .visual.trunk" if tower is not model else ", .trunk"
            raise TypeError(f"{kind} cannot be reduced: its image tower is {found}{path}")

    def blocks(self, model: Any) -> Any:
        """Return ``transformer.resblocks``."""
        return self.tower(model).transformer.resblocks

    def shape(self, model: Any) -> ModelShape:
        """Return depth, grid and width."""
        tower = self.tower(model)
        depth, width = len(tower.transformer.resblocks), tower.transformer.width
        return ModelShape(depth=depth, grid=tuple(tower.grid_size), prefix=1, has_class_token=True, channels=width)

    def prefix(self, model: Any) -> int:
        """Return the class token."""
        return 1

    def has_class_token(self, model: Any) -> bool:
        """Return True: every tower has a class token."""
        return True

    def keeps_every_patch(self, model: Any) -> bool:
        """Return whether there is no patch dropout."""
        return type(self.tower(model).patch_dropout).__name__ == "Identity"

    def looks(self, model: Any) -> Looks:
        """Return what ``pool_type``, or the attention that pools, looks at."""
        tower = self.tower(model)
        if tower.attn_pool is not None or tower.pool_type == "avg":
            return "patches"
        return "class" if tower.pool_type == "tok" and not tower.output_tokens else "tokens"

    def weighs(self, model: Any) -> str | None:
        """Say why a pooling cannot leave rows out: only a mean can, that no norm comes before."""
        tower = self.tower(model)
        if self.looks(model) != "patches" or (tower.attn_pool is None and tower.final_ln_after_pool):
            return None
        return "a pooling by attention, or behind a norm, cannot respect; a mean with final_ln_after_pool=True can"

    def is_checkpointing(self, model: Any) -> bool:
        """Return whether ``set_grad_checkpointing`` was called."""
        return self.tower(model).transformer.grad_checkpointing

    def install(self, model: Any) -> None:
        """Let ``forward_intermediates`` give the full grid."""
        transformer = self.tower(model).transformer
        object.__setattr__(transformer, "forward_intermediates", _Intermediates(transformer, model))

    def remove(self, model: Any) -> None:
        """Undo :meth:`install`."""
        object.__delattr__(self.tower(model).transformer, "forward_intermediates")


class TwoTowersHost(TowerHost):
    """``CLIP``, ``CustomTextCLIP``, ``CoCa``: the image tower is reduced."""

    def tower(self, model: Any) -> Any:
        """Return the image tower."""
        return model.visual


class _Intermediates:
    """A transformer's ``forward_intermediates`` while its model is patched; it is copied and pickled with both."""

    def __init__(self, transformer: Any, model: Any):
        self.transformer, self.model = transformer, model

    def __call__(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        indices: int | Sequence[int] | None = None,
        stop_early: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return open_clip's intermediates on the full grid.

        Every patch shows the token that it is in, a dropped one what it was.
        """
        if attn_mask is not None:
            raise ValueError("a reduced tower takes no attn_mask: its tokens are not the input's")
        transformer = self.transformer
        blocks = transformer.resblocks
        take = range(len(blocks)) if indices is None else indices
        wanted = {index % len(blocks) for index in (range(-take, 0) if isinstance(take, int) else take)}
        state: Tensor | Tokens = x
        taken, final = [], None
        for index, block in enumerate(blocks):
            if stop_early and index > max(wanted):
                break
            if (reduced := reduced_block(block)) is not None:
                final = reduced
                if not isinstance(state, Tokens):
                    state = reduced.start(state, whole=True)
            state = checkpoint(block, state, use_reentrant=False) if transformer.grad_checkpointing else block(state)
            if index in wanted:
                full = isinstance(state, Tokens)
                taken.append(state.dense(self.model.reducers.fill) if full else state)  # type: ignore[union-attr]
        return (final.finish(state) if final is not None and isinstance(state, Tokens) else state), taken  # type: ignore[return-value]


register_host("open_clip.VisionTransformer", TowerHost())
for _name in ("CLIP", "CustomTextCLIP", "CoCa"):
    register_host(f"open_clip.{_name}", TwoTowersHost())
