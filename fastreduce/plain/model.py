"""A timm Vision Transformer with one of the methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .merging import Merges
from .mixing import Mixtures
from .selection import Selections
from .walk import Walk, check_unpatched, prefix_of, rows_of, run_through

__all__ = ["PlainModel"]

OPTIONS: dict[str, dict[str, Any]] = {
    "topk": {},
    "evit": {"normalize": False},
    "dynamicvit": {},
    "ats": {"points": "official"},
    "tome": {"r": None, "rounds": "official", "prop_attn": True, "metric": "before"},
    "kmedoids": {"iters": 3, "cost": "all", "equal_weight": False, "first": 0},
    "dpcknn": {"k_neighbors": 5, "equal_weight": False},
    "sit": {},
    "patchmerger": {"scaled": False},
    "sinkhorn": {"eps": 1.0, "iters": 3, "gradient": "official"},
    "radial": {"norm": "l2", "schedule": None, "min_radius": 1.0},
}

# Methods that reduce what enters a block.
BEFORE = ("radial", "dynamicvit", "kmedoids", "dpcknn", "sit", "patchmerger", "sinkhorn")


class PlainModel(Selections, Merges, Mixtures):
    """A timm Vision Transformer with one of the methods, done as the released code does it; blocks may rotate.

    Where that code has no answer, the plain meaning is taken: without a class token, a token's score is the attention
    that it receives, averaged over heads and queries; prefix tokens (class, distillation, registers) are never reduced;
    where tokens were merged, pooling over patches counts each patch once, in the token that it is in; a mean shares a
    patch of a soft merge out by its weights, and another pooling has it in the token in which it weighs most;
    where images keep different numbers of tokens, the mean is that of the ones that count. Radial patterns drop tokens
    instead of masking them. DPC-KNN's density has no noise. After a forward pass of DynamicViT in training,
    :attr:`decisions` holds what was drawn.

    Args:
        model: an unpatched timm ``VisionTransformer``, ``Eva`` or ``Cait``, or the plain view of another library's; its
            modules are shared, not copied.
        method: any name in ``fastreduce.REDUCERS``.
        at: blocks at which the stages stand.
        keep_rate: stage i keeps ``int(patches * keep_rate ** (i + 1))`` patch tokens; or a sequence of fractions.
        keep: instead, a sequence of counts.
        layers: the method's own parameters under the released code's names (``score_predictor.0.in_conv.0.weight``,
            ``cluster_layers.0.queries``, ...), for instance ``dict(patched.reducers.named_parameters())``.
        **options: as in :func:`fastreduce.patch`.

    Raises:
        ValueError: a patched model, another class of models or blocks, an unknown method, or a learned one without
            layers.
        TypeError: an option that the method does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        *,
        at: int | Sequence[int],
        keep_rate: float | Sequence[float] | None = None,
        keep: int | Sequence[int] | None = None,
        layers: Mapping[str, Tensor] | None = None,
        **options: Any,
    ):
        super().__init__()
        if method not in OPTIONS:
            raise ValueError(f"unknown method {method!r}; expected one of {', '.join(map(repr, OPTIONS))}")
        if unknown := set(options) - set(OPTIONS[method]):
            raise TypeError(f"{method!r} has no option {min(unknown)!r}")
        check_unpatched(model)
        self.model = model
        self.training = model.training
        self.method = method
        self.at = (at,) if isinstance(at, int) else tuple(at)
        self.keep_rate = keep_rate
        self.keep = (keep,) if isinstance(keep, int) else keep
        self.options = {**OPTIONS[method], **options}
        learned = method in ("dynamicvit", "sit", "patchmerger", "sinkhorn")
        if not layers and (learned or (method == "dpcknn" and not self.options["equal_weight"])):
            raise ValueError(f"{method!r} has parameters of its own; give them as layers")
        self.layers = dict(layers or {})
        self.decisions: list[Tensor] = []
        self.late_class = hasattr(model, "blocks_token_only")
        self.prefix: int = prefix_of(model)
        if method == "radial":
            for stage, kept in enumerate(self._radial_patterns(self.model.patch_embed.grid_size)):
                self.register_buffer(f"kept_{stage}", kept, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, height, width) into logits (B, classes)."""
        return run_through(self.model, images, self._walked)

    def _walked(self, x: Tensor, tables: list[Tensor] | None) -> Tensor:
        """Walk tokens (B, N, C) that enter the first block, and each block's rotary table to the end of the last."""
        model = self.model
        walk = Walk(x, patches=x.shape[1] - self.prefix, tables=tables)
        if tables is not None:
            walk.place = torch.arange(walk.patches, device=x.device).expand(len(x), -1)
        for index, block in enumerate(model.blocks):
            stage = self.at.index(index) if index in self.at else None
            if stage is not None and self.method in BEFORE:
                getattr(self, f"_{self.method}")(walk, stage)
            if stage is not None and self.method == "ats":
                self._ats(block, walk, stage)
            else:
                keys = self._attention(block, walk)
                if stage is not None and self.method in ("topk", "evit"):
                    getattr(self, f"_{self.method}")(walk, self._count(stage, walk.patches))
                elif stage is not None and self.method == "tome":
                    self._tome(walk, keys, stage)
            walk.x = walk.x + self._mlp(block, walk.x)
        self.decisions = walk.decisions
        if model.global_pool not in ("", "token") or self.late_class:
            self._prepare_pooling(walk)
        return walk.x

    def _prepare_pooling(self, walk: Walk) -> None:
        """Make the mean over all rows the one that is meant."""
        if walk.mass is not None and self._is_plain_mean():
            counted = F.pad(walk.mass, (self.prefix, 0), value=1.0)
            if not getattr(self.model, "pool_include_prefix", False):
                counted = counted[:, self.prefix :]
            share = F.pad(counted / counted.mean(dim=1, keepdim=True), (walk.x.shape[1] - counted.shape[1], 0), value=1)
            walk.x = walk.x * share.unsqueeze(-1).to(walk.x.dtype)
            return
        if walk.home is not None:  # repeat every merged token, so that pooling counts each patch once
            patches = rows_of(walk.x[:, self.prefix :], walk.home)
            walk.x = torch.cat([walk.x[:, : self.prefix], patches], dim=1)
        present = walk.decisions[-1] if walk.decisions else walk.valid
        if present is not None:
            if walk.decisions:
                present = F.pad(present, (self.prefix, 0), value=1.0)
            outside = 0 if getattr(self.model, "pool_include_prefix", False) else self.prefix
            counted = present[:, outside:].to(walk.x.dtype)
            share = counted / counted.mean(dim=1, keepdim=True)
            walk.x = torch.cat([walk.x[:, :outside], walk.x[:, outside:] * share.unsqueeze(-1)], dim=1)

    def _is_plain_mean(self) -> bool:
        """Return whether the model takes the mean over rows, with no norm before it."""
        if (known := getattr(self.model, "plain_mean", None)) is not None:  # a view of another library's model says so
            return known
        return self.model.global_pool == "avg" and isinstance(self.model.norm, nn.Identity)
