"""Compare recordings: across keep rates, backbones, methods and data sets; and what follows the gap in accuracy.

Tables are lists of rows, a row a dict from column to value; :func:`write_csv` writes one.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import write_atomically
from ..arguments import counted
from .measures import (
    FeatureSpace,
    cluster_agreement,
    distinct_labels,
    feature_similarities,
    kept_overlap,
    map_similarities,
    pack_kept,
    packed_sizes,
    rank_correlations,
    token_depths,
)
from .record import UNREDUCED, Recording, Run

__all__ = [
    "ANCHORS",
    "ANY_RATE",
    "AXES",
    "Row",
    "TokenStatistics",
    "chance_iou",
    "compare",
    "compare_depth_maps",
    "correlate",
    "token_statistics",
    "write_csv",
]

Row = dict[str, Any]

AXES = ("keep_rate", "backbone", "method", "dataset")
ANCHORS = (UNREDUCED, "topk", "kmedoids")
# What has no keep rate, or another than it is given: the paper holds each against every rate of the others.
ANY_RATE = (UNREDUCED, "ats", "radial", "radial_l1", "radial_l2", "radial_linf")

_AGREEMENT = ("homogeneity", "completeness", "nmi")
_MIRROR = {"homogeneity": "completeness", "completeness": "homogeneity", "pwcca": "pwcca_reverse"}
_MIRROR |= {"pwcca_reverse": "pwcca"}


def _check_axis(axis: str, known: Collection[str]) -> None:
    if axis not in known:
        raise ValueError(f"axis must be one of {', '.join(known)}, got {axis!r}")


def _pairs(runs: Sequence[Run], axis: str, any_rate: Collection[str]) -> Iterator[tuple[int, int]]:
    """Return the positions of runs that differ along the axis alone: the higher rate, or the larger backbone, first."""
    order = list(range(len(runs)))
    if axis == "keep_rate":
        order.sort(key=lambda index: -(runs[index].keep_rate or 0.0))
    elif axis == "backbone":
        order.sort(key=lambda index: -runs[index].parameters)
    for position, first in enumerate(order):
        for second in order[position + 1 :]:
            a, b = runs[first], runs[second]
            different = {name for name in AXES if getattr(a, name) != getattr(b, name)}
            if axis == "method" and {a.method, b.method} & {*any_rate}:
                different -= {"keep_rate"}
            if different == {axis}:
                yield first, second


def _identity(first: Run, second: Run) -> Row:
    row: Row = {}
    for name in ("dataset", "backbone", "method", "keep_rate", "accuracy"):
        row[f"{name}_a"], row[f"{name}_b"] = getattr(first, name), getattr(second, name)
    return row | {"difference": first.accuracy - second.accuracy}


def _measure(column: str) -> str:
    """Turn ``iou_std_3`` into ``iou``."""
    return column.rsplit("_", 1)[0].removesuffix("_std")


def _mirrored(row: Row) -> Row:
    """Return the row of the same two runs in the other order."""
    mirrored: Row = {}
    for column, value in row.items():
        if column.endswith(("_a", "_b")):
            value = row[column[:-1] + ("b" if column.endswith("_a") else "a")]
        elif column == "difference":
            value = -value
        elif (other := _MIRROR.get(_measure(column))) is not None:
            value = row[column.replace(_measure(column), other, 1)]
        mirrored[column] = value
    return mirrored


class _Prepared:
    """Preparations that the pairs of a recording share, made once."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self._sets: dict[int, NDArray[np.uint64]] = {}
        self._spaces: dict[int, FeatureSpace] = {}

    def kept(self, block: int) -> NDArray[np.uint64]:
        if block not in self._sets:
            self._sets[block] = pack_kept(self.recording.kept[block], self.recording.patches)
        return self._sets[block]

    def space(self, block: int) -> FeatureSpace:
        if block not in self._spaces:
            self._spaces[block] = FeatureSpace(self.recording.features[block])
        return self._spaces[block]


def _over_images(row: Row, name: str, block: int, values: NDArray[np.float64]) -> None:
    row[f"{name}_{block}"], row[f"{name}_std_{block}"] = float(values.mean()), float(values.std())


def _common(first: Mapping[int, Any], second: Mapping[int, Any]) -> list[int]:
    return sorted(first.keys() & second.keys())


def _share_columns(first: Recording, second: Recording) -> bool:
    kinds = ((first.kept, second.kept), (first.slots, second.slots), (first.features, second.features))
    return any(a.keys() & b.keys() for a, b in kinds)


