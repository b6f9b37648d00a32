"""The two values of reduction: what walks the model (:class:`Tokens`) and what a stage decided (:class:`Plan`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import ops

__all__ = ["Plan", "Tokens", "compose_kept", "compose_slots", "unmerge"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one stage does with its patch tokens. Indices never count the prefix tokens.

    Exactly one of ``kept`` and ``slot`` is given; :meth:`slots` has the form common to all methods.

    Attributes:
        block: index of the transformer block.
        num_in: patch tokens before the stage.
        num_out: patch tokens after it.
        kept: (B, K) indices of the tokens that stay, in their new order, or (K,) where they are the same for every
            image (radial); or None.
        fused: one more token follows the kept ones, made of all the others (EViT).
        slot: (B, num_in) the output token that each token went into, or None.
    """

    block: int
    num_in: int
    num_out: int
    kept: Tensor | None = None
    fused: bool = False
    slot: Tensor | None = None

    def slots(self, batch: int) -> Tensor:
        """(B, num_in) output token of every input token, -1 for dropped ones."""
        if self.slot is not None:
            return self.slot
        assert self.kept is not None
        kept = self.kept.expand(batch, -1)
        slot = kept.new_full((batch, self.num_in), self.num_out - 1 if self.fused else -1, dtype=torch.int64)
        order = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        return slot.scatter(1, kept.long(), order)

    def kept_indices(self, batch: int) -> Tensor | None:
        """(B, num_out) index of the input token that each output token is, -1 for a fused one; None after a merge."""
        if self.kept is None:
            return None
        kept = self.kept.expand(batch, -1).long()
        return torch.nn.functional.pad(kept, (0, 1), value=-1) if self.fused else kept


def compose_slots(plans: Sequence[Plan], batch: int) -> Tensor:
    """(B, P): the token that every original patch is in after all ``plans``, -1 where it was dropped."""
    current = plans[0].slots(batch)
    for plan in plans[1:]:
        following = plan.slots(batch).gather(1, current.clamp_min(0))
        current = torch.where(current < 0, current, following)
    return current


def compose_kept(plans: Sequence[Plan], batch: int) -> Tensor | None:
    """(B, num_out): the original patch that every token is after all ``plans``, -1 for fused; None after a merge."""
    current = plans[0].kept_indices(batch)
    for plan in plans[1:]:
        kept = plan.kept_indices(batch)
        if current is None or kept is None:
            return None
        current = torch.where(kept < 0, kept, current.gather(1, kept.clamp_min(0)))
    return current


def unmerge(x: Tensor, plans: Sequence[Plan], prefix: int, *, backend: str | None = None) -> Tensor:
    """Bring tokens back to the full sequence: every patch gets the token that it is in, dropped patches get zeros.

    Args:
        x: (B, prefix + n, C) tokens after the last of ``plans``.
        plans: the plans from the first stage on, at least one.
        prefix: leading tokens that are never reduced.
        backend: see :func:`fastreduce.backend`.

    Returns:
        (B, prefix + P, C).
    """
    slot = compose_slots(plans, x.shape[0])
    slot = torch.where(slot < 0, slot, slot + prefix)
    if prefix:
        head = torch.arange(prefix, device=slot.device).expand(slot.shape[0], prefix)
        slot = torch.cat([head, slot], dim=1)
    return ops.unmerge_tokens(x, slot, backend=backend)


_NOT_A_TENSOR = (
    "the blocks of a reduced model hand on fastreduce.Tokens (tokens with their sizes and history), not a tensor: "
    "call model.blocks as a whole, or take `.x` from what a block returns"
)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What walks from block to block of a reduced model.

    Attributes:
        x: (B, N, C) tokens, prefix first.
        prefix: number of leading tokens that are never reduced (class, distillation, registers).
        patches: number of patch tokens before any reduction.
        size: (B, N) float32, how many patches each token stands for, or None while all are one.
        valid: (B, N) bool, or None while all tokens are real (for methods that pad).
        plans: what the stages so far decided.
    """

    x: Tensor
    prefix: int
    patches: int
    size: Tensor | None = None
    valid: Tensor | None = None
    plans: tuple[Plan, ...] = ()

    @property
    def num_patches(self) -> int:
        """Patch tokens at this point."""
        return self.x.shape[1] - self.prefix

    def replace(self, x: Tensor, **changes: Any) -> Tokens:
        """The same tokens with another ``x``, and whatever else changes."""
        fields = {"prefix": self.prefix, "patches": self.patches, "size": self.size, "valid": self.valid}
        return Tokens(x, **{**fields, "plans": self.plans, **changes})

    def dense(self, *, backend: str | None = None) -> Tensor:
        """(B, prefix + patches, C): ``x`` on the full grid, zeros where a patch was dropped."""
        return unmerge(self.x, self.plans, self.prefix, backend=backend) if self.plans else self.x

    def __getitem__(self, key: object) -> NoReturn:
        raise TypeError(_NOT_A_TENSOR)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TypeError(_NOT_A_TENSOR)
