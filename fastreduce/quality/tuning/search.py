"""The exact search: of all schedules of a method, those that no other is both faster and closer to the model than.

A schedule is how many patch tokens are left after every block. Its time is the sum of its blocks' times, its loss the
sum of its stages' losses; both come from tables. Dynamic programming over blocks and counts keeps, for every count, all
pairs of time and loss that can still become part of the front. Nothing here knows torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Schedule", "count_levels", "fastest_within", "front_of", "pareto_rows"]

Floats = NDArray[np.float64]

_STEPS = 400  # bins of time, in which labels of one count are told apart


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A schedule, and what the tables say of it.

    Attributes:
        at: the blocks with a stage, ascending.
        keep: patch tokens after each of these.
        seconds: for a batch, predicted.
        loss: predicted.
    """

    at: tuple[int, ...]
    keep: tuple[int, ...]
    seconds: float
    loss: float


def count_levels(patches: int, steps: int = 32, least: float = 0.05) -> tuple[int, ...]:
    """Return the token counts that a search tells apart, descending from all patches.

    Args:
        patches: of an image.
        steps: how many parts the patches are cut into; fewer patches than that are all told apart.
        least: the smallest share of the patches.
    """
    parts = min(steps, patches)
    counts = {round(patches * part / parts) for part in range(1, parts + 1)}
    return tuple(sorted((count for count in counts if count >= max(1, least * patches)), reverse=True))


def pareto_rows(seconds: Floats, loss: Floats) -> NDArray[np.int64]:
    """Return the indices of the pairs that no other is at least as good as in both, by ascending time."""
    order = np.lexsort((loss, seconds))
    best = np.minimum.accumulate(loss[order])
    keeps = np.ones(len(order), bool)
    keeps[1:] = best[1:] < best[:-1]
    return order[keeps]


def _thinned(seconds: Floats, loss: Floats, step: float) -> NDArray[np.int64]:
    """Return the front's indices, of those in one step of time the one with the least loss."""
    rows = pareto_rows(seconds, loss)
    bins = (seconds[rows] / step).astype(np.int64)
    last = np.ones(len(rows), bool)
    last[:-1] = bins[1:] != bins[:-1]  # along a front the loss falls, so the last in a bin has the least
    return rows[last]


def front_of(
    depth: int,
    counts: Sequence[int],
    block_seconds: Callable[[int, bool], float],
    stage_seconds: Callable[[int, int], float],
    stage_loss: Callable[[int, int, int], float],
    *,
    fixed_seconds: float = 0.0,
    allowed: Callable[[int, int], bool] = lambda before, after: True,
) -> list[Schedule]:
    """Return the schedules on the front of predicted time and loss, fastest first; the last reduces nothing.

    Args:
        depth: number of blocks.
        counts: token counts, descending, the first being all patches.
        block_seconds: (count, whether tokens were reduced before) -> time of a block without a stage.
        stage_seconds: (count before, count after) -> time of a block with a stage.
        stage_loss: (block, count before, count after) -> what the stage loses, not negative; infinite where the method
            can have no stage at the block.
        fixed_seconds: time of everything beside the blocks.
        allowed: (count before, count after) -> whether the method has such a stage.
    """
    levels = range(len(counts))
    step = (fixed_seconds + depth * block_seconds(counts[0], False)) / _STEPS
    staged = [
        [stage_seconds(counts[a], counts[b]) if b > a and allowed(counts[a], counts[b]) else np.inf for b in levels]
        for a in levels
    ]
    plain = [[block_seconds(counts[a], reduced) for reduced in (False, True)] for a in levels]
    # Labels of one level: time, loss, and the number of the label that each came from, in the block before.
    time: list[Floats] = [np.array([fixed_seconds]) if level == 0 else np.empty(0) for level in levels]
    loss: list[Floats] = [np.zeros(len(one)) for one in time]
    history: list[list[NDArray[np.int64]]] = []
    for block in range(depth):
        new_time, new_loss, origins = [], [], []
        for after in levels:
            times, losses, sources = [], [], []
            for before in range(after + 1):
                if not len(time[before]):
                    continue
                here = plain[before][before > 0] if before == after else staged[before][after]
                if not np.isfinite(here):
                    continue
                lost = 0.0 if before == after else stage_loss(block, counts[before], counts[after])
                if not np.isfinite(lost):
                    continue
                times.append(time[before] + here)
                losses.append(loss[before] + lost)
                sources.append(np.stack([np.full(len(time[before]), before), np.arange(len(time[before]))], 1))
            if not times:
                new_time.append(np.empty(0))
                new_loss.append(np.empty(0))
                origins.append(np.empty((0, 2), np.int64))
                continue
            all_times, all_losses = np.concatenate(times), np.concatenate(losses)
            rows = _thinned(all_times, all_losses, step)
            new_time.append(all_times[rows])
            new_loss.append(all_losses[rows])
            origins.append(np.concatenate(sources)[rows])
        time, loss = new_time, new_loss
        history.append(origins)
    return _schedules(counts, time, loss, history)


def _schedules(
    counts: Sequence[int], time: list[Floats], loss: list[Floats], history: list[list[NDArray[np.int64]]]
) -> list[Schedule]:
    """Follow the labels of the front back to the first block."""
    level_of = np.concatenate([np.full(len(one), level) for level, one in enumerate(time)])
    label_of = np.concatenate([np.arange(len(one)) for one in time])
    seconds, losses = np.concatenate(time), np.concatenate(loss)
    found = []
    for row in pareto_rows(seconds, losses):
        level, label = int(level_of[row]), int(label_of[row])
        at, keep = [], []
        for block in reversed(range(len(history))):
            before, label = (int(value) for value in history[block][level][label])
            if before != level:
                at.append(block)
                keep.append(counts[level])
            level = before
        found.append(Schedule(tuple(at[::-1]), tuple(keep[::-1]), float(seconds[row]), float(losses[row])))
    return found


def fastest_within(front: Sequence[Schedule], *, seconds: float | None = None, loss: float | None = None) -> Schedule:
    """Return the schedule with the least loss within a time, or the fastest within a loss.

    Raises:
        ValueError: if none is within it, or not exactly one of the two is given.
    """
    if (seconds is None) == (loss is None):
        raise ValueError(f"give either seconds or loss, got seconds={seconds!r} and loss={loss!r}")
    if seconds is not None:
        within = [one for one in front if one.seconds <= seconds]
        if not within:
            raise ValueError(f"no schedule takes at most {seconds:.4g} s; the fastest takes {front[0].seconds:.4g} s")
        return min(within, key=lambda one: one.loss)
    assert loss is not None
    within = [one for one in front if one.loss <= loss]
    if not within:
        raise ValueError(f"no schedule loses at most {loss:.4g}")
    return min(within, key=lambda one: one.seconds)
