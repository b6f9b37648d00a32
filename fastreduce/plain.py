"""The published algorithms, written plainly: the work is done as the study's released code does it.

Every block builds its whole attention matrix, scores are read from it, tokens are sorted, gathered with an expanded
index and scattered into sums. Nothing of fastreduce's own operators or rewrites is used here, so that it can be

* the oracle: ``PlainModel(copy.deepcopy(model).double(), ...)`` decides and computes in float64;
* the baseline of ``fastreduce compare``, beside :class:`FreeSlice`, the ideal whose decision costs nothing;
* the documentation of what each method computes.

Both run the modules of an unpatched timm Vision Transformer and import neither timm nor the rest of fastreduce.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FreeSlice", "PlainModel"]

_OPTIONS: dict[str, dict[str, Any]] = {
    "topk": {},
    "evit": {"normalize": False},
    "tome": {"r": None, "rounds": "official"},
    "radial": {"norm": "l2", "schedule": None, "min_radius": 1.0},
}


@dataclasses.dataclass
class _Walk:
    """What one forward pass carries from block to block."""

    x: Tensor  # (B, N, C), prefix first
    patches: int  # patch tokens before any reduction
    size: Tensor | None = None  # (B, N) patches that each token stands for
    home: Tensor | None = None  # (B, patches) the token that each patch is in


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """X (B, N, C), index (B, K) -> (B, K, C)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _embed(model: Any, images: Tensor) -> Tensor:
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def _check_unpatched(model: Any) -> None:
    if type(model.blocks) is not nn.Sequential:
        raise ValueError("the plain form needs the unpatched model; call fastreduce.unpatch first, or give it a copy")


