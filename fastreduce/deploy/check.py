"""An exported model held against eager mode: what it decides, what it computes, and how fast it is."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..measure import take_turns
from .decisions import Decided, differing, settled
from .export import FORMATS, export
from .runtimes import load

__all__ = ["Fidelity", "Speed", "fidelity", "speed"]

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Differences of an exported model from the same model in eager mode.

    Attributes:
        runtime: what it ran in.
        images: how many.
        wrong: decisions (one a token and stage) that differ, of ``decisions``.
        difference: largest absolute difference of the logits; ``relative`` to the largest of these.
        same_class: images of which the highest logit is the same one.
    """

    runtime: str
    images: int
    wrong: int
    decisions: int
    difference: float
    relative: float
    same_class: int

    @property
    def faithful(self) -> bool:
        """True if nothing but rounding differs."""
        return not self.wrong and self.relative <= 1e-4


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of the reduced and of the unreduced model, exported the same way and run in turns.

    Attributes:
        batch: images at a time.
        reduced: median seconds of a batch, and ``unreduced``.
        ratio: the median of ``unreduced / reduced``, round by round.
        quartiles: of these.
    """

    batch: int
    reduced: float
    unreduced: float
    ratio: float
    quartiles: tuple[float, float]


def fidelity(model: nn.Module, file: Path, images: Tensor, to: str, threads: int | None = None) -> Fidelity:
    """Run the exported file, and beside it a copy that tells its decisions, against eager mode.

    Args:
        model: the patched model that the file was written from.
        file: what :func:`export` wrote.
        images: (B, channels, height, width), in batches of one and of all.
        to: the format.
        threads: of the runtime.
    """
    decided = Decided(model)
    with torch.no_grad():
        logits, *ours = decided(images)
        alone = model(images[:1])
    runtime = load(file, threads)
    found, first = runtime(images)[0], runtime(images[:1])[0]
    wrong = decisions = 0
    if ours:
        with tempfile.TemporaryDirectory() as folder:
            names = ["logits", *(f"decision_{place}" for place in range(len(ours)))]
            telling = load(
                export(decided, images[:2], Path(folder) / f"decided{FORMATS[to].ending}", to, names=names), threads
            )
            theirs = telling(images)[1:]
        wrong, decisions = differing(settled(ours, decided.kinds), settled(theirs, decided.kinds))
    differences = (found - logits).abs().max(), (first - alone).abs().max()
    difference = torch.stack(differences).max().item()  # NaN if one of them is, as Python's max is not
    largest = logits.abs().max().item()
    same = int((found.flatten(1).argmax(1) == logits.flatten(1).argmax(1)).sum())
    return Fidelity(runtime.name, len(images), wrong, decisions, difference, difference / max(largest, 1e-30), same)


def speed(reduced: Path, unreduced: Path, images: Tensor, rounds: int, threads: int | None = None) -> Speed:
    """Run two exported files in turns on the same images, after two calls of each that do not count."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, file in (("reduced", reduced), ("unreduced", unreduced)):
        runtime = load(file, threads)
        runtime(images)
        runtime(images)
        calls[name] = lambda runtime=runtime: runtime(images)  # type: ignore[misc]
    seconds = take_turns(calls, torch.device("cpu"), rounds)
    return speed_of(len(images), seconds["reduced"], seconds["unreduced"])


def speed_of(batch: int, reduced: Sequence[float], unreduced: Sequence[float]) -> Speed:
    """Summarise seconds that were taken in turns."""
    ratios = sorted(slow / fast for slow, fast in zip(unreduced, reduced, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
    return Speed(
        batch, statistics.median(reduced), statistics.median(unreduced), statistics.median(ratios), (low, high)
    )
