"""The measures of the paper's analysis, over all images at once.

Formulas are those of *Which Tokens to Use?* (Haurum et al. 2023) as its released code evaluates them, with its
conventions where they differ from the usual ones. Inputs may be memory-mapped: images are taken in chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "FeatureSpace",
    "cluster_agreement",
    "distinct_labels",
    "feature_similarities",
    "kept_overlap",
    "map_similarities",
    "mean_average_precision",
    "pack_kept",
    "packed_sizes",
    "rank_correlations",
    "token_depths",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.integer[Any]]

_CHUNK = 1024  # images: what is made of 196 patches stays in the cache


def _chunks(images: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, images)) for start in range(0, images, _CHUNK))


def _check_indices(name: str, indices: Integers, low: int, high: int) -> None:
    """Raise unless all are integers in [low, high)."""
    if indices.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {indices.dtype}")
    if indices.size and not (low <= (least := indices.min()) and (most := indices.max()) < high):
        raise ValueError(f"{name} must be in [{low}, {high}), got {least if least < low else most}")


def _membership(kept: Integers, patches: int) -> NDArray[np.bool_]:
    """Turn (m, K) indices into (m, width) bool.

    The width is the next multiple of 64 above ``patches``; only patches are ever set.
    """
    width = patches // 64 * 64 + 64
    member = np.zeros((len(kept), width), bool)
    # The -1 of a row falls into the spare columns at the end of the row before it.
    flat = np.arange(0, member.size, width)[:, None] + kept
    member.reshape(-1)[flat.reshape(-1)] = True
    member[:, patches:] = False
    return member


def pack_kept(kept: Integers, patches: int) -> NDArray[np.uint64]:
    """Pack kept sets as bits, one bit a patch, for :func:`kept_overlap`.

    Args:
        kept: (images, K) integer, original patches in any order, -1 for padding and for fused tokens.
        patches: P, of the original grid.

    Returns:
        (images, P // 64 + 1) uint64.

    Raises:
        TypeError: no integers.
        ValueError: an index out of range.
    """
    packed = np.empty((len(kept), patches // 64 + 1), np.uint64)
    for rows in _chunks(len(kept)):
        part = np.asarray(kept[rows])
        _check_indices("kept", part, -1, patches)
        packed[rows] = np.packbits(_membership(part, patches), axis=1).view(np.uint64)
    return packed


def packed_sizes(packed: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return (images,): how many patches each of the sets of :func:`pack_kept` holds."""
    return np.bitwise_count(packed).sum(1, dtype=np.int64)


def kept_overlap(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> tuple[Floats, Floats]:
    """Return intersection over union, and over the second set, of every image.

    Args:
        first: packed sets A of :func:`pack_kept`.
        second: B, as many images of the same grid; the paper's B has the lower keep rate or the smaller backbone.

    Returns:
        IoU |A∩B| / |A∪B| and IoA |A∩B| / |B|, (images,) float64 each; 0 where nothing intersects.

    Raises:
        ValueError: different shapes.
    """
    if first.shape != second.shape:
        raise ValueError(f"both need as many images of one grid, got packed shapes {first.shape} and {second.shape}")
    common = packed_sizes(first & second)
    return common / np.maximum(packed_sizes(first | second), 1), common / np.maximum(packed_sizes(second), 1)


def _runs(labels: Integers) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Count how often each label occurs, image after image, and how many labels every image has."""
    ordered = np.sort(labels, axis=1)
    starts = np.ones(ordered.shape, bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=starts[:, 1:])
    return np.diff(np.flatnonzero(starts), append=ordered.size), starts.sum(1)


def _entropy(labels: Integers) -> Floats:
    """Return the entropy of every image's labels in nats, exactly 0 for a single label: (m, P) -> (m,)."""
    counts, distinct = _runs(labels)
    patches = labels.shape[1]
    table = np.arange(patches + 1, dtype=np.float64)
    table[1:] *= np.log(table[1:])
    sums = np.add.reduceat(table[counts], np.cumsum(distinct) - distinct)
    return np.where(distinct > 1, np.log(patches) - sums / patches, 0.0)


def _from_zero(labels: Integers) -> tuple[NDArray[np.int32], int]:
    """Return the labels counted from 0, and a bound on them."""
    low = int(labels.min())
    shifted = (labels.astype(np.int64) - low).astype(np.int32)
    return shifted, int(shifted.max()) + 1


def cluster_agreement(true: Integers, predicted: Integers) -> Floats:
    """Return homogeneity, completeness and V-measure (the paper's "NMI") of two assignments of every image.

    Equal to ``sklearn.metrics.homogeneity_completeness_v_measure(true[i], predicted[i])`` for each image i, from the
    three entropies.

    Args:
        true: (images, P) integer labels, any values. The paper's argument order differs: across keep rates the true
            labels come from the lower rate, across backbones and methods from the first model.
        predicted: (images, P) integer labels.

    Returns:
        (images, 3) float64.

    Raises:
        TypeError: no integers.
        ValueError: different shapes, no patches, or labels too far apart.
    """
    if true.shape != predicted.shape or true.ndim != 2 or not true.shape[1]:
        raise ValueError(f"both must be (images, patches), of one shape, got {true.shape} and {predicted.shape}")
    for name, labels in (("true", true), ("predicted", predicted)):
        if labels.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers, got {labels.dtype}")
    result = np.empty((len(true), 3))
    for rows in _chunks(len(true)):
        first, first_bound = _from_zero(np.asarray(true[rows]))
        second, second_bound = _from_zero(np.asarray(predicted[rows]))
        if first_bound * second_bound > 2**31 - 1:
            raise ValueError(f"labels must be small, got ranges of {first_bound} and {second_bound}")
        entropy, other = _entropy(first), _entropy(second)
        common = np.maximum(entropy + other - _entropy(first * np.int32(second_bound) + second), 0.0)
        homogeneity = np.divide(common, entropy, out=np.ones_like(common), where=entropy > 0)
        completeness = np.divide(common, other, out=np.ones_like(common), where=other > 0)
        total = homogeneity + completeness
        both = 2 * homogeneity * completeness
        result[rows] = np.stack(
            [homogeneity, completeness, np.divide(both, total, out=np.zeros_like(both), where=total > 0)], axis=1
        )
    return result


def distinct_labels(labels: Integers) -> NDArray[np.int64]:
    """Count how many different labels each image has: (images, P) integer -> (images,)."""
    distinct = np.empty(len(labels), np.int64)
    for rows in _chunks(len(labels)):
        distinct[rows] = _runs(np.asarray(labels[rows]))[1]
    return distinct


def token_depths(kept: Mapping[int, Integers], patches: int, depth: int) -> dict[str, Any]:
    """Return the block at which every position is lost, on average over the images.

    Args:
        kept: for each stage's block (images, K), the original patches that are left after it, -1 for none.
        patches: P.
        depth: number of blocks, which is the depth of a survivor.

    Returns:
        ``mean`` and ``std`` (P,) float64 for each position, ``pooled_mean`` and ``pooled_std`` over all of them; the
        deviations are the population's.

    Raises:
        ValueError: no stage, other numbers of images in the stages, or an index out of range.
    """
    images = {len(stage) for stage in kept.values()}
    if len(images) != 1:
        raise ValueError(f"every stage must have as many images, and there must be a stage; got {sorted(images)}")
    (count,) = images
    blocks = sorted(kept)
    left = np.full((len(blocks) + 1, patches), count, np.int64)  # images that still have the position
    for rows in _chunks(count):
        present = np.ones((rows.stop - rows.start, patches), bool)
        for index, block in enumerate(blocks, 1):
            part = np.asarray(kept[block][rows])
            _check_indices("kept", part, -1, patches)
            present &= _membership(part, patches)[:, :patches]
            left[index] -= len(present) - present.sum(0)
    lost = np.concatenate([left[:-1] - left[1:], left[-1:]])  # (stages + 1, P)
    at = np.array([*blocks, depth], np.int64)
    total, squares = at @ lost, at**2 @ lost
    # Integers up to here: the variance is exact.
    spread = np.sqrt((count * squares - total**2) / count**2)
    everything = count * patches
    pooled = (everything * int(squares.sum()) - int(total.sum()) ** 2) / everything**2
    return {
        "mean": total / count,
        "std": spread,
        "pooled_mean": int(total.sum()) / everything,
        "pooled_std": pooled**0.5,
    }


@functools.lru_cache(maxsize=4)
def _distances(rows: int, columns: int) -> Floats:
    """Return the Euclidean distances (cells, cells) between the cells of a grid."""
    cells = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    return np.sqrt(((cells[:, None] - cells[None]) ** 2).sum(-1).astype(np.float64))


def _earth_movers(first: Floats, second: Floats) -> float:
    import ot

    if not np.isfinite(first).all() or not np.isfinite(second).all():
        return float("nan")
    return float(ot.emd2(first.ravel(), second.ravel(), _distances(*first.shape)))


def _spread(values: Floats) -> Floats:
    """Scale to [0, 1], then to a sum of 1."""
    scaled = (values - values.min()) / (values.max() - values.min())
    return scaled / scaled.sum()


def map_similarities(first: ArrayLike, second: ArrayLike) -> dict[str, float]:
    """Compare two non-negative maps, by the paper's code; maps are divided by their sums first.

    Args:
        first: (rows, columns) a.
        second: (rows, columns) b.

    Returns:
        ``kl`` Σ b log2(b / a) and ``kl_reverse`` Σ a log2(a / b). ``js`` is half of Σ m log2(m / a) + Σ m log2(m / b)
        with m the mean map: the arguments stand as in the paper's code, the reverse of Jensen-Shannon's, and it has no
        bound. ``pcc`` Pearson and ``scc`` Spearman correlation. ``sim``: the sum of minima after scaling each map to
        [0, 1] and then to a sum of 1. ``emd``: optimal transport over the Euclidean distance of cells (POT). A zero in
        one map makes the first three inf or NaN, a constant map ``pcc``, ``scc`` and ``sim`` NaN.

    Raises:
        ValueError: different shapes, or no maps.
    """
    from scipy import stats

    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"both must be (rows, columns), of one shape, got {a.shape} and {b.shape}")
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = a / a.sum(), b / b.sum()
        middle = (a + b) / 2
        constant = np.ptp(a) == 0 or np.ptp(b) == 0
        return {
            "kl": float((b * np.log2(b / a)).sum()),
            "kl_reverse": float((a * np.log2(a / b)).sum()),
            "js": float((middle * np.log2(middle / a)).sum() + (middle * np.log2(middle / b)).sum()) / 2,
            "pcc": float("nan") if constant else float(np.corrcoef(a.ravel(), b.ravel())[0, 1]),
            "scc": float("nan") if constant else float(stats.spearmanr(a.ravel(), b.ravel()).statistic),
            "sim": float(np.minimum(_spread(a), _spread(b)).sum()),
            "emd": _earth_movers(a, b),
        }


class FeatureSpace:
    """Features of one block, reduced to what :func:`feature_similarities` needs of them alone.

    Every neuron is centred over the images, then all are divided by the Frobenius norm of the whole; matrices and
    products are float64 and made in chunks, so that ``features`` may be memory-mapped.

    Args:
        features: (images, neurons) floating.

    Attributes:
        gram: (neurons, neurons) float64, inner products of the neurons over the images.

    Raises:
        ValueError: not more images than neurons (canonical correlations would all be 1), features that do not vary or
            are not finite.
    """

    def __init__(self, features: NDArray[np.floating[Any]]):
        if features.ndim != 2 or len(features) <= features.shape[1]:
            raise ValueError(f"features must be (images, neurons) with more images, got {features.shape}")
        self.features = features
        self.mean = sum(features[rows].sum(0, dtype=np.float64) for rows in _chunks(len(features))) / len(features)
        gram = self._products(self)
        squared = float(np.trace(gram))
        if not 0 < squared < np.inf:
            raise ValueError(f"features must vary and be finite, got a squared norm of {squared}")
        self.norm = squared**0.5
        self.gram = gram / squared

    def _products(self, other: FeatureSpace) -> Floats:
        products = np.zeros((self.features.shape[1], other.features.shape[1]))
        for rows in _chunks(len(self.features)):
            mine = self.features[rows].astype(np.float64) - self.mean
            products += mine.T @ (mine if other is self else other.features[rows].astype(np.float64) - other.mean)
        return products

    def cross(self, other: FeatureSpace) -> Floats:
        """Return the inner products over the images, (neurons, other's neurons) float64."""
        if len(other.features) != len(self.features):
            raise ValueError(f"both need the same images, got {len(self.features)} and {len(other.features)}")
        return self._products(other) / (self.norm * other.norm)

    @functools.cached_property
    def inverse_root(self) -> Floats:
        """(neurons, neurons): gram to the power -1/2; directions without variance, up to rounding, give 0."""
        values, vectors = np.linalg.eigh(self.gram)
        present = values > values[-1] * len(values) * np.finfo(np.float64).eps
        powers = np.zeros_like(values)
        powers[present] = values[present] ** -0.5
        return (vectors * powers) @ vectors.T


def _weighted(space: FeatureSpace, directions: Floats, correlations: Floats) -> float:
    """Return the PWCCA distance: directions of the wider model without a partner have weight and no correlation."""
    weights = np.abs(directions.T @ space.inverse_root @ space.gram).sum(1)
    return float(1 - weights[: len(correlations)] @ correlations / weights.sum())


def feature_similarities(first: FeatureSpace, second: FeatureSpace) -> dict[str, float]:
    """Return canonical correlations and three distances between the features of the same images in two models.

    Args:
        first: A, a (neurons) x (images) matrix, centred and of norm 1.
        second: B, of the same images.

    Returns:
        ``cca`` and ``cca_squared``, mean and mean square of the canonical correlations; ``pwcca``, 1 minus their mean
        weighted by Σ |<canonical vector, neuron>| of A, and ``pwcca_reverse`` of B; ``cka``, 1 - ||BAᵀ||² / (||AAᵀ||
        ||BBᵀ||); ``procrustes``, ||A||² + ||B||² - 2 ||ABᵀ||_*. The first two grow with similarity, the others are
        distances. (Ding et al. 2021, "Grounding representation similarity with statistical testing".)

    Raises:
        ValueError: other numbers of images.
    """
    cross = first.cross(second)
    left, correlations, right = np.linalg.svd(first.inverse_root @ cross @ second.inverse_root)
    scale = np.linalg.norm(first.gram) * np.linalg.norm(second.gram)
    return {
        "cca": float(correlations.mean()),
        "cca_squared": float((correlations**2).mean()),
        "pwcca": _weighted(first, left, correlations),
        "pwcca_reverse": _weighted(second, right.T, correlations),
        "cka": float(1 - (cross**2).sum() / scale),
        "procrustes": float(2 - 2 * np.linalg.svd(cross, compute_uv=False).sum()),
    }


def mean_average_precision(scores: ArrayLike, targets: ArrayLike) -> float:
    """Return the multi-label mAP in per cent, by the paper's code.

    The mean over classes of (sum of the precision at every positive) / (positives + 1e-8); a class without positives
    counts 0. Of equal scores the earlier image goes first.

    Args:
        scores: (images, classes) floating, larger for more certain.
        targets: (images, classes), positive where the label is present.

    Raises:
        ValueError: different shapes or nothing in them.
    """
    values, present = np.asarray(scores), np.asarray(targets) > 0
    if values.shape != present.shape or values.ndim != 2 or not values.size:
        raise ValueError(f"both must be (images, classes), of one shape, got {values.shape} and {present.shape}")
    hits = np.take_along_axis(present, np.argsort(-values, axis=0, kind="stable"), 0)
    found = hits.cumsum(0)
    precision = found / np.arange(1, len(hits) + 1)[:, None]
    return float(100 * ((precision * hits).sum(0) / (found[-1] + 1e-8)).mean())


def rank_correlations(x: ArrayLike, y: ArrayLike) -> dict[str, float]:
    """Return Spearman's and Kendall's (tau-b) correlation of the pairs without a NaN, and the number of these pairs.

    Both are NaN for fewer than two pairs and where one side is constant.
    """
    from scipy import stats

    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    both = ~(np.isnan(first) | np.isnan(second))
    first, second = first[both], second[both]
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return {"spearman": float("nan"), "kendall": float("nan"), "pairs": len(first)}
    return {
        "spearman": float(stats.spearmanr(first, second).statistic),
        "kendall": float(stats.kendalltau(first, second).statistic),
        "pairs": len(first),
    }
