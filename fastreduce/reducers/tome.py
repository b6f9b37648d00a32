"""ToMe: merge the most similar tokens by bipartite matching of their keys (Bolya et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..arguments import as_tuple, counted, is_number, plain, switch
from ..ops import unchecked as ops
from ..tokens import Plan, Tokens
from .base import ModelShape, Reducer, idle_stages, new_schedule
from .block import AttentionBlock, attend_all, merge
from .schedule import Keep, KeepRate, KeepSchedule, keep_schedule, stage_blocks

__all__ = ["ToMe"]

Rounds = Literal["official", "exact"]


class ToMe(Reducer):
    """Merge attention outputs before the projection, and the residual stream in one pass with its addition.

    Args:
        blocks: where the stages stand.
        schedule: tokens wanted after each stage; None if ``r`` is given.
        r: tokens to merge away at each stage, as in ToMe's own interface: at most half of those present are.
        rounds: a matching can merge at most half of the tokens. ``"official"`` stops there and never catches up, so
            more tokens stay than a keep rate below 0.5 asks for. ``"exact"`` matches again until the count is met.
        prop_attn: proportional attention: a token that stands for n patches weighs n times in every later softmax.
            ``False`` leaves it out, as for models pre-trained by masked autoencoding (MAE).
        metric: of models that rotate their keys by position, whether to compare the keys ``"before"`` the rotation, by
            what they hold, or ``"after"`` it, where keys far apart hardly match. The same for all other models.
        backend: see :func:`fastreduce.backend`.
    """

    name = "tome"

    def __init__(
        self,
        blocks: tuple[int, ...],
        schedule: KeepSchedule | None,
        r: Sequence[int] | None = None,
        rounds: Rounds = "official",
        prop_attn: bool = True,
        metric: Literal["before", "after"] = "before",
        backend: str = "auto",
    ):
        super().__init__(blocks, backend)
        if metric not in ("before", "after"):
            raise ValueError(f"metric must be 'before' or 'after', got {metric!r}")
        self.metric = metric
        self.prop_attn = switch("prop_attn", prop_attn)
        if rounds not in ("official", "exact"):
            raise ValueError(f"rounds must be 'official' or 'exact', got {rounds!r}")
        self.schedule = schedule
        self.r = None if r is None else tuple(r)
        self.rounds = rounds

    @classmethod
    def make(
        cls,
        shape: ModelShape,
        /,
        *,
        at: int | Sequence[int] | None,
        keep_rate: KeepRate,
        keep: Keep,
        backend: str,
        r: int | Sequence[int] | None = None,
        **options: Any,
    ) -> ToMe:
        """Make a reducer; ``r`` (an integer, or one a block) excludes ``keep_rate`` and ``keep``.

        It acts in every block by default.
        """
        if r is None:
            blocks = stage_blocks(at, shape.depth)
            schedule = keep_schedule(keep_rate, keep, len(blocks), shape.patches)
            return cls(blocks, schedule, backend=backend, **options)
        if keep_rate is not None or keep is not None:
            raise ValueError(f"give r or a keep schedule, got r={r!r}, keep_rate={keep_rate!r} and keep={keep!r}")
        blocks = tuple(range(shape.depth)) if at is None else stage_blocks(at, shape.depth)
        what = "an integer, or a sequence with one for each block"
        if is_number(r) and not isinstance(plain(r), int):
            raise TypeError(f"r must be {what} (tokens to merge away; a fraction is a keep_rate), got {r!r}")
        counts = (plain(r),) * len(blocks) if is_number(r) else as_tuple("r", r, what)
        if len(counts) != len(blocks):
            raise ValueError(
                f"r must have one entry for each block ({counted(len(blocks), 'block')}), got {len(counts)}: {r!r}"
            )
        for count in counts:
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"r must hold integers, got {count!r}")
            if count < 0:
                raise ValueError(f"r must not be negative, got {count}")
        return cls(blocks, None, counts, backend=backend, **options)

    def _merges(self, stage: int, patches: int, present: int) -> list[int]:
        """Return how many tokens each matching round of a stage merges, with ``present`` patch tokens there."""
        if self.r is not None:
            wanted = self.r[stage]
        else:
            assert self.schedule is not None
            target = self.schedule.count(stage, patches)
            if self.rounds == "exact":
                wanted = present - target
            else:  # the released code assumes that earlier stages reached their target
                wanted = (self.schedule.count(stage - 1, patches) if stage else patches) - target
        merges = []
        while wanted > 0 and present > 1:
            merges.append(min(wanted, present // 2))
            wanted, present = wanted - merges[-1], present - merges[-1]
            if self.rounds == "official":
                break
        return merges

    def concerns(self, shape: ModelShape) -> dict[str, str]:
        """Name the counts that one matching a stage does not reach, and the stages without anything to do."""
        if self.schedule is None:
            return {}
        concerns = idle_stages(self.name, self.schedule)
        wanted = [self.schedule.count(stage, shape.patches) for stage in range(len(self.blocks))]
        reached = self.counts(shape)
        if any(count > target + 1 for count, target in zip(reached, wanted, strict=True)):
            concerns["tome rate"] = (
                f"tome keeps {reached} tokens, not {wanted}: one matching merges at most half of them, and the "
                "released code does not catch up. rounds='exact' reaches the counts"
            )
        return concerns

    def reschedule(
        self,
        shape: ModelShape,
        *,
        keep_rate: KeepRate = None,
        keep: Keep = None,
        at: int | Sequence[int] | None = None,
    ) -> None:
        """Take a schedule in place; it ends the use of ``r``."""
        blocks = self._new_blocks(shape, at)
        self.schedule, self.r = new_schedule(keep_rate, keep, blocks, shape), None
        self.blocks = blocks

    def counts(self, shape: ModelShape) -> list[int]:
        """Patch tokens after each stage."""
        counts, present = [], shape.patches
        for stage in range(len(self.blocks)):
            present -= sum(self._merges(stage, shape.patches, present))
            counts.append(present)
        return counts

    def _match(self, keys: Tensor, tokens: Tokens, merges: list[int]) -> tuple[Tensor, Any, Tensor | None]:
        """Match (B, H, N, D) -> slot (B, N) of every token after all rounds, its groups, and seats (B, n) if asked for.

        Later rounds compare the mean keys of what was merged.
        """
        slot, groups = ops.match_tokens_groups(keys, merges[0], prefix=tokens.prefix, backend=tokens.backend)
        present = keys.shape[2] - merges[0]
        seat = None if tokens.place is None else _seat(slot, present)
        metric = keys.mean(1) if len(merges) > 1 else keys
        for count in merges[1:]:
            merged, _ = ops.merge_tokens(
                metric, slot, present, size=tokens.sizes, groups=groups, backend=tokens.backend
            )
            following = ops.match_tokens(merged, count, prefix=tokens.prefix, backend=tokens.backend)
            slot = following.gather(1, slot)
            present -= count
            seat = None if seat is None else seat.gather(1, _seat(following, present))
            groups = ops.prepare_merge(slot, present, backend=tokens.backend)
        return slot, groups, None if seat is None else seat[:, tokens.prefix :] - tokens.prefix

    def attend(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Run the attention half with merging: prefix, unmerged tokens of even position, then those of odd position."""
        merges = self._merges(stage, tokens.patches, tokens.num_patches)
        if not merges:
            return attend_all(block, tokens)
        backend, prefix = tokens.backend, tokens.prefix
        num_out = tokens.x.shape[1] - sum(merges)
        heads = block.heads(tokens, "merge")
        keys = heads.metric if self.metric == "before" else heads.k
        slot, groups, seat = self._match(keys.detach(), tokens, merges)  # (B, N)
        options: dict[str, Any] = {"size": tokens.sizes, "groups": groups, "backend": backend}
        x, residual = tokens.x, None
        if heads.added is None:
            merged, _ = ops.merge_tokens(block.attend(heads), slot, num_out, **options)
            residual = block.branch(merged)
        else:
            x = x + heads.added
        x, size, normed = merge(block.mlp_norm(tokens), x, slot, num_out, residual=residual, **options)
        plan = Plan(block.index, tokens.num_patches, num_out - prefix, slot=slot, slot_prefix=prefix, seat=seat)
        return tokens.reduced(x, plan, normed=normed, sizes=size, bias=size.log() if self.prop_attn else None)


def _seat(slot: Tensor, num_out: int) -> Tensor:
    """Return (B, num_out): the token at whose place each output token of one matching is, the destination."""
    order = torch.arange(slot.shape[1], device=slot.device)
    seat = slot.new_zeros(slot.shape[0], num_out, dtype=torch.int64)
    for first in (0, 1):  # tokens of odd position are the destinations, and come last
        some = slot[:, first::2].long()
        seat = seat.scatter(1, some, order[first::2].expand_as(some))
    return seat
