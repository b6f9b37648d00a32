"""The front of accuracy against speed, and the reduced models that are new points on it.

``python -m bench.pareto --accuracy results-imagenet.csv --speed benchmark-infer.csv --reduced ours.csv`` joins timm's
published tables, from your copy of timm's repository (``results/``), with what ``fastreduce plan --csv`` measured.

A reduced model's throughput is the published one of the unreduced model times the measured speed-up: both figures of
the speed-up are from one machine, the published ones from another. Its accuracy is the published one less
``--accuracy-loss`` points, which is yours to measure (``fastreduce study``), or of ``--losses``.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Point", "front", "main", "reduced_points"]


class Point(NamedTuple):
    """A model on the plane of throughput and accuracy."""

    model: str
    speed: float
    accuracy: float


def front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other is both as fast and as accurate as, the fastest first."""
    best, found = float("-inf"), []
    for point in sorted(points, key=lambda one: (-one.speed, -one.accuracy)):
        if point.accuracy > best:
            best = point.accuracy
            found.append(point)
    return found


def _read(file: Path, *columns: str) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error.strerror or error}") from error
    if missing := [name for name in columns if rows and name not in rows[0]]:
        raise ValueError(f"{str(file)!r} lacks the column {missing[0]!r}; it has {', '.join(rows[0])}")
    if not rows:
        raise ValueError(f"{str(file)!r} holds no model")
    return rows


def _base(model: str) -> str:
    return model.partition(".")[0]


def reduced_points(
    rows: Sequence[Mapping[str, str]], published: Mapping[str, Point], loss: float, losses: Mapping[str, float]
) -> list[Point]:
    """Return the points of reduced models.

    Args:
        rows: of ``fastreduce plan --csv``: unreduced and reduced models, by batch.
        published: points of unreduced models by their names.
        loss: accuracy lost, in points, where ``losses`` does not say.
        losses: accuracy lost by the names of reduced models.
    """
    times = {(row["model"], row["infer_batch_size"]): float(row["infer_samples_per_sec"]) for row in rows}
    best: dict[str, Point] = {}
    for (model, batch), speed in times.items():
        owner = max((name for name, _ in times if name != model and model.startswith(name)), key=len, default=None)
        if owner is None:
            continue
        source = published.get(owner) or published.get(_base(owner))
        if source is None or (owner, batch) not in times:
            continue
        speedup = speed / times[owner, batch]
        point = Point(model, source.speed * speedup, source.accuracy - losses.get(model, loss))
        if model not in best or point.speed > best[model].speed:
            best[model] = point
    return list(best.values())


def _published(accuracy: Sequence[Mapping[str, str]], speed: Sequence[Mapping[str, str]]) -> dict[str, Point]:
    """Join the two tables by name, and by what is before the tag where only one of them has it."""
    fast = {row["model"]: float(row["infer_samples_per_sec"]) for row in speed}
    fast = {**{_base(name): value for name, value in fast.items()}, **fast}
    found: dict[str, Point] = {}
    for row in accuracy:
        name = row["model"]
        rate = fast.get(name, fast.get(_base(name)))
        if rate is None:
            continue
        point = Point(name, rate, float(row["top1"]))
        found[name] = point
        if _base(name) not in found or found[_base(name)].accuracy < point.accuracy:
            found[_base(name)] = point
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.pareto", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--accuracy", type=Path, required=True, help="timm's results-imagenet.csv: model, top1")
    parser.add_argument("--speed", type=Path, required=True, help="timm's benchmark-infer-….csv")
    parser.add_argument("--reduced", type=Path, required=True, help="what fastreduce plan --csv wrote")
    parser.add_argument("--accuracy-loss", type=float, default=1.0, help="points that reduction costs (default: 1.0)")
    parser.add_argument("--losses", type=Path, help="CSV with the columns model, loss: points by reduced model")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the reduced models that are on the front, and how far the others are from it."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        published = _published(
            _read(given.accuracy, "model", "top1"), _read(given.speed, "model", "infer_samples_per_sec")
        )
        rows = _read(given.reduced, "model", "infer_samples_per_sec", "infer_batch_size")
        lost = _read(given.losses, "model", "loss") if given.losses else []
        losses = {row["model"]: float(row["loss"]) for row in lost}
    except ValueError as error:
        parser.error(str(error))
    ours = reduced_points(rows, published, given.accuracy_loss, losses)
    if not ours:
        parser.error("none of the reduced models is in both of timm's tables under the unreduced model's name")
    everything = front([*published.values(), *ours])
    print("| model | images/s | top-1 | on the front |\n| --- | --- | --- | --- |")
    for point in sorted(ours, key=lambda one: -one.speed):
        rival = max((one for one in published.values() if one.speed >= point.speed), key=lambda one: one.accuracy,
                    default=None)  # fmt: skip
        gap = "no model is as fast" if rival is None else f"{point.accuracy - rival.accuracy:+.2f} on {rival.model}"
        verdict = "yes" if point in everything else "no"
        print(f"| {point.model} | {point.speed:,.0f} | {point.accuracy:.2f} | {verdict}: {gap} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
