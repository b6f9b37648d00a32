"""Methods that keep some tokens: Top-K, EViT, ATS, DynamicViT, radial patterns."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import PlainAttention
from .walk import Walk, moved, rows_of

__all__ = ["Selections"]


class Selections(PlainAttention):
    """Scores of the tokens, and the tokens that stay."""

    def _scores(self, matrix: Tensor) -> Tensor:
        """Return (B, patches), the attention of the class token, or else of the average token, in (B, H, N, N)."""
        rows = matrix.mean(dim=1)
        received = rows[:, 0] if self.model.cls_token is not None and self.prefix > 0 else rows.mean(dim=1)
        return received[:, self.prefix :]

    def _topk(self, walk: Walk, keep: int) -> None:
        """Keep the tokens of the highest scores, best first."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        if keep < patches.shape[1]:
            assert walk.matrix is not None
            kept = self._scores(walk.matrix).topk(keep, dim=1).indices
            walk.place = moved(walk.place, kept)
            walk.x = torch.cat([head, rows_of(patches, kept)], dim=1)

    def _evit(self, walk: Walk, keep: int) -> None:
        """Keep the same tokens, and one more: the sum of all the others, each times its score."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        if keep >= patches.shape[1]:
            return
        assert walk.matrix is not None
        scores = self._scores(walk.matrix)
        order = scores.argsort(dim=1, descending=True, stable=True)
        kept, rest = order[:, :keep], order[:, keep:].sort(dim=1).values
        weights = scores.gather(1, rest).unsqueeze(-1)
        if self.options["normalize"]:
            weights = weights / weights.sum(dim=1, keepdim=True)
        fused = (rows_of(patches, rest) * weights).sum(dim=1, keepdim=True)
        rank = torch.arange(patches.shape[1], device=order.device).clamp_max(keep).expand_as(order)
        walk.place = moved(walk.place, F.pad(kept, (0, 1), value=-1))
        self._move_home(walk, torch.empty_like(order).scatter(1, order, rank))
        walk.x = torch.cat([head, rows_of(patches, kept), fused], dim=1)

    def _ats(self, block: Any, walk: Walk, stage: int) -> None:
        """Sample the query rows of attention by the class token's attention times the length of the values."""
        prefix, normed = self.prefix, self._normed(block, walk.x)
        q, k, v, _ = self._query_key_value(block, walk, normed)
        matrix = block.attn.attn_drop(self._weights(block, walk, q, k))
        scores = (matrix[:, :, 0] * v.norm(dim=-1)).sum(dim=1)[:, prefix:]
        cumulated = (scores / (scores.sum(dim=1, keepdim=True) + 1e-6)).cumsum(dim=1)
        parts = self._count(stage, walk.patches) + 1
        start, end, step = 1 / (2 * parts), (2 * parts - 1) / (2 * parts), 2 / (2 * parts)
        steps = torch.arange(start, end, step, dtype=torch.float32, device="cpu")
        points = max(1, len(steps)) if self.options["points"] == "official" else parts - 1
        grid = (2 * torch.arange(points, device=q.device) + 1).to(scores.dtype) / (2 * parts)
        nearest = (grid[None, :, None] - cumulated[:, None, :]).abs().min(dim=2).indices
        chosen = [row.unique() for row in nearest]
        longest = max(len(row) for row in chosen)
        index = torch.stack([F.pad(row, (0, longest - len(row)), value=-1) for row in chosen])
        head = torch.arange(prefix, device=index.device).expand(len(index), prefix)
        rows = torch.cat([head, (index + prefix).masked_fill(index < 0, 0)], dim=1)
        walk.valid = F.pad(index >= 0, (prefix, 0), value=True)
        walk.place = moved(walk.place, index)
        picked = matrix.gather(2, rows[:, None, :, None].expand(-1, matrix.shape[1], -1, matrix.shape[3]))
        walk.x = rows_of(walk.x, rows) + self._project(block, picked.to(v.dtype) @ v, rows_of(normed, rows))

    def _predict(self, stage: int, tokens: Tensor, present: Tensor) -> Tensor:
        """Return the log-probabilities (B, N, 2) of keeping and dropping."""

        def linear(name: str, x: Tensor) -> Tensor:
            return F.linear(x, self._layer(stage, f"{name}.weight"), self._layer(stage, f"{name}.bias"))

        weight, bias = (self._layer(stage, f"in_conv.0.{name}") for name in ("weight", "bias"))
        hidden = F.gelu(linear("in_conv.1", F.layer_norm(tokens, tokens.shape[-1:], weight, bias)))
        local, shared = hidden.chunk(2, dim=-1)
        shared = (shared * present).sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True) + 1e-6
        mixed = torch.cat([local, shared.expand_as(local)], dim=-1)
        return linear("out_conv.4", F.gelu(linear("out_conv.2", F.gelu(linear("out_conv.0", mixed))))).log_softmax(-1)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).exponential_()

    def _dynamicvit(self, walk: Walk, stage: int) -> None:
        """Keep what the predictor scores highest before the block; in training, only decide."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        if self.training:
            before = walk.decisions[-1] if walk.decisions else patches.new_ones(patches.shape[:2])
            predicted = self._predict(stage, patches, before.unsqueeze(-1))
            soft = (predicted - self._noise(predicted).log()).softmax(dim=-1)
            hard = torch.zeros_like(soft).scatter(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
            walk.decisions.append((hard - soft.detach() + soft)[..., 0] * before)
            return
        keep = self._count(stage, walk.patches)
        if keep < patches.shape[1]:
            scores = self._predict(stage, patches, patches.new_ones(*patches.shape[:2], 1))[..., 0]
            kept = scores.argsort(dim=1, descending=True, stable=True)[:, :keep]
            walk.place = moved(walk.place, kept)
            walk.x = torch.cat([head, rows_of(patches, kept)], dim=1)

    def _radial_patterns(self, grid: tuple[int, int]) -> list[Tensor]:
        """Return the tokens that each stage keeps, inside its radius, in float32 as the released code."""
        linspace = functools.partial(torch.linspace, dtype=torch.float32, device="cpu")
        y, x = torch.meshgrid(*(linspace(-size // 2, size // 2, size) for size in grid), indexing="ij")
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
            points = linspace(distance[0, 0].item(), smallest, last - first + 3)
            limits = list(points if first == 0 else points[1:])[: last - first + 1]
            self.at = tuple(range(first, last + 1))
        else:
            rings = distance.unique()
            held = [int((distance <= ring).sum()) for ring in rings]
            limits = []
            for stage in range(len(self.at)):
                wanted = self._count(stage, distance.numel())
                limits.append(rings[min(range(len(rings)), key=lambda ring: abs(held[ring] - wanted))])
        present, patterns = torch.arange(distance.numel(), device="cpu"), []
        for limit in limits:
            kept = (distance.flatten()[present] <= limit).nonzero().squeeze(1)
            present = present[kept]
            patterns.append(kept)
        return patterns

    def _radial(self, walk: Walk, stage: int) -> None:
        """Drop what lies outside the radius before the block."""
        kept = self.get_buffer(f"kept_{stage}").expand(walk.x.shape[0], -1)
        walk.place = moved(walk.place, kept)
        walk.x = torch.cat([walk.x[:, : self.prefix], rows_of(walk.x[:, self.prefix :], kept)], dim=1)