class PlainModel(nn.Module):
    """A timm Vision Transformer with one of the methods, done as the released code does it.

    Where that code has no answer, the plain meaning is taken: without a class token, a token's score is the attention
    that it receives, averaged over heads and queries; prefix tokens (class, distillation, registers) are never reduced;
    after ToMe, pooling over patches counts each patch once. Radial patterns drop tokens instead of masking them.

    Args:
        model: an unpatched timm ``VisionTransformer``; its modules are shared, not copied.
        method: ``"topk"``, ``"evit"``, ``"tome"`` or ``"radial"``.
        at: blocks at which the stages stand.
        keep_rate: stage i keeps ``int(patches * keep_rate ** (i + 1))`` patch tokens; or a sequence of fractions.
        keep: instead, a sequence of counts.
        fused: use ``scaled_dot_product_attention`` in blocks whose attention matrix no one reads.
        **options: ``evit``: ``normalize``; ``tome``: ``r``, ``rounds``; ``radial``: ``norm``, ``schedule``,
            ``min_radius``, as in :func:`fastreduce.patch`.

    Raises:
        ValueError: a patched model, or an unknown method.
        TypeError: an option that the method does not have.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        method: str,
        *,
        at: int | Sequence[int],
        keep_rate: float | Sequence[float] | None = None,
        keep: int | Sequence[int] | None = None,
        fused: bool = False,
        **options: Any,
    ):
        super().__init__()
        if method not in _OPTIONS:
            raise ValueError(f"unknown method {method!r}; expected one of {', '.join(map(repr, _OPTIONS))}")
        if unknown := set(options) - set(_OPTIONS[method]):
            raise TypeError(f"{method!r} has no option {min(unknown)!r}")
        _check_unpatched(model)
        self.model = model
        self.method = method
        self.at = (at,) if isinstance(at, int) else tuple(at)
        self.keep_rate = keep_rate
        self.keep = (keep,) if isinstance(keep, int) else keep
        self.fused = fused
        self.options = {**_OPTIONS[method], **options}
        self.prefix: int = self.model.num_prefix_tokens
        if method == "radial":
            for stage, kept in enumerate(self._radial_patterns(self.model.patch_embed.grid_size)):
                self.register_buffer(f"kept_{stage}", kept, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> logits (B, classes)."""
        model = self.model
        x = _embed(model, images)
        walk = _Walk(x, patches=x.shape[1] - self.prefix)
        for index, block in enumerate(model.blocks):
            stage = self.at.index(index) if index in self.at else None
            if stage is not None and self.method == "radial":
                self._radial(walk, stage)
            matrix, keys = self._attention(block, walk, stage)
            if stage is not None and matrix is not None and self.method == "topk":
                self._topk(walk, matrix, self._count(stage, walk.patches))
            elif stage is not None and matrix is not None and self.method == "evit":
                self._evit(walk, matrix, self._count(stage, walk.patches))
            elif stage is not None and self.method == "tome":
                self._tome(walk, keys, stage)
            walk.x = walk.x + block.drop_path2(block.ls2(block.mlp(block.norm2(walk.x))))
        if walk.home is not None:  # repeat every merged token, so that pooling counts each patch once
            patches = _rows(walk.x[:, self.prefix :], walk.home)
            walk.x = torch.cat([walk.x[:, : self.prefix], patches], dim=1)
        return model.forward_head(model.norm(walk.x))

    def _count(self, stage: int, patches: int) -> int:
        """Patch tokens that a stage keeps."""
        if self.keep is not None:
            return self.keep[stage]
        rate: Any = self.keep_rate
        return int(patches * (rate ** (stage + 1) if isinstance(rate, (int, float)) else rate[stage]))

    def _attention(self, block: Any, walk: _Walk, stage: int | None) -> tuple[Tensor | None, Tensor]:
        """``x + proj(softmax(q k^T + log size) v)``; returns the matrix (B, H, N, N) and the keys (B, H, N, D)."""
        attn, x = block.attn, walk.x
        batch, tokens, _ = x.shape
        normed = block.norm1(x)
        q, k, v = attn.qkv(normed).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        bias = None if walk.size is None else walk.size.log()[:, None, None, :]
        matrix = None
        if self.fused and (stage is None or self.method not in ("topk", "evit")):
            dropout = attn.attn_drop.p if self.training else 0.0
            mask = None if bias is None else bias.to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=attn.scale)
        else:
            logits = (q @ k.transpose(-2, -1)) * attn.scale
            matrix = attn.attn_drop((logits if bias is None else logits + bias).softmax(dim=-1))
            out = matrix.to(v.dtype) @ v
        out = out.transpose(1, 2).reshape(batch, tokens, -1)
        if getattr(attn, "norm", None) is not None:
            out = attn.norm(out)
        if getattr(attn, "gate", None) is not None:
            out = out * attn.gate(normed).sigmoid()
        walk.x = x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(out))))
        return matrix, k

    def _scores(self, matrix: Tensor) -> Tensor:
        """(B, H, N, N) -> (B, patches): what the class token, or else the average token, attends to."""
        rows = matrix.mean(dim=1)
        received = rows[:, 0] if self.model.cls_token is not None else rows.mean(dim=1)
        return received[:, self.prefix :]

    def _topk(self, walk: _Walk, matrix: Tensor, keep: int) -> None:
        """Keep the tokens of the highest scores, best first."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        if keep < patches.shape[1]:
            kept = self._scores(matrix).topk(keep, dim=1).indices
            walk.x = torch.cat([head, _rows(patches, kept)], dim=1)

    def _evit(self, walk: _Walk, matrix: Tensor, keep: int) -> None:
        """The same, and one more token: the sum of all the others, each times its score."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        if keep >= patches.shape[1]:
            return
        scores = self._scores(matrix)
        order = scores.argsort(dim=1, descending=True, stable=True)
        kept, rest = order[:, :keep], order[:, keep:].sort(dim=1).values
        weights = scores.gather(1, rest).unsqueeze(-1)
        if self.options["normalize"]:
            weights = weights / weights.sum(dim=1, keepdim=True)
        fused = (_rows(patches, rest) * weights).sum(dim=1, keepdim=True)
        walk.x = torch.cat([head, _rows(patches, kept), fused], dim=1)

    def _tome(self, walk: _Walk, keys: Tensor, stage: int) -> None:
        """Merge similar tokens, weighted by their sizes; a matching merges at most half of them."""
        present = walk.x.shape[1] - self.prefix
        exact, r = self.options["rounds"] == "exact", self.options["r"]
        if r is not None:
            wanted = r if isinstance(r, int) else r[stage]
        elif exact:
            wanted = present - self._count(stage, walk.patches)
        else:  # as if the stages before had reached their counts
            before = self._count(stage - 1, walk.patches) if stage else walk.patches
            wanted = before - self._count(stage, walk.patches)
        metric = keys.detach().mean(dim=1)
        while wanted > 0 and present > 1:
            merges = min(wanted, present // 2)
            wanted, present = wanted - merges, present - merges
            again = exact and wanted > 0 and present > 1
            metric = self._match_and_merge(walk, metric, merges, again)
            if not again:
                return

    def _match_and_merge(self, walk: _Walk, metric: Tensor, r: int, again: bool) -> Tensor:
        """The r tokens of even position closest to one of odd position join it; returns the next round's metric."""
        prefix = self.prefix
        even, odd = prefix % 2, 1 - prefix % 2  # positions count the prefix, which takes no part
        unit = (metric / metric.norm(dim=-1, keepdim=True))[:, prefix:]
        best, destination = (unit[:, even::2] @ unit[:, odd::2].transpose(1, 2)).max(dim=-1)
        order = best.argsort(dim=1, descending=True, stable=True)
        merged, stays = order[:, :r], order[:, r:].sort(dim=1).values
        destination = destination.gather(1, merged)

        def sums(values: Tensor) -> Tensor:
            head, patches = values[:, :prefix], values[:, prefix:]
            source, target = patches[:, even::2], patches[:, odd::2]
            index = destination.unsqueeze(-1).expand(-1, -1, values.shape[-1])
            return torch.cat([head, _rows(source, stays), target.scatter_add(1, index, _rows(source, merged))], dim=1)

        size = walk.x.new_ones(walk.x.shape[:2]) if walk.size is None else walk.size
        size = size.unsqueeze(-1)
        total = sums(size)
        walk.x = sums(walk.x * size) / total
        walk.size = total.squeeze(-1)
        if self.model.global_pool not in ("", "token"):
            slot = torch.empty(unit.shape[:2], dtype=torch.int64, device=unit.device)
            first, last = stays.shape[1], unit.shape[1] - r
            rank = torch.arange(last, device=unit.device).expand(unit.shape[0], last)
            joined = torch.empty_like(order).scatter(1, merged, destination + first)
            slot[:, even::2] = joined.scatter(1, stays, rank[:, :first])
            slot[:, odd::2] = rank[:, first:]
            walk.home = slot if walk.home is None else slot.gather(1, walk.home)
        return sums(metric * size) / total if again else metric

    def _radial_patterns(self, grid: tuple[int, int]) -> list[Tensor]:
        """What each stage keeps of the tokens present: those inside its radius."""
        y, x = torch.meshgrid(*(torch.linspace(-size // 2, size // 2, size) for size in grid), indexing="ij")
        norms = {"l1": y.abs() + x.abs(), "l2": (y**2 + x**2).sqrt(), "linf": torch.maximum(y.abs(), x.abs())}
        distance = norms[self.options["norm"]]
        schedule = self.options["schedule"]
        if schedule is None:
            schedule = "contiguous" if self.keep_rate is None and self.keep is None else "stages"
        if schedule == "contiguous":
            first, last = self.at[0], self.at[-1]
            smallest = float(self.options["min_radius"])
            if smallest <= 0:
                smallest = distance[grid[0] // 2, grid[1] // 2].item()
            points = torch.linspace(distance[0, 0].item(), smallest, last - first + 3)
            limits = list(points if first == 0 else points[1:])[: last - first + 1]
            self.at = tuple(range(first, last + 1))
        else:
            rings = distance.unique()
            held = [int((distance <= ring).sum()) for ring in rings]
            limits = []
            for stage in range(len(self.at)):
                wanted = self._count(stage, distance.numel())
                limits.append(rings[min(range(len(rings)), key=lambda ring: abs(held[ring] - wanted))])
        present, patterns = torch.arange(distance.numel()), []
        for limit in limits:
            kept = (distance.flatten()[present] <= limit).nonzero().squeeze(1)
            present = present[kept]
            patterns.append(kept)
        return patterns

    def _radial(self, walk: _Walk, stage: int) -> None:
        """Before the block, drop what lies outside the radius."""
        kept = self.get_buffer(f"kept_{stage}").expand(walk.x.shape[0], -1)
        walk.x = torch.cat([walk.x[:, : self.prefix], _rows(walk.x[:, self.prefix :], kept)], dim=1)


class FreeSlice(nn.Module):
    """The unreduced model that, between attention and MLP, simply cuts its tokens: a reduction whose decision is free.

    Args:
        model: an unpatched timm ``VisionTransformer``; its modules are shared, not copied.
        counts: patch tokens left after each stage.
        blocks: the blocks at which the stages stand.

    Raises:
        ValueError: a patched model, or a count for each block missing.
    """

    model: Any

    def __init__(self, model: nn.Module, counts: Sequence[int], blocks: Sequence[int]):
        super().__init__()
        _check_unpatched(model)
        if len(counts) != len(blocks):
            raise ValueError(f"counts must have one entry for each of the {len(blocks)} blocks, got {counts!r}")
        self.model = model
        self.counts = dict(zip(blocks, counts, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) -> logits (B, classes)."""
        model = self.model
        x = _embed(model, images)
        for index, block in enumerate(model.blocks):
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            if index in self.counts:
                x = x[:, : model.num_prefix_tokens + self.counts[index]]
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return model.forward_head(model.norm(x))
