"""K-Medoids: keep the medoids of clusters weighted by attention (Marin et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from .. import ops
from ..tokens import Plan, Tokens
from .base import AttentionBlock, ModelShape, Reducer, ScheduledReducer, attend_all, gather
from .schedule import KeepSchedule, as_tuple

__all__ = ["KMedoids"]


class KMedoids(ScheduledReducer):
    """Cluster the tokens that enter a block, keep the medoids as they are.

    A token's weight is the attention that it received in the block before, summed over heads and queries.

    Args:
        blocks: where the stages stand; not block 0 unless ``equal_weight``, since no attention comes before it.
        schedule: clusters of each stage.
        iters: rounds of assignment and update.
        cost: what a medoid minimises within its cluster. ``"all"``, as the released code: its own weight times its
            distances to *all* tokens, which prefers tokens of low weight. ``"members"``: the distances to the members
            of its cluster, each times the member's weight.
        equal_weight: no weights; the first medoid is ``first``, each further one the token with the largest distance to
            any medoid before it.
        first: index of the first medoid with ``equal_weight``, one for all stages or one for each. The released code
            draws it by chance.
        backend: see :func:`fastreduce.backend`.
    """

    name = "kmedoids"

    def __init__(
        self,
        blocks: tuple[int, ...],
        schedule: KeepSchedule,
        iters: int = 3,
        cost: Literal["all", "members"] = "all",
        equal_weight: bool = False,
        first: int | Sequence[int] = 0,
        backend: str = "auto",
    ):
        super().__init__(blocks, schedule, backend)
        if isinstance(iters, bool) or not isinstance(iters, int):
            raise TypeError(f"iters must be an integer, got {iters!r}")
        if iters < 0:
            raise ValueError(f"iters must not be negative, got {iters}")
        if cost not in ("all", "members"):
            raise ValueError(f"cost must be 'all' or 'members', got {cost!r}")
        if not isinstance(equal_weight, bool):
            raise TypeError(f"equal_weight must be True or False, got {equal_weight!r}")
        if blocks[0] == 0 and not equal_weight:
            raise ValueError(
                "kmedoids weighs tokens by the attention of the block before, and block 0 has none before it: "
                "begin at block 1, or give equal_weight=True"
            )
        firsts = (first,) * len(blocks) if isinstance(first, int) else as_tuple("first", first)
        if len(firsts) != len(blocks):
            raise ValueError(f"first must have one entry for each of the {len(blocks)} blocks in at, got {first!r}")
        for index in firsts:
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"first must hold token indices (integers), got {index!r}")
            if index < 0:
                raise ValueError(f"first must not be negative, got {index}")
        self.iters = iters
        self.cost = cost
        self.equal_weight = equal_weight
        self.starts = firsts

    @classmethod
    def make(cls, shape: ModelShape, /, **arguments: Any) -> Reducer:
        """Holds ``first`` against the number of tokens of each stage."""
        reducer = super().make(shape, **arguments)
        assert isinstance(reducer, KMedoids)
        present = [shape.patches, *reducer.counts(shape)]
        for first, tokens in zip(reducer.starts, present, strict=False):
            if first >= tokens:
                raise ValueError(f"first must be the index of one of the {tokens} tokens of its stage, got {first}")
        return reducer

    @property
    def first(self) -> int:
        """The block before the first stage gives the weights."""
        return self.blocks[0] if self.equal_weight else self.blocks[0] - 1

    def opens(self, index: int) -> bool:
        """The attention before a stage, which gives the weights."""
        return not self.equal_weight and index + 1 in self.blocks

    def before(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Cluster, and gather the medoids in cluster order."""
        keep = self.schedule.count(stage, tokens.patches)
        if keep >= tokens.num_patches:
            return tokens
        prefix, backend = tokens.prefix, self.backend
        weights = None
        if not self.equal_weight:
            assert tokens.received is not None
            weights = tokens.received[:, prefix:]
        centers, label = ops.cluster_k_medoids(
            tokens.x[:, prefix:],
            weights,
            keep,
            iters=self.iters,
            cost=self.cost,
            first=self.starts[stage],
            backend=backend,
        )
        x, normed = gather(block.attention_norm(tokens.x), tokens.x, centers, prefix=prefix, backend=backend)
        plan = Plan(self.blocks[stage], tokens.num_patches, keep, kept=centers, slot=label)
        return tokens.replace(x, normed=normed, received=None, plans=(*tokens.plans, plan))

    def attend(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Attention half; where the next block has a stage, with the attention that every token receives."""
        return self.attend_between(block, tokens)

    def attend_between(self, block: AttentionBlock, tokens: Tokens) -> Tokens:
        """Attention half; where the next block has a stage, with the attention that every token receives."""
        if self.equal_weight or block.index + 1 not in self.blocks:
            return attend_all(block, tokens)
        normed = block.norm(tokens.x) if tokens.normed is None else tokens.normed
        if block.hooked:
            (q, k, _), branch = block.heads_and_branch(normed, tokens)
            received = ops.received_scores(q.detach(), k.detach(), scale=block.scale, backend=self.backend)
        else:
            q, k, v = block.query_key_value(normed)
            attended, received = block.attention_and_received(q, k, v, normed, tokens, differentiable=False)
            branch = block.branch(attended)
        return tokens.replace(tokens.x + branch, received=received.detach())
