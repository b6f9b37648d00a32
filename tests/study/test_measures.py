"""The measures of the analysis: against the paper's recorded numbers, scikit-learn and plain loops."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import homogeneity_completeness_v_measure

from fastreduce.study import measures
from fastreduce.study.measures import (
    FeatureSpace,
    cluster_agreement,
    distinct_labels,
    feature_similarities,
    kept_overlap,
    map_similarities,
    mean_average_precision,
    pack_kept,
    packed_sizes,
    rank_correlations,
    token_depths,
)

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "metrics" / "functions.safetensors")


def golden(key):
    return GOLDEN[key]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(measures, "_CHUNK", 3)


@pytest.mark.parametrize("case", range(3))
def test_assignments_golden(case):
    for stage in range(3):
        key = f"clus/c{case}/s{stage}"
        a, b = (golden(f"{key}/{side}_mapped")[None] for side in "ab")
        np.testing.assert_allclose(cluster_agreement(a, b)[0], golden(f"{key}/hcv_true_a_pred_b"), rtol=0, atol=1e-14)
        np.testing.assert_allclose(cluster_agreement(b, a)[0], golden(f"{key}/hcv_true_b_pred_a"), rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", range(3))
def test_features_golden(case):
    a, b = (FeatureSpace(golden(f"feat/f{case}/{side}_raw").T) for side in "AB")
    names = {"cca": "mean_cca", "cca_squared": "mean_sq_cca", "pwcca": "pwcca_AB", "pwcca_reverse": "pwcca_BA"}
    names |= {"cka": "cka_dist", "procrustes": "procrustes"}
    found = feature_similarities(a, b)
    expected = {name: golden(f"feat/f{case}/{theirs}")[0] for name, theirs in names.items()}
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", range(7))
def test_maps_golden(case):
    found = map_similarities(golden(f"heat/p{case}/a"), golden(f"heat/p{case}/b"))
    names = {"kl": "KL", "kl_reverse": "KL_ba", "js": "JS", "pcc": "PCC", "scc": "SCC", "sim": "SIM", "emd": "EMD"}
    expected = {name: golden(f"heat/p{case}/{theirs}")[0] for name, theirs in names.items()}
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_mean_average_precision_golden():
    for targets, expected in (("targets", "mAP"), ("targets_one_class_empty", "mAP_one_class_empty")):
        found = mean_average_precision(golden("map/preds"), golden(f"map/{targets}"))
        assert found == pytest.approx(golden(f"map/{expected}")[0], abs=1e-10)


@pytest.mark.parametrize("case", range(3))
def test_rank_correlations_golden(case):
    x, y = golden(f"rank/r{case}/x"), golden(f"rank/r{case}/y")
    found = rank_correlations(np.append(x, np.nan), np.append(y, 1.0))
    expected = {name: golden(f"rank/r{case}/{name}")[0] for name in ("spearman", "kendall")}
    assert found == pytest.approx({**expected, "pairs": len(x)}, abs=1e-14)


def test_rank_correlations_of_nothing():
    for x, y in (([], []), ([1.0, np.nan], [1.0, 2.0]), ([1.0, 1.0], [1.0, 2.0])):
        assert np.isnan(rank_correlations(x, y)["spearman"])


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_agreement_is_that_of_scikit_learn(kind, small_chunks):
    rng = np.random.default_rng(0)
    true, predicted = (rng.integers(0, high, (10, 49)).astype(kind) for high in (12, 5))
    true[3], predicted[4], true[5], predicted[5] = 7, 2, 1, 3  # one cluster: in one, the other, both
    predicted[6] = true[6]
    if kind is not np.uint8:
        true -= 6
    expected = [homogeneity_completeness_v_measure(a, b) for a, b in zip(true, predicted, strict=True)]
    np.testing.assert_allclose(cluster_agreement(true, predicted), expected, rtol=0, atol=1e-13)
    assert np.array_equal(distinct_labels(true), [len(set(row)) for row in true])


def random_kept(rng, images, patches, count):
    """Draw distinct patches, some of them padding."""
    kept = np.argsort(rng.random((images, patches)), 1)[:, :count]
    return np.where(rng.random(kept.shape) < 0.2, -1, kept).astype(np.int16)


@pytest.mark.parametrize("patches", [5, 63, 64, 65, 196])
def test_overlap_is_that_of_sets(patches, small_chunks):
    rng = np.random.default_rng(patches)
    first, second = random_kept(rng, 8, patches, patches // 2 + 1), random_kept(rng, 8, patches, patches // 3 + 1)
    first[0] = -1
    second[0] = second[1] = -1
    first[2] = -1
    packed = pack_kept(first, patches), pack_kept(second, patches)
    union, own = kept_overlap(*packed)
    for index in range(8):
        a, b = ({*map(int, kept[index])} - {-1} for kept in (first, second))
        common = len(a & b)
        assert packed_sizes(packed[0])[index] == len(a)
        assert union[index] == (common / len(a | b) if common else 0)
        assert own[index] == (common / len(b) if common else 0)


def test_depths_are_those_of_loops(small_chunks):
    rng = np.random.default_rng(0)
    first = random_kept(rng, 7, 20, 15)
    kept = {2: first, 5: first[:, :6], 8: first[:, :2]}
    depths = np.full((7, 20), 11)
    for image in range(7):
        for patch in range(20):
            for block in (8, 5, 2):
                if patch not in kept[block][image]:
                    depths[image, patch] = block
    found = token_depths(kept, 20, 11)
    np.testing.assert_allclose(found["mean"], depths.mean(0), rtol=1e-15)
    np.testing.assert_allclose(found["std"], depths.std(0), rtol=0, atol=1e-14)
    assert (found["pooled_mean"], found["pooled_std"]) == pytest.approx((depths.mean(), depths.std()), abs=1e-14)


def test_features_in_chunks_and_without_full_rank(small_chunks):
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(20, 4)) + 100).astype(np.float32)
    whole = FeatureSpace(features)
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    np.testing.assert_allclose(whole.gram, centred.T @ centred / (centred**2).sum(), rtol=1e-12)
    doubled = feature_similarities(FeatureSpace(features[:, [0, 1, 2, 0]]), whole)
    assert doubled["cca"] == pytest.approx(0.75, abs=1e-9)  # a neuron said twice is one direction
    assert feature_similarities(whole, whole)["procrustes"] == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_measured_is_said():
    ones = np.ones((3, 4), np.int16)
    with pytest.raises(ValueError, match=r"\[-1, 4\), got 4"):
        pack_kept(ones * 4, 4)
    with pytest.raises(TypeError, match="float64"):
        pack_kept(ones * 0.5, 4)
    with pytest.raises(ValueError, match="one grid"):
        kept_overlap(pack_kept(ones, 4), pack_kept(ones[:2], 4))
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 3\)"):
        cluster_agreement(ones, ones[:, :3])
    with pytest.raises(TypeError, match="float64"):
        cluster_agreement(ones, ones * 0.5)
    with pytest.raises(ValueError, match="must be small"):
        cluster_agreement(ones * np.arange(4) * 30000, ones * np.arange(4) * 30000)
    with pytest.raises(ValueError, match="as many images"):
        token_depths({1: ones, 2: ones[:2]}, 4, 12)
    with pytest.raises(ValueError, match=r"more images, got \(4, 4\)"):
        FeatureSpace(np.ones((4, 4)))
    with pytest.raises(ValueError, match="vary and be finite"):
        FeatureSpace(np.ones((5, 4)))
    with pytest.raises(ValueError, match="same images, got 6 and 7"):
        FeatureSpace(np.eye(6, 4)).cross(FeatureSpace(np.eye(7, 4)))
    with pytest.raises(ValueError, match="of one shape"):
        map_similarities(np.ones((2, 2)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="of one shape"):
        mean_average_precision(np.ones((2, 2)), np.ones((2, 3)))
