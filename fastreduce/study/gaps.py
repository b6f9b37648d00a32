"""Differences in accuracy between models that saw the same images, with what chance may have done."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..arguments import counted

__all__ = ["Gap", "common_words", "measure_gap"]

_DRAWS = 10_000
_TAILS = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class Gap:
    """A paired difference in accuracy, in points.

    Attributes:
        mean: over images.
        low, high: its 95 % interval, a bootstrap over images. Where the models never differ, the largest difference
            that as many images would miss in one of forty cases.
        images: how many.
        p_value: of McNemar's exact test where two models are compared, two-sided; None for averages over models.
    """

    mean: float
    low: float
    high: float
    images: int
    p_value: float | None = None

    @property
    def sign(self) -> int:
        """Sign of the difference where it is beyond chance, else 0."""
        if self.p_value is not None and self.p_value >= 0.05:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    @property
    def least(self) -> float:
        """The smallest difference that as many images decide, in points: half of the interval."""
        return (self.high - self.low) / 2

    @property
    def images_needed(self) -> float:
        """Number of images that a difference of this size needs to be decided: infinite for none."""
        return math.inf if self.mean == 0 else self.images * (self.least / self.mean) ** 2

    @property
    def words(self) -> str:
        """Difference and its interval, like ``+0.31 (−0.02 to +0.64)``."""
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def common_words(gaps: Sequence[Gap]) -> str:
    """Say what would decide the differences that are within chance; empty if none is."""
    open_gaps = [gap for gap in gaps if gap.sign == 0]
    if not open_gaps:
        return ""
    images, least = open_gaps[0].images, max(gap.least for gap in open_gaps)
    needed = [gap.images_needed for gap in open_gaps if math.isfinite(gap.images_needed)]
    far = f"; the largest of these needs {counted(_rounded(min(needed)), 'image', ',')}" if needed else ""
    return f"{counted(images, 'image', ',')} decide differences above {least:.2f} points{far}"


def _rounded(value: float) -> int:
    """Round up to two digits."""
    step = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    return int(math.ceil(value / step) * step)


def measure_gap(first: NDArray[np.float64], second: NDArray[np.float64], *, seed: int = 0) -> Gap:
    """Measure by how much the first is better.

    Args:
        first: (images,) scores in per cent: 100 for an image that a model gets right, 0 for others; or averages.
        second: (images,) of the other model or models, on the same images.
        seed: of the bootstrap.
    """
    values, counts = np.unique(first - second, return_counts=True)
    images = int(counts.sum())
    # Drawing images again is drawing these kinds of images, and each kind counts alike.
    draws = np.random.default_rng(seed).multinomial(images, counts / images, _DRAWS) @ values / images
    low, high = np.quantile(draws, _TAILS)
    if not values.any():  # as fastreduce.fidelity has it: models that never differ here are not certain to be equal
        from scipy import stats

        high = 100 * stats.binomtest(0, images).proportion_ci(_TAILS[1] - _TAILS[0]).high
        low = -high
    p_value = None
    if {*np.unique(first), *np.unique(second)} <= {0.0, 100.0}:
        from scipy import stats

        won, lost = int(counts[values > 0].sum()), int(counts[values < 0].sum())
        p_value = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return Gap(float((first - second).mean()), float(low), float(high), images, p_value)
