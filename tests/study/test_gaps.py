"""Paired differences in accuracy: what is beyond chance, and what would decide the others."""

import math

import numpy as np
import pytest
from scipy import stats

from fastreduce.quality import paired_accuracy
from fastreduce.study.findings import _jackknife_error, _similarities_follow
from fastreduce.study.gaps import Gap, common_words, measure_gap


def scores(images, won, lost):
    """Return two models that differ on so many images."""
    first, second = np.full(images, 100.0), np.full(images, 100.0)
    second[:won], first[won : won + lost] = 0, 0
    return first, second


@pytest.mark.parametrize(("won", "lost"), [(60, 20), (30, 30), (6, 0), (5, 0), (0, 40)])
def test_two_models(won, lost):
    gap = measure_gap(*scores(2000, won, lost))
    assert gap.mean == pytest.approx((won - lost) / 20)
    assert gap.p_value == pytest.approx(stats.binomtest(won, won + lost).pvalue)
    # of that many images the interval is the normal one
    if won + lost > 30:
        half = 1.96 * np.subtract(*scores(2000, won, lost)).std() / math.sqrt(2000)
        assert (gap.low, gap.high) == pytest.approx((gap.mean - half, gap.mean + half), abs=0.06)
    decided = {(60, 20): 1, (30, 30): 0, (6, 0): 1, (5, 0): 0, (0, 40): -1}
    assert gap.sign == decided[won, lost]


def test_few_images_are_left_to_the_exact_test():
    """Five of five: the bootstrap alone, and two standard errors, would call it decided."""
    gap = measure_gap(*scores(2000, 5, 0))
    assert gap.low > 0
    assert gap.mean > 2 * np.subtract(*scores(2000, 5, 0)).std() / math.sqrt(2000)
    assert gap.sign == 0


def test_models_that_agree():
    gap = measure_gap(*scores(100, 0, 0))
    assert (gap.mean, gap.p_value, gap.sign) == (0, 1, 0)
    # 100 images that agree leave room for what they would miss, as fidelity's accuracy says
    assert (gap.low, gap.high) == pytest.approx(
        [100 * edge for edge in paired_accuracy([True] * 100, [True] * 100).interval]
    )
    assert gap.high == pytest.approx(100 * (1 - 0.025 ** (1 / 100)))
    assert common_words([gap]) == "100 images decide differences above 3.62 points"
    assert gap.images_needed == math.inf


def test_averages_have_no_exact_test():
    first, second = scores(1000, 100, 20)
    gap = measure_gap((first + second) / 2, second)
    assert gap.p_value is None
    assert gap.mean == pytest.approx(4)
    assert gap.sign == 1


def test_as_many_images_as_it_says_decide_it():
    """An undecided difference is decided with the number of images that it needs, and with no fewer."""
    gap = measure_gap(*scores(1000, 30, 22))
    assert gap.sign == 0
    times = gap.images_needed / 1000
    assert 3 < times < 5
    for share, sign in ((0.7, 0), (1.4, 1)):
        size = share * times
        assert measure_gap(*scores(round(1000 * size), round(30 * size), round(22 * size))).sign == sign


def test_words():
    gaps = [Gap(0.5, -0.25, 1.25, 10000), Gap(2.0, 1.0, 3.0, 10000), Gap(-0.1, -0.6, 0.4, 10000)]
    assert gaps[0].words == "+0.50 (-0.25 to +1.25)"
    assert common_words(gaps) == (
        "10,000 images decide differences above 0.75 points; the largest of these needs 23,000 images"
    )
    assert common_words(gaps[1:2]) == ""
    assert common_words([Gap(0.0, -1.0, 1.0, 50)]) == "50 images decide differences above 1.00 points"


def rows(noise):
    """Make eight methods whose features and assignments follow the gap in accuracy; what they keep, by chance."""
    draw, found = np.random.default_rng(3), []
    order = draw.permutation(8)
    for method in range(8):
        for rate in (0.5, 0.7, 0.9):
            row = {"dataset_a": "d", "backbone_a": "b", "method_a": "topk", "keep_rate_a": rate}
            row |= {"method_b": f"m{method}", "keep_rate_b": rate, "difference": float(method)}
            values = {"procrustes_3": method, "nmi_3": -method, "iou_3": method + noise * order[method]}
            found.append(row | {name: float(value) for name, value in values.items()})
    return found


def test_similarities_are_judged_by_the_number_of_methods():
    close = _similarities_follow(rows(0.0))
    assert close.verdict == "undecided"  # all three follow equally closely
    assert "8 methods decide" in close.evidence or "Undecided" in close.evidence
    few = _similarities_follow(rows(0.0)[:6])
    assert few.verdict in ("undecided", "not examined")
    assert _similarities_follow([]).verdict == "not examined"


def test_the_error_of_a_jackknife():
    values = np.random.default_rng(0).normal(size=20)
    without = [float(np.delete(values, index).mean()) for index in range(20)]
    assert _jackknife_error(without) == pytest.approx(values.std(ddof=1) / math.sqrt(20))
    assert math.isnan(_jackknife_error([1.0, 2.0]))