def _compared(first: _Prepared, second: _Prepared, axis: str) -> Row:
    a, b = first.recording, second.recording
    if a.images != b.images or a.grid != b.grid:
        raise ValueError(
            f"{a.run.name} ({counted(a.images, 'image')}, grid {a.grid}) and {b.run.name} ({b.images}, {b.grid}) "
            "did not see the same images"
        )
    row = _identity(a.run, b.run)
    for block in _common(a.kept, b.kept):
        union, own = kept_overlap(first.kept(block), second.kept(block))
        _over_images(row, "iou", block, union)
        if axis != "method":
            _over_images(row, "ioa", block, own)
    for block in _common(a.slots, b.slots):
        true, predicted = (b, a) if axis == "keep_rate" else (a, b)
        for name, values in zip(
            _AGREEMENT, cluster_agreement(true.slots[block], predicted.slots[block]).T, strict=True
        ):
            _over_images(row, name, block, values)
    for block in _common(a.features, b.features):
        similarities = feature_similarities(first.space(block), second.space(block))
        row |= {f"{name}_{block}": value for name, value in similarities.items()}
    return row


def compare(
    recordings: Sequence[Recording],
    axis: str,
    *,
    any_rate: Collection[str] = ANY_RATE,
    progress: Callable[[int, int], None] = lambda done, pairs: None,
) -> list[Row]:
    """Compare all pairs of recordings of the same images that differ along one axis alone.

    Args:
        recordings: of the same images in the same order, wherever they name the same data set.
        axis: ``"keep_rate"`` (A has the higher rate), ``"backbone"`` (A has more parameters) or ``"method"`` (each pair
            in both orders).
        any_rate: methods that are compared with the others at every rate, along ``"method"``.
        progress: is told how many pairs are done, of how many.

    Returns:
        A row a pair that has anything in common: ``dataset_a``, ``dataset_b``, ``backbone_*``, ``method_*``,
        ``keep_rate_*``, ``accuracy_*``, and ``difference``, the accuracy of A minus B's. Of every block where
        both have a stage the mean over images (and, as ``iou_std_3``, the population's deviation) of ``iou_3`` and, not
        across methods, ``ioa_3`` for kept sets; ``homogeneity_3``, ``completeness_3`` and ``nmi_3`` for assignments
        (the true labels come from B across keep rates, else from A). Of every block with features of both ``cca_3``,
        ``cca_squared_3``, ``pwcca_3``, ``pwcca_reverse_3``, ``cka_3`` and ``procrustes_3``. See
        :mod:`fastreduce.study.measures`.

    Raises:
        ValueError: an unknown axis, recordings of other images, too few images for the features.
    """
    _check_axis(axis, AXES[:3])
    prepared = [_Prepared(recording) for recording in recordings]
    pairs = list(_pairs([recording.run for recording in recordings], axis, any_rate))
    rows: list[Row] = []
    for done, (first, second) in enumerate(pairs, 1):
        if _share_columns(recordings[first], recordings[second]):
            rows.append(_compared(prepared[first], prepared[second], axis))
            if axis == "method":
                rows.append(_mirrored(rows[-1]))
        progress(done, len(pairs))
    return rows


@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """Numbers of tokens that a run leaves, and the blocks where it loses them.

    Attributes:
        run: which model and data set.
        blocks: of the stages.
        share: (stages,) float64, mean over images of the share of patches that are kept, or of different slots.
        share_std: (stages,), the population's deviation.
        depth: (rows, columns) float64, the mean block at which each position is lost, the number of blocks for
            survivors; None for methods without kept sets.
        depth_std: (rows, columns), the deviation over images.
        pooled: mean and deviation of the depth over images and positions, NaN without kept sets.
    """

    run: Run
    blocks: tuple[int, ...]
    share: NDArray[np.float64]
    share_std: NDArray[np.float64]
    depth: NDArray[np.float64] | None
    depth_std: NDArray[np.float64] | None
    pooled: tuple[float, float]


