"""DPC-KNN: merge around density peaks (Zeng et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..arguments import integer, switch
from ..ops import unchecked as ops
from ..tokens import Plan, Tokens
from .base import ModelShape, Reducer, ScheduledReducer
from .block import AttentionBlock, is_bare, is_unhooked, merge
from .schedule import KeepSchedule

__all__ = ["DPCKNN"]


class TokenScore(nn.Module):
    """The learned importance of a token within its cluster: a linear function; its exponential is the weight."""

    def __init__(self, channels: int):
        super().__init__()
        self.score = nn.Linear(channels, 1)
        nn.init.trunc_normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithm of the weights, (B, N, C) -> (B, N), float32 or wider."""
        score = self.score(x).squeeze(-1)
        return score.to(torch.promote_types(score.dtype, torch.float32))


def _weights(score: Tensor, label: Tensor, clusters: int) -> Tensor:
    """Return exponentials of the scores (B, N), divided by one number in a cluster whose greatest score is above 40.

    They would overflow; the weighted means are the same, as :func:`fastreduce.ops.merge_tokens` has them.
    """
    greatest = reference.greatest_of_slots(score.detach(), label, clusters, 40.0)
    return (score - (greatest - 40.0).gather(1, label)).exp()


class DPCKNN(ScheduledReducer):
    """Cluster the tokens that enter a block around peaks of density, and merge each cluster into its weighted mean.

    Args:
        blocks: where the stages stand.
        schedule: clusters of each stage.
        channels: width of the tokens, for the learned weights ``reducers.cluster_layers.*``.
        k_neighbors: nearest tokens, itself included, that a token's density is taken from; all of them where there are
            fewer.
        equal_weight: plain means, and no parameters.
        noise: a generator, on the model's device, for the 1e-6 * U(0, 1) that the released code adds to the density to
            break ties, in evaluation too. None (the default) adds nothing: the result is reproducible.
        backend: see :func:`fastreduce.backend`.
    """

    name = "dpcknn"
    draws_in_evaluation = True

    def __init__(
        self,
        blocks: tuple[int, ...],
        schedule: KeepSchedule,
        channels: int,
        k_neighbors: int = 5,
        equal_weight: bool = False,
        noise: torch.Generator | None = None,
        backend: str = "auto",
    ):
        super().__init__(blocks, schedule, backend)
        if noise is not None and not isinstance(noise, torch.Generator):
            raise TypeError(f"noise must be a torch.Generator or None, got {noise!r}")
        self.k_neighbors = integer("k_neighbors", k_neighbors, least=1)
        self.equal_weight = switch("equal_weight", equal_weight)
        self.generator = noise
        if not self.equal_weight:
            self.cluster_layers = nn.ModuleList(TokenScore(channels) for _ in blocks)

    @classmethod
    def make(cls, shape: ModelShape, /, **arguments: Any) -> Reducer:
        """Make one that knows the width of the tokens."""
        return super().make(shape, channels=shape.channels, **arguments)

    def before(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Cluster, and merge in the order of the centres."""
        keep = self.schedule.count(stage, tokens.patches)
        if keep >= tokens.num_patches:
            return tokens
        prefix, backend = tokens.prefix, tokens.backend
        patches = tokens.x[:, prefix:]
        noise = None
        if self.generator is not None:
            options: dict[str, Any] = {"generator": self.generator, "device": patches.device, "dtype": torch.float32}
            noise = 1e-6 * torch.rand(patches.shape[:2], **options)
        centers, label, groups = ops.cluster_dpc_knn_groups(
            patches, keep, neighbors=self.k_neighbors, noise=noise, backend=backend
        )
        size = log_size = None
        if not self.equal_weight:
            layer: Any = self.cluster_layers[stage]
            if type(layer) is TokenScore and is_unhooked(layer) and is_bare(layer.score):
                log_size = layer.score.weight, layer.score.bias  # applied in the launch of the merge
            else:
                size = _weights(layer(patches), label, keep)
        x, _, normed = merge(
            block.attention_norm(tokens),
            patches,
            label,
            keep,
            size=size,
            log_size=log_size,
            groups=groups,
            eps=1e-6,
            head=tokens.x[:, :prefix],
            backend=backend,
        )
        plan = Plan(self.blocks[stage], tokens.num_patches, keep, kept=centers, slot=label)
        return tokens.reduced(x, plan, normed=normed)
