"""Methods that put tokens into clusters or pairs: K-Medoids, DPC-KNN, ToMe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import PlainAttention
from .walk import Walk, distances, moved, rows_of

__all__ = ["Merges"]


class Merges(PlainAttention):
    """Groups of tokens, and one token for each group."""

    def _kmedoids(self, walk: Walk, stage: int) -> None:
        """Keep the medoids of clusters of the tokens before the block."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        keep, batch = self._count(stage, walk.patches), len(patches)
        if keep >= patches.shape[1]:
            return
        distance = distances(patches)
        if self.options["equal_weight"]:
            weights = torch.ones_like(distance[..., 0])
            first = self.options["first"]
            medoids = torch.full((batch, 1), first if isinstance(first, int) else first[stage], device=head.device)
            for _ in range(keep - 1):
                farthest = rows_of(distance, medoids).amax(dim=1).scatter(1, medoids, 0.0)
                medoids = torch.cat([medoids, farthest.argmax(dim=1, keepdim=True)], dim=1)
        else:
            assert walk.matrix is not None
            weights = walk.matrix.detach().sum(dim=(1, 2))[:, self.prefix :]
            medoids = weights.topk(keep, dim=1).indices

        def labels() -> Tensor:
            return distance.gather(2, medoids.unsqueeze(1).expand(-1, distance.shape[1], -1)).argmin(dim=2)

        for _ in range(self.options["iters"]):
            label, medoids = labels(), medoids.clone()
            for cluster in range(keep):
                outside = (label != cluster).unsqueeze(2)
                if self.options["cost"] == "all":
                    cost = weights.unsqueeze(2) * distance
                else:
                    cost = weights.unsqueeze(1) * distance * ~outside.transpose(1, 2)
                medoids[:, cluster] = cost.masked_fill(outside, 1e6).sum(dim=2).argmin(dim=1)
        self._move_home(walk, labels())
        walk.place = moved(walk.place, medoids)
        walk.x = torch.cat([head, rows_of(patches, medoids)], dim=1)

    def _dpcknn(self, walk: Walk, stage: int) -> None:
        """Merge clusters around peaks of density before the block."""
        head, patches = walk.x[:, : self.prefix], walk.x[:, self.prefix :]
        keep, (batch, tokens, channels) = self._count(stage, walk.patches), patches.shape
        if keep >= tokens:
            return
        distance = distances(patches) / channels**0.5
        near = distance.topk(min(self.options["k_neighbors"], tokens), dim=2, largest=False).values
        density = (-(near**2).mean(dim=2)).exp()
        denser = density[:, None, :] > density[:, :, None]
        largest = distance.flatten(1).max(dim=1).values[:, None, None]
        peak = torch.where(denser, distance, largest).min(dim=2).values
        centers = (density * peak).argsort(dim=1, descending=True, stable=True)[:, :keep]
        label = rows_of(distance, centers).argmin(dim=1)
        label.scatter_(1, centers, torch.arange(keep, device=label.device).expand(batch, keep))
        score = torch.zeros_like(patches[..., :1])
        if not self.options["equal_weight"]:
            score = F.linear(patches, self._layer(stage, "score.weight"), self._layer(stage, "score.bias"))
        flat = (label + keep * torch.arange(batch, device=label.device).unsqueeze(1)).flatten()
        # The published exp(score) overflows: divide both sums by exp of the cluster's greatest score, if positive.
        own = F.one_hot(label, keep).bool()
        greatest = score.expand(-1, -1, keep).where(own, 0.0).amax(dim=1).clamp_min(0.0).view(-1, 1)
        weights = (score - greatest[flat].view_as(score)).exp()
        total = weights.new_zeros(batch * keep, 1).index_add(0, flat, weights.flatten(0, 1)) + 1e-6 * (-greatest).exp()
        share = (weights.flatten(0, 1) / total[flat]) * patches.flatten(0, 1)
        merged = patches.new_zeros(batch * keep, channels).index_add(0, flat, share)
        self._move_home(walk, label)
        walk.place = moved(walk.place, centers)
        walk.x = torch.cat([head, merged.view(batch, keep, channels)], dim=1)

    def _tome(self, walk: Walk, keys: Tensor, stage: int) -> None:
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

    def _match_and_merge(self, walk: Walk, metric: Tensor, r: int, again: bool) -> Tensor:
        """Let the r tokens of even position closest to one of odd position join it; return the next round's metric."""
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
            return torch.cat(
                [head, rows_of(source, stays), target.scatter_add(1, index, rows_of(source, merged))], dim=1
            )

        size = walk.x.new_ones(walk.x.shape[:2]) if walk.size is None else walk.size
        size = size.unsqueeze(-1)
        total = sums(size)
        walk.x = sums(walk.x * size) / total
        patches = torch.arange(unit.shape[1], device=unit.device).expand(unit.shape[:2])
        walk.place = moved(walk.place, torch.cat([patches[:, even::2].gather(1, stays), patches[:, odd::2]], dim=1))
        walk.size = total.squeeze(-1)
        if self.model.global_pool not in ("", "token") or self.late_class:
            slot = torch.empty(unit.shape[:2], dtype=torch.int64, device=unit.device)
            first, last = stays.shape[1], unit.shape[1] - r
            rank = torch.arange(last, device=unit.device).expand(unit.shape[0], last)
            joined = torch.empty_like(order).scatter(1, merged, destination + first)
            slot[:, even::2] = joined.scatter(1, stays, rank[:, :first])
            slot[:, odd::2] = rank[:, first:]
            self._move_home(walk, slot)
        return sums(metric * size) / total if again else metric