def token_statistics(recording: Recording) -> TokenStatistics:
    """Return shares and depths of one recording; see :class:`TokenStatistics`."""
    shares = []
    for block in recording.blocks:
        if block in recording.kept:
            left = packed_sizes(pack_kept(recording.kept[block], recording.patches))
        else:
            left = distinct_labels(recording.slots[block])
        shares.append(left / recording.patches)
    depth = spread = None
    pooled = (math.nan, math.nan)
    if not recording.blocks:
        depth, spread = np.full(recording.grid, float(recording.depth)), np.zeros(recording.grid)
        pooled = (float(recording.depth), 0.0)
    elif recording.kept:
        depths = token_depths(recording.kept, recording.patches, recording.depth)
        depth, spread = depths["mean"].reshape(recording.grid), depths["std"].reshape(recording.grid)
        pooled = (depths["pooled_mean"], depths["pooled_std"])
    mean, deviation = (np.array([getattr(share, name)() for share in shares]) for name in ("mean", "std"))
    return TokenStatistics(recording.run, recording.blocks, mean, deviation, depth, spread, pooled)


def chance_iou(first: float, second: float) -> float:
    """Return the IoU to expect of two unrelated kept sets, from the share that each keeps."""
    return first * second / (first + second - first * second)


def compare_depth_maps(
    statistics: Sequence[TokenStatistics], axis: str, *, any_rate: Collection[str] = ANY_RATE
) -> list[Row]:
    """Compare the depth maps of all runs that differ along one axis alone.

    Args:
        statistics: of the runs; those without a map are left out.
        axis: as in :func:`compare`, or ``"dataset"`` (runs need not have seen the same images here).
        any_rate: as in :func:`compare`.

    Returns:
        A row a pair, with the identity as in :func:`compare` and the columns of
        :func:`fastreduce.study.measures.map_similarities`.

    Raises:
        ValueError: an unknown axis, or maps of different grids.
    """
    _check_axis(axis, AXES)
    maps = [(entry.run, entry.depth) for entry in statistics if entry.depth is not None]
    rows = []
    for first, second in _pairs([run for run, _ in maps], axis, any_rate):
        (a, one), (b, other) = maps[first], maps[second]
        rows.append(_identity(a, b) | map_similarities(one, other))
    return rows


def _groups(rows: Iterable[Row], axis: str, anchors: Collection[str]) -> dict[Hashable, list[Row]]:
    """Group rows that are correlated together, by (dataset, backbone, method, keep rate) of A; None where all count."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        backbone, rate = row["backbone_a"], None
        if axis == "backbone":
            backbone = None
        elif axis == "method":
            if row["method_a"] not in anchors:
                continue
            rate, other = row["keep_rate_a"], row["keep_rate_b"]
            if row["method_a"] == UNREDUCED:
                rate = rate if other is None else other
            elif rate != other:
                continue
        groups.setdefault((row["dataset_a"], backbone, row["method_a"], rate), []).append(row)
    return groups


def correlate(
    rows: Sequence[Row],
    axis: str,
    *,
    anchors: Collection[str] = ANCHORS,
    columns: Sequence[str] | None = None,
    absolute: bool = False,
) -> list[Row]:
    """Correlate each similarity with the difference in accuracy.

    Rows that are correlated together: along ``"keep_rate"`` those of one method and backbone; along ``"backbone"``
    those of one method; along ``"method"`` those of one anchor A at one keep rate, with B at the same rate (an
    unreduced A with every B of that rate).

    Args:
        rows: from :func:`compare`.
        axis: of those rows.
        anchors: methods A with which the others are compared along ``"method"``; the paper's are DeiT, Top-K and
            K-Medoids.
        columns: similarities; by default every column of ``rows`` that is neither identity nor deviation.
        absolute: correlate with the size of the difference.

    Returns:
        A row a group and column: ``dataset``, ``backbone``, ``method``, ``keep_rate`` (None where it varies),
        ``measure``, ``spearman``, ``kendall`` (tau-b), ``pairs``. Pairs that lack the similarity, or have NaN, are
        dropped for that column alone; see :func:`fastreduce.study.measures.rank_correlations`.

    Raises:
        ValueError: an unknown axis.
    """
    _check_axis(axis, AXES[:3])
    if columns is None:
        identity = {*_identity(Run("", ""), Run("", ""))}
        found = dict.fromkeys(column for row in rows for column in row)
        columns = [column for column in found if column not in identity and "_std_" not in column]
    table = []
    for group, members in _groups(rows, axis, anchors).items():
        named = dict(zip(("dataset", "backbone", "method", "keep_rate"), group, strict=True))  # type: ignore[call-overload]
        gaps = np.array([row["difference"] for row in members], np.float64)
        for column in columns:
            values = [row.get(column, math.nan) for row in members]
            table.append(named | {"measure": column} | rank_correlations(np.abs(gaps) if absolute else gaps, values))
    return table


def write_csv(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write a table with the columns of all rows, in order of appearance; cells without a value are empty.

    Raises:
        OSError: the file cannot be written.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
