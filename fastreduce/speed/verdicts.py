"""Verdicts of ``fastreduce plan``: which keep rates pay, by the rounds that were timed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..measure import ratio, speed
from .settings import ROUNDS_FOR_A_SPREAD

__all__ = ["LEAST_GAIN", "TOO_FEW", "judge", "round_up", "verdict"]

# Two quiet runs of one model differ by about a per cent, and a smaller gain than this is not worth any accuracy.
LEAST_GAIN = 1.02
TOO_FEW = "too few rounds"


def round_up(counts: Sequence[int], multiple: int, prefix: int, patches: int) -> tuple[int, ...]:
    """Return the next larger counts that make ``prefix + count`` a multiple, as far as there are tokens.

    Up, not to the nearest: no stage keeps less than was asked for, so what is won is not won by dropping more.
    """
    return tuple(min(patches, math.ceil((prefix + count) / multiple) * multiple - prefix) for count in counts)


def verdict(spread: Sequence[float], bar: float) -> str:
    """Return ``"pays"`` if the lower quartile of the ratios lies above the bar, ``"no"`` if not even the upper does.

    ``"unclear"`` in between.
    """
    low, high = spread
    return "pays" if low > bar else "unclear" if high > bar else "no"


def judge(
    batch: int, seconds: Mapping[Any, Sequence[float]], keeping: Collection[float] | None = None
) -> dict[str, Any]:
    """Say what the rounds at one batch show.

    Args:
        batch: images in a batch.
        seconds: of every round: ``"unreduced"``, ``"control"`` (the unreduced model once more) and every keep rate.
        keeping: keep rates that lose no more than they may; None if what is lost was not measured.

    Returns:
        Ready for JSON: the ``bar`` that a gain has to pass (2 %, or what the control strays from itself if that is
        more), speed, speed-up and verdict of every keep rate (``"too few rounds"`` below five), and ``recommended``:
        the highest that pays, of those that are ``keeping`` enough the fastest that pays, or None.
    """
    unreduced = seconds["unreduced"]
    control = ratio("speedup", seconds["control"], unreduced)
    low, high = control["speedup_quartiles"]
    bar = max(LEAST_GAIN, high, 1 / low)
    rates = []
    enough = len(unreduced) >= ROUNDS_FOR_A_SPREAD
    for rate in sorted((name for name in seconds if not isinstance(name, str)), reverse=True):
        speedup = ratio("speedup", seconds[rate], unreduced)
        word = verdict(speedup["speedup_quartiles"], bar) if enough else TOO_FEW
        rates.append({"keep_rate": rate, **speed(batch, seconds[rate]), **speedup, "verdict": word})
    return {
        "batch": batch,
        "rounds": len(unreduced),
        "bar": bar,
        "unreduced": speed(batch, unreduced),
        "control": {**speed(batch, seconds["control"]), **control},
        "rates": rates,
        "recommended": _recommended(rates, keeping),
    }


def _recommended(rates: Sequence[Mapping[str, Any]], keeping: Collection[float] | None) -> float | None:
    """Return the keep rate to take, or None; ``rates`` descend."""
    paying = [row for row in rates if row["verdict"] == "pays"]
    if keeping is not None:
        paying = sorted((row for row in paying if row["keep_rate"] in keeping), key=lambda row: -row["speedup"])
    return paying[0]["keep_rate"] if paying else None
