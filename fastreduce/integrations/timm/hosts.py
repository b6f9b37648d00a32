"""timm's classes of models."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from ...reducers import ModelShape
from ..registry import Host, Looks, register_host
from .features import ForwardIntermediates
from .grid import forget_grid, grid_of, watch_grid

__all__ = ["TimmHost", "ViTHost"]

# timm before 1.0.15 has no such switch: there checkpoint_seq was always reentrant.
_reentrant_checkpoints = getattr(timm.layers, "use_reentrant_ckpt", lambda: True)


class TimmHost(Host):
    """Host of what timm's models share: ``blocks``, ``patch_embed``, ``num_prefix_tokens``, ``global_pool``, ``norm``.

    Attributes:
        base: the class whose methods the bridge knows.
        methods: names of its methods that must be as timm has them.
        no_mask: why its blocks take no mask, for the error.
    """

    base: type
    methods: tuple[str, ...] = ("forward_features", "forward_intermediates")
    no_mask: str = "a reduced model takes no attn_mask and no is_causal: its tokens are not the input's"

    def check(self, model: Any) -> None:
        """Raise unless methods and container are timm's."""
        kind = type(model)
        for method in self.methods:
            if getattr(kind, method) is not getattr(self.base, method) or method in vars(model):
                raise TypeError(f"{kind.__name__} cannot be reduced: it has a {method} of its own")
        blocks = model.blocks
        usual = (nn.Sequential.forward, nn.ModuleList.forward)
        if type(blocks).forward not in usual or "forward" in vars(blocks):
            raise TypeError(
                f"{kind.__name__} cannot be reduced: its {type(blocks).__name__} of blocks has a forward of its own"
            )

    def shape(self, model: Any) -> ModelShape:
        """Return depth, grid, prefix and width."""
        return ModelShape(
            depth=len(model.blocks),
            grid=self.shape_grid(model),
            prefix=self.prefix(model),
            has_class_token=self.has_class_token(model),
            channels=model.embed_dim,
        )

    def shape_grid(self, model: Any) -> tuple[int, int]:
        """Return (rows, columns) of patches at the model's own image size."""
        return tuple(self.embedding(model).grid_size)

    def embedding(self, model: Any) -> Any:
        """Return the module that makes patches of images."""
        return model.patch_embed

    def prefix(self, model: Any) -> int:
        """Return ``num_prefix_tokens``."""
        return model.num_prefix_tokens

    def has_class_token(self, model: Any) -> bool:
        """Return whether there is a ``cls_token``."""
        return model.cls_token is not None

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the tokens that enter the first block, and what each block is called with beside them."""
        raise NotImplementedError

    def features(self, model: Any, x: Tensor, images: Tensor) -> Tensor:
        """Return what ``forward_features`` gives, for what the last block gives."""
        return model.norm(x)

    def grid(self, model: Any, patches: int) -> tuple[int, int]:
        """Return the grid of the latest images, as the patch embedding has it."""
        return grid_of(self.embedding(model), patches)

    def keeps_every_patch(self, model: Any) -> bool:
        """Return whether there is no patch dropout."""
        drop = getattr(model, "patch_drop", None)
        return drop is None or isinstance(drop, nn.Identity)

    def looks(self, model: Any) -> Looks:
        """Return what ``global_pool`` looks at."""
        pool = model.global_pool
        return "tokens" if pool == "" else "class" if pool == "token" else "patches"

    def pooled_prefix(self, model: Any) -> int:
        """Return the prefix, if the pooling leaves it out."""
        return 0 if getattr(model, "pool_include_prefix", False) else model.num_prefix_tokens

    def weighs(self, model: Any) -> str | None:
        """Say why a pooling cannot leave rows out: only a mean can, that no norm comes before."""
        if self.looks(model) != "patches" or (model.global_pool == "avg" and isinstance(model.norm, nn.Identity)):
            return None
        return (
            f"global_pool={model.global_pool!r} of this model cannot respect; it can with global_pool='token', or "
            "'avg' with the norm after it (fc_norm=True)"
        )

    def is_checkpointing(self, model: Any) -> bool:
        """Return whether ``set_grad_checkpointing`` was called."""
        return model.grad_checkpointing

    def check_checkpointing(self, model: Any) -> None:
        """Raise for timm's reentrant checkpoints."""
        if _reentrant_checkpoints():
            raise ValueError(
                "timm's reentrant gradient checkpointing would lose the gradients of a reduced model: "
                "call timm.layers.set_reentrant_ckpt(False) first (timm 1.0.15 or newer)"
            )

    def install(self, model: Any) -> None:
        """Let ``forward_intermediates`` give the full grid."""
        if model.reducers.grid is not None:
            watch_grid(self.embedding(model))
        object.__setattr__(model, "forward_intermediates", ForwardIntermediates(model))

    def remove(self, model: Any) -> None:
        """Undo :meth:`install`."""
        forget_grid(self.embedding(model))
        object.__delattr__(model, "forward_intermediates")


class ViTHost(TimmHost):
    """``VisionTransformer``: DeiT, AugReg, DeiT-III, DINOv2, CLIP, SigLIP, ..."""

    base = vit.VisionTransformer

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the tokens; blocks are called with nothing else."""
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return x, [{}] * len(model.blocks)


register_host(vit.VisionTransformer, ViTHost())
