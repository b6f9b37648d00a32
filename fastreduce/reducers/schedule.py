"""Counts of the tokens that every stage keeps."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from ..arguments import as_tuple, counted, is_number, plain

__all__ = ["Keep", "KeepRate", "KeepSchedule", "as_tuple", "keep_schedule", "stage_blocks"]

KeepRate = float | Sequence[float] | None
Keep = int | Sequence[int] | None
DEFAULT_KEEP_RATE = 0.7


@dataclasses.dataclass(frozen=True)
class KeepSchedule:
    """Patch tokens kept at each stage, as fractions of the original patches or as absolute counts.

    One rule for every method and every image size: a stage keeps at least one token, and where fewer tokens are there
    than it keeps, all stay. For the model's own image size a schedule that comes to no token is refused.
    """

    fractions: tuple[float, ...] | None
    counts: tuple[int, ...] | None

    def count(self, stage: int, patches: int) -> int:
        """Count the tokens that stage ``stage`` (from 0) keeps of ``patches`` original ones, at least one."""
        if self.fractions is None:
            return max(1, self.wanted(stage, patches))
        return max(1, int(self.fractions[stage] * patches))

    def wanted(self, stage: int, patches: int) -> int:
        """Count the tokens that the schedule comes to, which can be none."""
        if self.counts is not None:
            return self.counts[stage]
        assert self.fractions is not None
        return int(self.fractions[stage] * patches)

    def idle(self) -> list[int]:
        """Return the stages whose fraction or count is the stage before's, so that a selecting method does nothing."""
        values = self.fractions if self.fractions is not None else self.counts
        assert values is not None
        most = 1.0 if self.fractions is not None else math.inf
        return [stage for stage in range(1, len(values)) if values[stage] == values[stage - 1] < most]


def stage_blocks(at: int | Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Check ``at``: block indices from 0, strictly increasing, inside the model.

    None stands for the paper's places, a quarter, half and three quarters of the depth: 3, 6, 9 of 12 blocks.
    """
    if at is None:
        return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
    what = "a block index or a sequence of block indices"
    blocks = (at,) if is_number(at) else as_tuple("at", at, what)
    if not blocks:
        raise ValueError("at must name at least one block, got an empty sequence")
    blocks = tuple(plain(block) for block in blocks)
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, int):
            raise TypeError(f"at must hold block indices (integers), got {block!r}")
        if not 0 <= block < depth:
            raise ValueError(f"at must hold block indices between 0 and {depth - 1}, got {block}")
    if any(later <= earlier for earlier, later in itertools.pairwise(blocks)):
        raise ValueError(f"at must be strictly increasing, got {blocks}")
    return blocks


def _check_rate(rate: object) -> float:
    rate = plain(rate)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"keep_rate must be a number or a sequence of numbers, got {rate!r}")
    if math.isnan(rate) or not 0.0 < rate <= 1.0:
        raise ValueError(f"keep_rate must lie in (0, 1], got {rate}")
    return float(rate)


def _check_length(name: str, values: Sequence[object], stages: int) -> None:
    if len(values) != stages:
        raise ValueError(
            f"{name} must have one entry for each block ({counted(stages, 'block')} in at), got {values!r}"
        )


def keep_schedule(keep_rate: KeepRate, keep: Keep, stages: int, patches: int) -> KeepSchedule:
    """Read the user's ``keep_rate`` or ``keep``.

    A single rate r keeps ``int(patches * r ** (stage + 1))``; a sequence of rates holds absolute fractions of the
    original patches; ``keep`` holds absolute counts. With neither, the rate is 0.7. Numbers may be Python's, NumPy's,
    or tensors and arrays of no dimension.

    Raises:
        ValueError: both given, values out of range, a stage that would keep no token or more than the last.
        TypeError: entries that are no numbers.
    """
    if keep_rate is not None and keep is not None:
        raise ValueError(f"give either keep_rate or keep, got keep_rate={keep_rate!r} and keep={keep!r}")
    if keep_rate is None and keep is None:
        keep_rate = DEFAULT_KEEP_RATE
    if keep is not None:
        if is_number(keep) and stages != 1:
            raise ValueError(
                f"keep must have one entry for each block ({counted(stages, 'block')} in at), got {plain(keep)}"
            )
        counts = (plain(keep),) if is_number(keep) else as_tuple("keep", keep)
        for count in counts:
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"keep must hold token counts (integers), got {count!r}")
        _check_length("keep", counts, stages)
        schedule = KeepSchedule(None, counts)
    elif is_number(keep_rate):
        rate = _check_rate(keep_rate)
        schedule = KeepSchedule(tuple(rate ** (stage + 1) for stage in range(stages)), None)
    else:
        rates = tuple(_check_rate(rate) for rate in as_tuple("keep_rate", keep_rate))
        _check_length("keep_rate", rates, stages)
        schedule = KeepSchedule(rates, None)

    previous = patches
    for stage in range(stages):
        count = schedule.wanted(stage, patches)
        if count < 1:
            raise ValueError(f"stage {stage} would keep {count} of {counted(patches, 'token')}; at least 1 must stay")
        if count > previous:
            raise ValueError(f"stage {stage} would keep {counted(count, 'token')} of the {previous} that are left")
        previous = count
    return schedule
