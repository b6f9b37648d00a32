"""How many tokens every stage keeps."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

__all__ = ["Keep", "KeepRate", "KeepSchedule", "as_tuple", "keep_schedule", "stage_blocks"]

KeepRate = float | Sequence[float] | None
Keep = int | Sequence[int] | None
DEFAULT_KEEP_RATE = 0.7


@dataclasses.dataclass(frozen=True)
class KeepSchedule:
    """Patch tokens kept at each stage, as fractions of the original patches or as absolute counts."""

    fractions: tuple[float, ...] | None
    counts: tuple[int, ...] | None

    def count(self, stage: int, patches: int) -> int:
        """Tokens that stage ``stage`` (from 0) keeps of ``patches`` original ones."""
        if self.counts is not None:
            return self.counts[stage]
        assert self.fractions is not None
        return int(self.fractions[stage] * patches)


def as_tuple(name: str, values: object) -> tuple[Any, ...]:
    """The entries of a sequence that a user gave, or TypeError."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a number or a sequence of numbers, got {values!r}")
    return tuple(values)


def stage_blocks(at: int | Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Check ``at``: block indices from 0, strictly increasing, inside the model.

    None stands for the paper's places, a quarter, half and three quarters of the depth: 3, 6, 9 of 12 blocks.
    """
    if at is None:
        return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
    blocks = (at,) if isinstance(at, int) else as_tuple("at", at)
    if not blocks:
        raise ValueError("at must name at least one block, got an empty sequence")
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, int):
            raise TypeError(f"at must hold block indices (integers), got {block!r}")
        if not 0 <= block < depth:
            raise ValueError(f"at must hold block indices between 0 and {depth - 1}, got {block}")
    if any(later <= earlier for earlier, later in itertools.pairwise(blocks)):
        raise ValueError(f"at must be strictly increasing, got {blocks}")
    return blocks


def _check_rate(rate: object) -> float:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"keep_rate must be a number or a sequence of numbers, got {rate!r}")
    if math.isnan(rate) or not 0.0 < rate <= 1.0:
        raise ValueError(f"keep_rate must lie in (0, 1], got {rate}")
    return float(rate)


def _check_length(name: str, values: Sequence[object], stages: int) -> None:
    if len(values) != stages:
        raise ValueError(f"{name} must have one entry for each of the {stages} blocks in at, got {values!r}")


def keep_schedule(keep_rate: KeepRate, keep: Keep, stages: int, patches: int) -> KeepSchedule:
    """Read the user's ``keep_rate`` or ``keep``.

    A single rate r keeps ``int(patches * r ** (stage + 1))``; a sequence of rates holds absolute fractions of the
    original patches; ``keep`` holds absolute counts. With neither, the rate is 0.7.

    Raises:
        ValueError: both given, values out of range, a stage that would keep no token or more than the last.
        TypeError: entries that are no numbers.
    """
    if keep_rate is not None and keep is not None:
        raise ValueError(f"give either keep_rate or keep, got keep_rate={keep_rate!r} and keep={keep!r}")
    if keep_rate is None and keep is None:
        keep_rate = DEFAULT_KEEP_RATE
    if keep is not None:
        counts = (keep,) * stages if isinstance(keep, int) and stages == 1 else keep
        if isinstance(counts, int):
            raise ValueError(f"keep must have one entry for each of the {stages} blocks in at, got {keep}")
        counts = as_tuple("keep", counts)
        for count in counts:
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"keep must hold token counts (integers), got {count!r}")
        _check_length("keep", counts, stages)
        schedule = KeepSchedule(None, counts)
    elif isinstance(keep_rate, (int, float)):
        rate = _check_rate(keep_rate)
        schedule = KeepSchedule(tuple(rate ** (stage + 1) for stage in range(stages)), None)
    else:
        rates = tuple(_check_rate(rate) for rate in as_tuple("keep_rate", keep_rate))
        _check_length("keep_rate", rates, stages)
        schedule = KeepSchedule(rates, None)

    previous = patches
    for stage in range(stages):
        count = schedule.count(stage, patches)
        if count < 1:
            raise ValueError(f"stage {stage} would keep {count} of {patches} tokens; at least 1 must stay")
        if count > previous:
            raise ValueError(f"stage {stage} would keep {count} tokens, but only {previous} are there")
        previous = count
    return schedule
