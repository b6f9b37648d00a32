"""Table (a): what a block takes at every token count, and what each method's decision adds, on this device."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...measure import Clock, seconds_of, take_turns
from .losses import Calibration, patched

__all__ = ["STAGES", "TimeTable", "measure_times"]

# Shares of all patches before and after the stages that are timed; between them the table is interpolated.
STAGES = ((1.0, 0.9), (1.0, 0.6), (1.0, 0.3), (0.5, 0.45), (0.5, 0.25))
ROUNDS = 3


@dataclasses.dataclass
class TimeTable:
    """Times of a batch, in seconds.

    Attributes:
        batch: images in it.
        depth: number of blocks.
        counts: descending, at which blocks were timed.
        block: seconds of an unreduced block at each of the counts: steps of tiles and padding are in it.
        fixed: seconds of everything beside the blocks.
        stages: for every method, rows of (count before, count after, seconds beyond a block of ``after`` tokens).
        after: for every method, rows of (count, seconds beyond an unreduced block): sizes or padding go on costing.
    """

    batch: int
    depth: int
    counts: Sequence[int]
    block: Sequence[float]
    fixed: float
    stages: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    after: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)

    @property
    def unreduced(self) -> float:
        """Seconds of the unreduced model."""
        return self.fixed + self.depth * self.block[0]

    def plain(self, count: int) -> float:
        """Return the seconds of an unreduced block, interpolated between the counts."""
        return float(np.interp(count, self.counts[::-1], self.block[::-1]))

    def block_seconds(self, method: str, count: int, reduced: bool) -> float:
        """Return the seconds of a block without a stage."""
        if not reduced:
            return self.plain(count)
        counts, extra = zip(*sorted(map(tuple, self.after[method])), strict=True)
        return self._at_least_a_block(self.plain(count) + float(np.interp(count, counts, extra)))

    def stage_seconds(self, method: str, before: int, after: int) -> float:
        """Return the seconds of a block with a stage."""
        # For each count before, by the share that is left; then between the counts before.
        rows: dict[float, list[tuple[float, float]]] = {}
        for start, end, extra in self.stages[method]:
            rows.setdefault(start, []).append((end / start, extra))
        starts = sorted(rows)
        at = []
        for start in starts:
            shares, extras = zip(*sorted(rows[start]), strict=True)
            at.append(float(np.interp(after / before, shares, extras)))
        return self._at_least_a_block(self.plain(after) + float(np.interp(before, starts, at)))

    def _at_least_a_block(self, seconds: float) -> float:
        """Return the time, or that of the fastest block if noise has made it less: a sum must not fall by a block."""
        return max(seconds, min(self.block))

    def of(self, method: str, at: Sequence[int], keep: Sequence[int]) -> float:
        """Return the seconds that the table predicts for a schedule."""
        total, count, stages = self.fixed, self.counts[0], dict(zip(at, keep, strict=True))
        for block in range(self.depth):
            after = stages.get(block, count)
            reduced = count < self.counts[0]
            total += (
                self.stage_seconds(method, count, after)
                if after < count
                else self.block_seconds(method, count, reduced)
            )
            count = after
        return total


def _rounds(
    calls: dict[Any, Callable[[], object]], device: torch.device, rounds: int, clock: Clock
) -> dict[Any, float]:
    """Take turns -> the median of each, in seconds, after one call of each that does not count."""
    for call in calls.values():
        call()
    seconds = take_turns(calls, device, rounds, clock=clock)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.inference_mode()
def measure_times(
    calibration: Calibration,
    methods: dict[str, dict[str, Any]],
    batch: int,
    counts: Sequence[int],
    *,
    rounds: int = ROUNDS,
    clock: Clock = seconds_of,
    progress: Callable[[float], None] = lambda done: None,
) -> TimeTable:
    """Measure the times of blocks and stages for a batch.

    Args:
        calibration: whose images' tokens are timed, repeated until the batch is full.
        methods: what :func:`fastreduce.patch` gets, by the name in the table.
        batch: images.
        counts: token counts, descending, the first being all patches.
        rounds: in which everything takes turns; the median counts.
        clock: gives the seconds of a call on a device.
        progress: called with the share that is done.
    """
    model, device = calibration.model, calibration.images.device
    depth, prefix = len(model.blocks), model.num_prefix_tokens
    if depth < 3:
        raise ValueError(f"a schedule is looked for in models of at least 3 blocks, got {depth}")
    middle = min(depth // 2, depth - 3)
    images = _filled(calibration.images, batch)
    tokens = _filled(torch.cat([part[middle] for part in calibration.entering]), batch)
    cut = {count: tokens[:, : prefix + count].contiguous() for count in counts}
    block, beside = model.blocks[middle], _beside(model, images[:1])
    calls: dict[Any, Callable[[], object]] = {
        count: partial(block, cut[count], **_first_rows(beside, count)) for count in counts
    }
    calls["whole"] = partial(model, images)
    found = _rounds(calls, device, rounds, clock)
    progress(1 / (1 + len(methods)))
    plain = [found[count] for count in counts]
    table = TimeTable(batch, depth, list(counts), plain, max(0.0, found["whole"] - depth * plain[0]))
    for done, (name, arguments) in enumerate(methods.items(), 2):
        _measure_method(table, model, name, arguments, tokens, middle, rounds, clock, beside)
        progress(done / (1 + len(methods)))
    return table


def _filled(images: Tensor, batch: int) -> Tensor:
    """Repeat rows until there are ``batch``."""
    return images.repeat(-(-batch // len(images)), *(1 for _ in images.shape[1:]))[:batch]


def _beside(model: Any, images: Tensor) -> dict[str, Any]:
    """Return the tables of all patches that a model hands its blocks beside the tokens, of libraries that need them."""
    return model.block_options(images) if hasattr(model, "block_options") else {}


def _first_rows(beside: dict[str, Any], count: int) -> dict[str, Any]:
    """Cut tables to the first patches."""
    return {
        name: None if tables is None else tuple(table[..., :count, :] for table in tables)
        for name, tables in beside.items()
    }


def _measure_method(
    table: TimeTable,
    model: Any,
    name: str,
    arguments: dict[str, Any],
    tokens: Tensor,
    middle: int,
    rounds: int,
    clock: Clock,
    beside: dict[str, Any],
) -> None:
    """Time stages of a method beside unreduced blocks, in the same rounds, and the block that follows each."""
    patches, prefix, device = table.counts[0], model.num_prefix_tokens, tokens.device
    stages, after = [], {}
    fused = int(arguments["method"] == "evit")
    for share_before, share_after in STAGES:
        before, wanted = round(share_before * patches), max(1, round(share_after * patches))
        if wanted <= fused or wanted >= before:
            continue
        start = tokens[:, : prefix + before].contiguous()
        short = tokens[:, : prefix + wanted].contiguous()
        plain_block, all_of_them = model.blocks[middle], _first_rows(beside, before)
        with patched(model, at=(middle,), keep=[wanted - fused], **arguments):
            first = model.reducers.first

            def run(first: int = first, start: Tensor = start, beside: dict[str, Any] = all_of_them) -> Any:
                state: Any = start
                for index in range(first, middle + 1):
                    state = model.blocks[index](state, **beside)
                return state

            handed_on, ragged = run(), model.reducers.ragged
            if not ragged:  # ATS keeps what an image calls for; the schedule only bounds it
                wanted = handed_on.num_patches
                short = tokens[:, : prefix + wanted].contiguous()
            following = model.blocks[middle + 1]
            calls: dict[Any, Callable[[], object]] = {
                "stage": run,
                "after": partial(following, handed_on, **all_of_them),
                "plain": partial(plain_block, short, **_first_rows(beside, wanted)),
                "before": partial(plain_block, start, **all_of_them),
            }
            found = _rounds(calls, device, rounds, clock)
        pace = table.plain(wanted) / found["plain"]  # a machine that is busier now than it was is no cost of the method
        extra = found["stage"] - (middle - first) * found["before"] - found["plain"]
        later = found["after"] - found["plain"]
        if not ragged:  # a stage does all that a block of its output does; less is noise
            extra, later = max(0.0, extra), max(0.0, later)
        stages.append([float(before), float(wanted), pace * extra])
        after[wanted] = pace * later
    table.stages[name] = stages
    table.after[name] = [[float(count), seconds] for count, seconds in after.items()]
