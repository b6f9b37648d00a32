"""SiT, PatchMerger and Sinkhorn: every output token is a weighted sum of all tokens, by learned weights."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import integer, number, switch
from ..backends import Resolved
from ..ops import unchecked as ops
from ..tokens import Plan, SoftWeights, Tokens
from .base import AttentionBlock, ModelShape, Reducer, is_bare, is_unhooked
from .schedule import Keep, KeepRate, KeepSchedule

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

    def reschedule(
        self,
        shape: ModelShape,
        *,
        keep_rate: KeepRate = None,
        keep: Keep = None,
        at: int | Sequence[int] | None = None,
    ) -> None:
        """Refuse: the layers have an output for every token."""
        raise ValueError(
            f"{self.name} has layers made for {list(self.clusters)} tokens, got {keep_rate=!r}, {keep=!r}: "
            "call fastreduce.unpatch, patch with the new rate and train again"
        )

    @abc.abstractmethod
    def merge(self, tokens: Tokens, stage: int) -> tuple[Tensor, SoftWeights]:
        """Tokens (B, prefix + N, C) -> (B, prefix + clusters, C) and the weights.

        Layers are applied to the prefix too, whose rows are left out afterwards: cut off before, the rest would be
        copied.
        """

    def in_blocks(self, x: Tensor, stage: int) -> bool:
        """Whether to do some clusters at a time, with a gradient and without, so that both give the same bits."""
        return x.shape[1] * self.clusters[stage] > LOGITS

    def merge_all(self, logits: Tensor, x: Tensor, head: Tensor, backend: Resolved) -> tuple[Tensor, SoftWeights]:
        """Weighted means of x (B, N, C) behind the head (B, prefix, C), by a softmax of logits (B, N, clusters)."""
        merged, logsumexp = ops.soft_merge(logits, x, head=head, backend=backend)
        return merged, SoftWeights(logits, logsumexp=logsumexp)

    def merge_blocks(
        self, logits: Callable[[slice], Tensor], count: int, x: Tensor, head: Tensor, backend: Resolved
    ) -> tuple[Tensor, SoftWeights]:
        """The same for some clusters after the others, which do not depend on one another; no logits are kept."""
        size = max(1, LOGITS // x.shape[1])
        merged, logsumexp = [head], []
        for start in range(0, count, size):
            rows, sums = ops.soft_merge(logits(slice(start, start + size)), x, backend=backend)
            merged.append(rows)
            logsumexp.append(sums)

        def again() -> Tensor:
            with torch.no_grad():
                return logits(slice(None))

        return torch.cat(merged, dim=1), SoftWeights(again, logsumexp=torch.cat(logsumexp, dim=1))

    def before(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Merge softly; the prefix stays."""
        count = self.clusters[stage]
        if count > tokens.num_patches:
            raise ValueError(
                f"{self.name} was made for {count} tokens after block {self.blocks[stage]}, "
                f"but only {tokens.num_patches} come in of {tokens.patches} patches: the image is too small, "
                "patch a model of this image size"
            )
        x, weights = self.merge(tokens, stage)
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

    def merge(self, tokens: Tokens, stage: int) -> tuple[Tensor, SoftWeights]:
        """Weighted means of the tokens as they are."""
        x, prefix = tokens.x, tokens.prefix
        layer: Any = self.cluster_layers[stage]
        sequence: Any = layer.weight if type(layer) is SliceWeights and is_unhooked(layer) else None
        bare = type(sequence) is nn.Sequential and is_unhooked(sequence) and is_bare(sequence[-1])
        if not self.in_blocks(x, stage) or not bare:
            return self.merge_all(layer(x)[:, prefix:], x[:, prefix:], x[:, :prefix], tokens.backend)
        norm, first, activation, last = sequence
        hidden = activation(first(norm(x)))

        def logits(clusters: slice) -> Tensor:
            return (layer.scale * F.linear(hidden, last.weight[clusters], last.bias[clusters]))[:, prefix:]

        return self.merge_blocks(logits, self.clusters[stage], x[:, prefix:], x[:, :prefix], tokens.backend)


class MergerQueries(nn.Module):
    """PatchMerger's norm and learned queries: how much each token matters to each output token."""

    def __init__(self, channels: int, clusters: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.queries = nn.Parameter(torch.randn(clusters, channels))

    def forward(self, x: Tensor, factor: float = 1.0, clusters: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> normalised (B, N, C), and logits (B, N, clusters) of some clusters, times a factor."""
        normed = self.norm(x)
        queries = self.queries[clusters]
        return normed, F.linear(normed, queries if factor == 1.0 else queries * factor)


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
        self.scaled = switch("scaled", scaled)
        self.cluster_layers = nn.ModuleList(MergerQueries(shape.channels, count) for count in self.clusters)

    def merge(self, tokens: Tokens, stage: int) -> tuple[Tensor, SoftWeights]:
        """Weighted means of the normalised tokens."""
        x, prefix = tokens.x, tokens.prefix
        layer: Any = self.cluster_layers[stage]
        factor = x.shape[-1] ** -0.5 if self.scaled else 1.0
        if not self.in_blocks(x, stage):
            normed, logits = layer(x, factor)
            return self.merge_all(logits[:, prefix:], normed[:, prefix:], x[:, :prefix], tokens.backend)

        def some(clusters: slice) -> Tensor:
            return layer(x, factor, clusters)[1][:, prefix:]

        normed, _ = layer(x, factor, slice(0))
        return self.merge_blocks(some, self.clusters[stage], normed[:, prefix:], x[:, :prefix], tokens.backend)


class TransportCenters(nn.Module):
    """Sinkhorn's learned centres."""

    def __init__(self, channels: int, clusters: int):
        super().__init__()
        self.v = nn.Parameter(torch.randn(clusters, channels))

    def forward(self, exact: bool) -> Tensor:
        """(clusters, C) the centres, rows of length one; an exact gradient is the one through the normalisation."""
        if exact or not torch.is_grad_enabled():
            return F.normalize(self.v, dim=-1)
        v = self.v.detach()
        return F.normalize(v, dim=-1) + (self.v - v)  # adds zero, and hands the gradient on as it is


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
        self.eps = number("eps", eps)
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, got {eps}")
        if gradient not in ("official", "exact"):
            raise ValueError(f"gradient must be 'official' or 'exact', got {gradient!r}")
        self.iters = integer("iters", iters, least=1)
        self.gradient = gradient
        self.cluster_layers = nn.ModuleList(TransportCenters(shape.channels, count) for count in self.clusters)

    def merge(self, tokens: Tokens, stage: int) -> tuple[Tensor, SoftWeights]:
        """Sums of normalised tokens: what each token gives away adds up to one."""
        x, prefix = tokens.x, tokens.prefix
        centers = self.cluster_layers[stage](self.gradient == "exact")
        eps, patches = self.eps, x[:, prefix:]
        merged, similarity, token_bias, cluster_bias = ops.sinkhorn_merge(
            patches,
            centers,
            eps=eps,
            iters=self.iters,
            head=x[:, :prefix],
            similarity=not self.in_blocks(x, stage),
            backend=tokens.backend,
        )
        if similarity is not None:
            return merged, SoftWeights(similarity, token_bias, cluster_bias)

        def again() -> Tensor:
            with torch.no_grad():
                unit = F.normalize(patches.to(token_bias.dtype), dim=2)
                return unit @ centers.to(token_bias.dtype).t() / eps

        return merged, SoftWeights(again, token_bias, cluster_bias)
