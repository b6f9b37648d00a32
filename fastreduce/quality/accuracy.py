"""Accuracy before and after, with what chance may have done: the images are the same, so they are paired."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Accuracy", "paired_accuracy"]

_DRAWS = 10_000
_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Accuracy of two models on the same images.

    Attributes:
        images: how many there are.
        before: share of the images that the unreduced model gets right; ``after``: that the reduced one does.
        lost: images that only the unreduced model gets right; ``won``: that only the reduced one does.
        difference: ``after - before``.
        interval: of the difference, 95 %: a bootstrap over images. Where the models never differ, the largest
            difference that as many images would miss in one of forty cases.
        p_value: McNemar's exact test, two-sided: the chance of a split of the ``lost`` and ``won`` at least as uneven
            if both were equally likely.
    """

    images: int
    before: float
    after: float
    lost: int
    won: int
    difference: float
    interval: tuple[float, float]
    p_value: float

    @property
    def points_lost(self) -> float:
        """Points of accuracy that the reduced model loses, negative where it wins; 7 images of 1,000 are 0.7."""
        return 100 * (self.lost - self.won) / self.images

    def summary(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        return {**dataclasses.asdict(self), "interval": list(self.interval), "points_lost": self.points_lost}


def paired_accuracy(before: ArrayLike, after: ArrayLike, *, seed: int = 0) -> Accuracy:
    """Compare two models by the images that each gets right.

    Args:
        before: (images,) bool, whether the unreduced model is right.
        after: (images,) bool, whether the reduced model is.
        seed: of the bootstrap.

    Raises:
        ValueError: different lengths, or no image.
        ImportError: without scipy, which ``pip install "fastreduce[cli]"`` brings.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError('accuracy with its interval needs scipy: pip install "fastreduce[cli]"') from error
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(f"both must be (images,), of one length, got {first.shape} and {second.shape}")
    images = len(first)
    lost, won = int((first & ~second).sum()), int((second & ~first).sum())
    if lost + won:
        # Images are of three kinds, so drawing images again is drawing kinds: the same distribution for any number.
        shares = np.array([lost, won, images - lost - won]) / images
        draws = np.random.default_rng(seed).multinomial(images, shares, _DRAWS)
        tails = [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2]
        low, high = np.quantile((draws[:, 1] - draws[:, 0]) / images, tails)
    else:
        high = stats.binomtest(0, images).proportion_ci(_CONFIDENCE).high
        low = -high
    return Accuracy(
        images=images,
        before=float(first.mean()),
        after=float(second.mean()),
        lost=lost,
        won=won,
        difference=(won - lost) / images,
        interval=(float(low), float(high)),
        p_value=float(stats.binomtest(won, lost + won).pvalue) if lost + won else 1.0,
    )
