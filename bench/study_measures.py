"""The study's per-image measures against a plain loop over images, interleaved in one run, after both agreed.

OMP_NUM_THREADS=1 python -m bench.study_measures [--images 500] [--patches 196] [--keep 98] [--rounds 5]

The loop is the measure as its definition reads, image by image: sets of lists, scikit-learn for assignments.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np
import torch
from sklearn.metrics import homogeneity_completeness_v_measure

from fastreduce.measure import processor_seconds_of, take_turns
from fastreduce.study.measures import cluster_agreement, kept_overlap, pack_kept, token_depths

__all__ = ["main"]


def overlap_loop(first: list[list[int]], second: list[list[int]]) -> np.ndarray:
    rows = []
    for one, other in zip(first, second, strict=True):
        a, b = set(one) - {-1}, set(other) - {-1}
        common = len(a & b)
        rows.append((common / len(a | b), common / len(b)) if common else (0.0, 0.0))
    return np.array(rows).T


def agreement_loop(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    rows = [homogeneity_completeness_v_measure(a, b) for a, b in zip(true, predicted, strict=True)]
    return np.array(rows)


def depth_loop(kept: dict[int, list[list[int]]], patches: int, depth: int) -> np.ndarray:
    images = len(next(iter(kept.values())))
    depths = np.full((images, patches), depth)
    for image in range(images):
        left = set(range(patches))
        for block, stage in kept.items():
            remaining = left & set(stage[image])
            for patch in left - remaining:
                depths[image, patch] = block
            left = remaining
    return np.stack([depths.mean(0), depths.std(0)])


def depth_maps(kept: dict[int, np.ndarray], patches: int, depth: int) -> np.ndarray:
    found = token_depths(kept, patches, depth)
    return np.stack([found["mean"], found["std"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--patches", type=int, default=196)
    parser.add_argument("--keep", type=int, default=98)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    images, patches, keep = options.images, options.patches, options.keep

    rng = np.random.default_rng(0)
    first, second = (np.argsort(rng.random((images, patches)), 1)[:, :keep].astype(np.int16) for _ in range(2))
    kept = {3: first, 6: first[:, : keep // 2], 9: first[:, : keep // 4]}
    true, predicted = (rng.integers(0, keep, (images, patches)).astype(np.uint8) for _ in range(2))
    lists: Any = (first.tolist(), second.tolist(), {block: stage.tolist() for block, stage in kept.items()})
    packed = pack_kept(first, patches), pack_kept(second, patches)

    calls = {
        "IoU and IoA, with packing": (
            lambda: overlap_loop(*lists[:2]),
            lambda: kept_overlap(pack_kept(first, patches), pack_kept(second, patches)),
        ),
        "IoU and IoA, packed once": (lambda: overlap_loop(*lists[:2]), lambda: kept_overlap(*packed)),
        "homogeneity, completeness, NMI": (
            lambda: agreement_loop(true, predicted),
            lambda: cluster_agreement(true, predicted),
        ),
        "mean token depth": (lambda: depth_loop(lists[2], patches, 12), lambda: depth_maps(kept, patches, 12)),
    }
    for name, (loop, ours) in calls.items():
        np.testing.assert_allclose(ours(), loop(), rtol=0, atol=1e-12, err_msg=name)

    turns = {(name, place): call for name, pair in calls.items() for place, call in enumerate(pair)}
    seconds = take_turns(turns, torch.device("cpu"), options.rounds, clock=processor_seconds_of)
    print(f"{images} images, {patches} patches, {keep} kept; microseconds an image, median of {options.rounds} rounds")
    for name in calls:
        loop, ours = seconds[name, 0], seconds[name, 1]
        ratio = statistics.median(a / b for a, b in zip(loop, ours, strict=True))
        slow, fast = (statistics.median(spent) / images * 1e6 for spent in (loop, ours))
        print(f"{name:32s} loop {slow:8.2f}   fastreduce {fast:6.2f}   {ratio:7.1f} times faster")


if __name__ == "__main__":
    main()
