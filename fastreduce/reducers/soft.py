"""SiT, PatchMerger and Sinkhorn: every output token is a weighted sum of all tokens, by learned weights."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..tokens import Plan, SoftWeights, Tokens
from .base import AttentionBlock, ModelShape, Reducer, is_bare
from .schedule import KeepSchedule

__all__ = ["PatchMerger", "SiT", "Sinkhorn"]

LOGITS = 1 << 20  # of an image that are in memory at a time if more are not kept


class SoftReducer(Reducer):
    """What the three have in common: a layer for every stage, made for a fixed number of output tokens.

    A keep rate of 1 mixes the tokens too, unlike a method that selects.
    """

    def __init__(self, blocks: tuple[int, ...], schedule: KeepSchedule, shape: ModelShape, backend: str = "auto"):
        super().__init__(blocks, backend)
        self.clusters = tuple(schedule.count(stage, shape.patches) for stage in range(len(blocks)))

    @classmethod
    def make(cls, shape: ModelShape, /, **arguments: Any) -> Reducer:
        """The number of output tokens is fixed for the model's own grid."""
        return super().make(shape, shape=shape, **arguments)

    def counts(self, shape: ModelShape) -> list[int]:
        """Patch tokens after each stage."""
        return list(self.clusters)

    @abc.abstractmethod
    def merge(self, x: Tensor, prefix: int, stage: int) -> tuple[Tensor, SoftWeights]:
        """(B, prefix + N, C) -> (B, prefix + clusters, C) and the weights.

        Layers are applied to the prefix too, whose rows are left out afterwards: cut off before, the rest would be
        copied.
        """

    def in_blocks(self, x: Tensor, stage: int) -> bool:
        """Whether to do some clusters at a time, with a gradient and without, so that both give the same bits."""
        return x.shape[1] * self.clusters[stage] > LOGITS

    def merge_all(self, logits: Tensor, x: Tensor, head: Tensor) -> tuple[Tensor, SoftWeights]:
        """Weighted means of x (B, N, C) behind the head (B, prefix, C), by a softmax of logits (B, N, clusters)."""
        merged, logsumexp = ops.soft_merge(logits, x, head=head, backend=self.backend)
        return merged, SoftWeights(logits, logsumexp=logsumexp)

    def merge_blocks(
        self, logits: Callable[[slice], Tensor], count: int, x: Tensor, head: Tensor
    ) -> tuple[Tensor, SoftWeights]:
        """The same for some clusters after the others, which do not depend on one another; no logits are kept."""
        size = max(1, LOGITS // x.shape[1])
        merged, logsumexp = [head], []
        for start in range(0, count, size):
            rows, sums = ops.soft_merge(logits(slice(start, start + size)), x, backend=self.backend)
            merged.append(rows)
            logsumexp.append(sums)
        return torch.cat(merged, dim=1), SoftWeights(lambda: logits(slice(None)), logsumexp=torch.cat(logsumexp, dim=1))

    def before(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Merge softly; the prefix stays."""
        prefix, count = tokens.prefix, self.clusters[stage]
        if count > tokens.num_patches:
            raise ValueError(
                f"{self.name} was made for {count} tokens after block {self.blocks[stage]}, "
                f"but only {tokens.num_patches} come in: patch a model of this image size"
            )
        x, weights = self.merge(tokens.x, prefix, stage)
        plan = Plan(self.blocks[stage], tokens.num_patches, count, weights=weights.detach())
        return tokens.replace(x, plans=(*tokens.plans, plan))


class SliceWeights(nn.Module):
    """SiT's two-layer perceptron: how much each token matters to each output token."""

    def __init__(self, channels: int, clusters: int):
        super().__init__()
        hidden = channels // 2
        self.weight = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, clusters)
        )
        self.scale = nn.Parameter(torch.ones(1, 1, 1))
        for layer in self.weight:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> logits (B, N, clusters)."""
        return self.scale * self.weight(x)


class SiT(SoftReducer):
    """Token slimming of Self-slimmed Vision Transformer (Zong et al. 2022): weights from a perceptron.

    Args:
        blocks: where the stages stand.
        schedule: output tokens of each stage.
        shape: the model's width and grid, for ``reducers.cluster_layers.*``.
        backend: see :func:`fastreduce.backend`.
    """

    name = "sit"

    def __init__(self, blocks: tuple[int, ...], schedule: KeepSchedule, shape: ModelShape, backend: str = "auto"):
        super().__init__(blocks, schedule, shape, backend)
        self.cluster_layers = nn.ModuleList(SliceWeights(shape.channels, count) for count in self.clusters)

    def merge(self, x: Tensor, prefix: int, stage: int) -> tuple[Tensor, SoftWeights]:
        """Weighted means of the tokens as they are."""
        layer: Any = self.cluster_layers[stage]
        norm, first, activation, last = layer.weight
        if not self.in_blocks(x, stage) or not is_bare(last):
            return self.merge_all(layer(x)[:, prefix:], x[:, prefix:], x[:, :prefix])
        hidden = activation(first(norm(x)))

        def logits(clusters: slice) -> Tensor:
            return (layer.scale * F.linear(hidden, last.weight[clusters], last.bias[clusters]))[:, prefix:]

        return self.merge_blocks(logits, self.clusters[stage], x[:, prefix:], x[:, :prefix])


class MergerQueries(nn.Module):
    """PatchMerger's norm and learned queries."""

    def __init__(self, channels: int, clusters: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.queries = nn.Parameter(torch.randn(clusters, channels))


class PatchMerger(SoftReducer):
    """PatchMerger (Renggli et al. 2022): attention of learned queries over normalised tokens, which are what is summed.

    Args:
        blocks: where the stages stand.
        schedule: output tokens of each stage.
        shape: the model's width and grid, for ``reducers.cluster_layers.*``.
        scaled: divide the logits by the square root of the width. The released code does not.
        backend: see :func:`fastreduce.backend`.
    """

    name = "patchmerger"

    def __init__(
        self,
        blocks: tuple[int, ...],
        schedule: KeepSchedule,
        shape: ModelShape,
        scaled: bool = False,
        backend: str = "auto",
    ):
        super().__init__(blocks, schedule, shape, backend)
        if not isinstance(scaled, bool):
            raise TypeError(f"scaled must be True or False, got {scaled!r}")
        self.scaled = scaled
        self.cluster_layers = nn.ModuleList(MergerQueries(shape.channels, count) for count in self.clusters)

    def merge(self, x: Tensor, prefix: int, stage: int) -> tuple[Tensor, SoftWeights]:
        """Weighted means of the normalised tokens."""
        layer: Any = self.cluster_layers[stage]
        normed = layer.norm(x)
        queries = layer.queries * x.shape[-1] ** -0.5 if self.scaled else layer.queries

        def logits(clusters: slice) -> Tensor:
            return F.linear(normed, queries[clusters])[:, prefix:]

        if not self.in_blocks(x, stage):
            return self.merge_all(logits(slice(None)), normed[:, prefix:], x[:, :prefix])
        return self.merge_blocks(logits, self.clusters[stage], normed[:, prefix:], x[:, :prefix])


class TransportCenters(nn.Module):
    """Sinkhorn's learned centres."""

    def __init__(self, channels: int, clusters: int):
        super().__init__()
        self.v = nn.Parameter(torch.randn(clusters, channels))


class Sinkhorn(SoftReducer):
    """Entropic transport of normalised tokens to normalised centres (Haurum et al. 2023; Cuturi 2013).

    Args:
        blocks: where the stages stand.
        schedule: output tokens of each stage.
        shape: the model's width and grid, for ``reducers.cluster_layers.*``.
        eps: entropic regularisation.
        iters: Sinkhorn iterations.
        gradient: the centres are normalised on the fly. ``"official"`` takes the gradient of the normalised centres for
            that of the parameter, as the released code does, which overwrites the parameter by its normalised self;
            ``"exact"`` differentiates through the normalisation.
        backend: see :func:`fastreduce.backend`.
    """

    name = "sinkhorn"

    def __init__(
        self,
        blocks: tuple[int, ...],
        schedule: KeepSchedule,
        shape: ModelShape,
        eps: float = 1.0,
        iters: int = 3,
        gradient: Literal["official", "exact"] = "official",
        backend: str = "auto",
    ):
        super().__init__(blocks, schedule, shape, backend)
        if isinstance(eps, bool) or not isinstance(eps, (int, float)):
            raise TypeError(f"eps must be a number, got {eps!r}")
        if not 0 < eps < float("inf"):
            raise ValueError(f"eps must be positive, got {eps}")
        if isinstance(iters, bool) or not isinstance(iters, int):
            raise TypeError(f"iters must be an integer, got {iters!r}")
        if iters < 1:
            raise ValueError(f"iters must be at least 1, got {iters}")
        if gradient not in ("official", "exact"):
            raise ValueError(f"gradient must be 'official' or 'exact', got {gradient!r}")
        self.eps = float(eps)
        self.iters = iters
        self.gradient = gradient
        self.cluster_layers = nn.ModuleList(TransportCenters(shape.channels, count) for count in self.clusters)

    def _centers(self, stage: int) -> Tensor:
        """(clusters, C), rows of length one."""
        layer: Any = self.cluster_layers[stage]
        if self.gradient == "exact" or not torch.is_grad_enabled():
            return F.normalize(layer.v, dim=-1)
        v = layer.v.detach()
        return F.normalize(v, dim=-1) + (layer.v - v)  # adds zero, and hands the gradient on as it is

    def merge(self, x: Tensor, prefix: int, stage: int) -> tuple[Tensor, SoftWeights]:
        """Sums of normalised tokens: what each token gives away adds up to one."""
        centers, eps, patches = self._centers(stage), self.eps, x[:, prefix:]
        merged, similarity, token_bias, cluster_bias = ops.sinkhorn_merge(
            patches,
            centers,
            eps=eps,
            iters=self.iters,
            head=x[:, :prefix],
            similarity=not self.in_blocks(x, stage),
            backend=self.backend,
        )
        if similarity is not None:
            return merged, SoftWeights(similarity, token_bias, cluster_bias)

        def again() -> Tensor:
            unit = F.normalize(patches.to(token_bias.dtype), dim=2)
            return unit @ centers.to(token_bias.dtype).t() / eps

        return merged, SoftWeights(again, token_bias, cluster_bias)
