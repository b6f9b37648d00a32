"""Base class of all reducers, and the model as they see it."""

from __future__ import annotations

import abc
import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..arguments import counted
from ..tokens import Tokens
from .block import AttentionBlock, attend_all
from .schedule import Keep, KeepRate, KeepSchedule, keep_schedule, stage_blocks

__all__ = ["ModelShape", "Reducer", "ScheduledReducer", "idle_stages", "new_schedule", "warn_once"]


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Facts about the model that a reducer may know when it is made.

    Attributes:
        depth: number of blocks.
        grid: patches along every axis: (rows, columns) of images, (frames, rows, columns) of videos.
        prefix: leading tokens that are never reduced.
        has_class_token: whether the first of them is a class token.
        channels: width of a token.
    """

    depth: int
    grid: tuple[int, ...]
    prefix: int
    has_class_token: bool
    channels: int

    @property
    def patches(self) -> int:
        """Number of patch tokens."""
        return math.prod(self.grid)


_said: set[str] = set()


def warn_once(kind: str, message: str) -> None:
    """Warn, but once a process for each kind."""
    if kind not in _said:
        _said.add(kind)
        warnings.warn(message, stacklevel=4)  # where patch was called


class Reducer(nn.Module, abc.ABC):
    """A token reduction method, with its schedule. One instance serves all stages of a model.

    A subclass overrides :meth:`before` (reduction of the block's input) or :meth:`attend` (reduction within its
    attention half). Both first make a plan, without gradient through indices, and then apply it.

    Attributes:
        name: the method's name in :func:`fastreduce.patch`.
        grid: the model's own patch grid (rows, columns) where the method's patterns follow from the grid, else None.
        generator: where the method draws its noise from, or None for torch's global generator or no noise.
        draws_in_evaluation: whether it draws from there outside of training too.
        leaves_padding: whether ``Tokens.valid`` may be given from the start: padding is kept last, and counts nowhere.
        ragged: whether images keep different numbers of tokens, so that ``Tokens.valid`` and padding occur.
        packed: whether such tokens are packed in one row instead.
        positions: how merged tokens are rotated, by ``"place"`` or ``"mean"``; see :func:`fastreduce.patch`.
        fill: what dropped patches show in dense features, ``"last"`` or ``"zero"``; see :func:`fastreduce.patch`.
        hidden_states: what a model that hands out the tokens of its blocks shows, the ``"full"`` grid or the
            ``"reduced"`` tokens; see :func:`fastreduce.patch`.
        blocks: the blocks at which the stages stand, ascending.
        backend: passed to every op.
        config: what :func:`fastreduce.patch` was called with.
    """

    name: ClassVar[str]
    grid: tuple[int, int] | None = None
    generator: torch.Generator | None = None
    ragged: ClassVar[bool] = False
    draws_in_evaluation: ClassVar[bool] = False
    leaves_padding: ClassVar[bool] = False
    packed: bool = False
    positions: str = "place"
    fill: str = "last"
    hidden_states: str = "full"

    def __init__(self, blocks: tuple[int, ...], backend: str = "auto"):
        super().__init__()
        self.blocks = blocks
        self.backend = backend
        self.config: dict[str, Any] = {}

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
        **options: Any,
    ) -> Reducer:
        """Build the reducer from what the user wrote, or raise ValueError / TypeError."""
        blocks = stage_blocks(at, shape.depth)
        schedule = keep_schedule(keep_rate, keep, len(blocks), shape.patches)
        return cls(blocks, schedule, backend=backend, **options)  # type: ignore[call-arg, arg-type, misc]

    def before(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Reduce the tokens that enter the block of this stage; by default they pass."""
        return tokens

    def attend(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Run the attention half of the block of this stage, residual included, and reduce in it."""
        return attend_all(block, tokens)

    def attend_between(self, block: AttentionBlock, tokens: Tokens) -> Tokens:
        """Run the attention half of a block without a stage, from block :attr:`first` on."""
        return attend_all(block, tokens)

    @property
    def untrained(self) -> bool:
        """True if the method brings layers of its own, which mean nothing until they are trained or loaded."""
        return next(self.parameters(), None) is not None

    def concerns(self, shape: ModelShape) -> dict[str, str]:
        """Return what a user should know of this method on a model of this shape: kind of concern -> message."""
        if not self.untrained:
            return {}
        return {
            f"untrained {self.name}": f"{self.name} adds layers with random weights (model.reducers): train the model, "
            "or load weights with fastreduce.load_official; until then its predictions mean little"
        }

    def warn(self, shape: ModelShape) -> None:
        """Warn of every concern, once a process and kind."""
        for kind, message in self.concerns(shape).items():
            warn_once(kind, message)

    def reschedule(
        self,
        shape: ModelShape,
        *,
        keep_rate: KeepRate = None,
        keep: Keep = None,
        at: int | Sequence[int] | None = None,
    ) -> None:
        """Take another schedule in place, and keep everything else, trained layers above all.

        Args:
            shape: the model's.
            keep_rate: as in :func:`fastreduce.patch`.
            keep: instead, the counts.
            at: other blocks; None leaves the stages where they are.

        Raises:
            ValueError: values out of range, or a method whose layers or patterns were made for its own schedule; the
                reducer is as it was.
            TypeError: values of the wrong kind.
        """
        raise ValueError(f"{self.name} cannot take another schedule: call fastreduce.unpatch and patch again")

    def _new_blocks(self, shape: ModelShape, at: int | Sequence[int] | None) -> tuple[int, ...]:
        """Check ``at`` for :meth:`reschedule`: layers are made for a number of stages."""
        blocks = self.blocks if at is None else stage_blocks(at, shape.depth)
        if self.untrained and len(blocks) != len(self.blocks):
            raise ValueError(f"{self.name} has layers for {counted(len(self.blocks), 'stage')}, got at={at!r}")
        return blocks

    @property
    def first(self) -> int:
        """The first block that the reducer has to do with: the first stage's, or one before it."""
        return self.blocks[0]

    def opens(self, index: int) -> bool:
        """Return whether the attention of a block is always done in parts.

        Where it is not, the block's own is called.
        """
        return index in self.blocks and type(self).attend is not Reducer.attend

    @abc.abstractmethod
    def counts(self, shape: ModelShape) -> list[int]:
        """Patch tokens after each stage, on a model of this shape (a fused token counts)."""

    def extra_repr(self) -> str:
        """Return the method and where it acts."""
        return f"{self.name}, blocks={self.blocks}, backend={self.backend!r}"


class ScheduledReducer(Reducer):
    """A reducer that leaves as many patch tokens as its schedule says.

    Args:
        blocks: where the stages stand.
        schedule: tokens after each stage.
        backend: see :func:`fastreduce.backend`.
    """

    def __init__(self, blocks: tuple[int, ...], schedule: KeepSchedule, backend: str = "auto"):
        super().__init__(blocks, backend)
        self.schedule = schedule

    def counts(self, shape: ModelShape) -> list[int]:
        """Patch tokens after each stage."""
        return [self.schedule.count(stage, shape.patches) for stage in range(len(self.blocks))]

    def concerns(self, shape: ModelShape) -> dict[str, str]:
        """Name the stages that the schedule leaves nothing to do, beside the concerns of every method."""
        return super().concerns(shape) | ({} if self.ragged else idle_stages(self.name, self.schedule))

    def reschedule(
        self,
        shape: ModelShape,
        *,
        keep_rate: KeepRate = None,
        keep: Keep = None,
        at: int | Sequence[int] | None = None,
    ) -> None:
        """Take another schedule in place, and keep everything else."""
        blocks = self._new_blocks(shape, at)
        self.schedule = new_schedule(keep_rate, keep, blocks, shape)
        self.blocks = blocks


def new_schedule(keep_rate: KeepRate, keep: Keep, blocks: tuple[int, ...], shape: ModelShape) -> KeepSchedule:
    """Read the schedule that :meth:`Reducer.reschedule` takes; there is no default."""
    if keep_rate is None and keep is None:
        raise ValueError("give a keep_rate, or counts as keep")
    return keep_schedule(keep_rate, keep, len(blocks), shape.patches)


def idle_stages(name: str, schedule: KeepSchedule) -> dict[str, str]:
    """Return the concern that some stages of a method that selects keep as much as the stage before."""
    idle = [stage + 1 for stage in schedule.idle()]
    if not idle:
        return {}
    values = schedule.fractions if schedule.fractions is not None else schedule.counts
    stages = f"stage{'s' if len(idle) > 1 else ''} {' and '.join(map(str, idle))}"
    return {
        "idle stages": f"{name} with {'keep_rate' if schedule.fractions is not None else 'keep'}={list(values or ())}: "
        f"{stages} will do nothing, since the entries are fractions of all patches (or counts), not of what the stage "
        "before left; for a rate at every stage give a single number"
    }
