"""Table (b): what is lost when a method takes one block from all patches to a share of them, on calibration images."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...integrations.timm import patch, unpatch
from ..measures import MEASURES, image_fidelity, top_classes
from ..outputs import Outputs, block_inputs, model_outputs, shared_copy

__all__ = ["SHARES", "Calibration", "LossTable"]

SHARES = (0.9, 0.75, 0.5, 0.25)  # shares of the patches that one stage leaves
_BATCH = 8


@contextlib.contextmanager
def patched(model: nn.Module, method: str, **arguments: Any) -> Iterator[Any]:
    """Patch a model for a while."""
    patch(model, method, **arguments)
    try:
        yield model
    finally:
        unpatch(model)


class Calibration:
    """Images and what the unreduced model makes of them, block by block, so that no pass starts before its first stage.

    What enters every block is kept: depth × images × tokens × channels numbers on the model's device.

    Args:
        model: unreduced, in evaluation mode.
        images: (N, 3, height, width) on its device and in its dtype.
    """

    def __init__(self, model: nn.Module, images: Tensor):
        self.model: Any = shared_copy(model)
        self.images = images
        self.parts = [slice(start, start + _BATCH) for start in range(0, len(images), _BATCH)]
        self.entering = [block_inputs(self.model, images[rows]) for rows in self.parts]
        self.before: list[Outputs] = [model_outputs(self.model, images[rows], last=False) for rows in self.parts]

    def measured(self, method: str, **arguments: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Measure a schedule that :func:`fastreduce.patch` takes.

        Returns:
            (N,) of every measure, and (N,) top-1 classes of the unreduced and of the reduced model, -1 without a
            head or where the logits have NaN.
        """
        found: dict[str, list[Tensor]] = {}
        classes: tuple[list[Tensor], list[Tensor]] = ([], [])
        with patched(self.model, method, **arguments) as model:
            for rows, entering, before in zip(self.parts, self.entering, self.before, strict=True):
                after = model_outputs(model, self.images[rows], entering=entering)
                for name, values in image_fidelity(before, after).items():
                    found.setdefault(name, []).append(values.cpu())
                for side, outputs in zip(classes, (before, after), strict=True):
                    side.append(top_classes(outputs))
        joined = {name: torch.cat(parts) for name, parts in found.items()}
        return joined, torch.cat(classes[0]), torch.cat(classes[1])

    def loss(self, measure: str, method: str, **arguments: Any) -> float:
        """Return the mean of 1 - measure over the images, or of the measure itself where less of it is better.

        Raises:
            ValueError: a measure that the model does not have.
        """
        values, _, _ = self.measured(method, **arguments)
        if measure not in values:
            raise ValueError(f"this model has no {measure}; it has {', '.join(values)}")
        mean = float(values[measure].double().mean())
        return max(0.0, 1 - mean if MEASURES[measure] else mean)


@dataclasses.dataclass
class LossTable:
    """Losses of one method by block and share of the tokens left, interpolated between shares.

    A stage that takes n tokens to n' loses ``scale · (n / P)^depletion · curve(block, n' / n)``: to first order losses
    add, and a stage loses by the share that it takes. A method whose stages lose by the number of tokens instead, as
    dropping does of dense features, has a depletion near 1. Both are fitted to measured schedules (:meth:`fit`).

    Attributes:
        patches: P, of an image.
        losses: for every block at which the method can have a stage, the loss of one alone at each of ``shares``.
        shares: descending; no stage leaves a smaller share than the last.
        scale: see above.
        depletion: see above.
    """

    patches: int
    losses: dict[int, list[float]]
    shares: Sequence[float] = SHARES
    scale: float = 1.0
    depletion: float = 0.0
    _curves: dict[int, Callable[[float], Any]] = dataclasses.field(default_factory=dict, repr=False)

    def curve(self, block: int, share: float) -> float:
        """Return what one stage at a block loses that leaves a share of all patches."""
        if block not in self._curves:
            from scipy.interpolate import PchipInterpolator

            # Monotone, and without loss where nothing is reduced.
            lost = np.maximum.accumulate([0.0, *self.losses[block]])
            self._curves[block] = PchipInterpolator([0.0, *(1 - share for share in self.shares)], lost)
        return float(self._curves[block](1 - max(share, self.shares[-1])))

    def stage(self, block: int, before: int, after: int) -> float:
        """Return what a stage loses that leaves ``after`` of ``before`` tokens; infinity where none can stand."""
        if block not in self.losses:
            return math.inf
        return self.scale * (before / self.patches) ** self.depletion * self.curve(block, after / before)

    def of(self, at: Sequence[int], keep: Sequence[int]) -> float:
        """Return the loss that the table predicts for a schedule."""
        befores = [self.patches, *keep[:-1]]
        return sum(self.stage(block, a, b) for block, a, b in zip(at, befores, keep, strict=True))

    def fit(self, measured: Sequence[tuple[Sequence[int], Sequence[int], float]]) -> None:
        """Fit scale and depletion to schedules (blocks, counts, loss measured), by least squares of the logarithms."""
        least = 1e-6
        best = None
        self.scale = 1.0
        for depletion in np.linspace(-2.0, 1.5, 36):
            self.depletion = float(depletion)
            errors = [np.log(max(loss, least) / max(self.of(at, keep), least)) for at, keep, loss in measured]
            spread = float(np.var(errors))
            if best is None or spread < best[0] - 1e-12:
                best = spread, self.depletion, float(np.exp(np.mean(errors)))
        if best is not None:
            _, self.depletion, self.scale = best
