"""K-Medoids: keep the medoids of clusters weighted by attention (Marin et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ..arguments import as_tuple, counted, integer, is_number, plain, switch
from ..ops import unchecked as ops
from ..tokens import Plan, Tokens
from .base import ModelShape, Reducer, ScheduledReducer, new_schedule
from .block import AttentionBlock, attend_all, gather, received
from .schedule import Keep, KeepRate, KeepSchedule

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
        if cost not in ("all", "members"):
            raise ValueError(f"cost must be 'all' or 'members', got {cost!r}")
        self.iters = integer("iters", iters)
        self.cost = cost
        self.equal_weight = switch("equal_weight", equal_weight)
        self._check_first_block(blocks)
        firsts = (plain(first),) * len(blocks) if is_number(first) else as_tuple("first", first)
        if len(firsts) != len(blocks):
            raise ValueError(
                f"first must have one entry for each block ({counted(len(blocks), 'block')} in at), got {first!r}"
            )
        for index in firsts:
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"first must hold token indices (integers), got {index!r}")
            if index < 0:
                raise ValueError(f"first must not be negative, got {index}")
        self.starts = firsts

    def _check_first_block(self, blocks: tuple[int, ...]) -> None:
        """Raise if no attention comes before the first stage."""
        if blocks[0] == 0 and not self.equal_weight:
            raise ValueError(
                "kmedoids weighs tokens by the attention of the block before, and block 0 has none before it: "
                "begin at block 1, or give equal_weight=True"
            )

    @classmethod
    def make(cls, shape: ModelShape, /, **arguments: Any) -> Reducer:
        """Hold ``first`` against the number of tokens of each stage."""
        reducer = super().make(shape, **arguments)
        assert isinstance(reducer, KMedoids)
        reducer._check_starts(shape, reducer.counts(shape))
        return reducer

    def _check_starts(self, shape: ModelShape, counts: Sequence[int]) -> None:
        """Raise if a first medoid is no token of its stage."""
        for first, tokens in zip(self.starts, (shape.patches, *counts), strict=False):
            if first >= tokens:
                raise ValueError(
                    f"first must be the index of one of its stage's {counted(tokens, 'token')}, got {first}"
                )

    def reschedule(
        self,
        shape: ModelShape,
        *,
        keep_rate: KeepRate = None,
        keep: Keep = None,
        at: int | Sequence[int] | None = None,
    ) -> None:
        """Take another schedule in place, if the first medoids are tokens of its stages."""
        blocks = self._new_blocks(shape, at)
        if len(blocks) != len(self.starts):
            raise ValueError(
                f"kmedoids has a first medoid for each stage ({counted(len(self.starts), 'stage')}), got at={at!r}"
            )
        self._check_first_block(blocks)
        schedule = new_schedule(keep_rate, keep, blocks, shape)
        self._check_starts(shape, [schedule.count(stage, shape.patches) for stage in range(len(blocks))])
        self.blocks, self.schedule = blocks, schedule

    @property
    def first(self) -> int:
        """The block before the first stage gives the weights."""
        return self.blocks[0] if self.equal_weight else self.blocks[0] - 1

    def opens(self, index: int) -> bool:
        """Return whether the attention of a block gives a stage behind it the weights."""
        return not self.equal_weight and index + 1 in self.blocks

    def before(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Cluster, and gather the medoids in cluster order."""
        keep = self.schedule.count(stage, tokens.patches)
        if keep >= tokens.num_patches:
            return tokens
        prefix, backend = tokens.prefix, tokens.backend
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
            first=min(self.starts[stage], tokens.num_patches - 1),  # of a smaller image the last
            backend=backend,
        )
        x, normed = gather(block.attention_norm(tokens), tokens.x, centers, prefix=prefix, backend=backend)
        plan = Plan(self.blocks[stage], tokens.num_patches, keep, kept=centers, slot=label)
        return tokens.reduced(x, plan, normed=normed, received=None)

    def attend(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Run the attention half; where the next block has a stage, with the attention that every token receives."""
        return self.attend_between(block, tokens)

    def attend_between(self, block: AttentionBlock, tokens: Tokens) -> Tokens:
        """Run the attention half; where the next block has a stage, with the attention that every token receives."""
        if self.equal_weight or block.index + 1 not in self.blocks:
            return attend_all(block, tokens)
        if self.schedule.count(self.blocks.index(block.index + 1), tokens.patches) >= tokens.num_patches:
            return attend_all(block, tokens)  # the next stage keeps every token
        heads = block.heads(tokens)
        if heads.added is None:
            attended, weights = block.attend(heads, scores="constant")
            added = block.branch(attended)
        else:
            added, weights = heads.added, received(heads._replace(q=heads.q.detach(), k=heads.k.detach()))
        return tokens.replace(tokens.x + added, received=weights.detach())
