"""Paired accuracy: McNemar's test and the interval of the difference."""

import numpy as np
import pytest

from fastreduce.quality import paired_accuracy


def _pairs(both, lost, won, neither):
    before = [True] * (both + lost) + [False] * (won + neither)
    after = [True] * both + [False] * lost + [True] * won + [False] * neither
    return before, after


def test_counts_and_mcnemar():
    found = paired_accuracy(*_pairs(70, 10, 2, 18))
    assert (found.images, found.lost, found.won) == (100, 10, 2)
    assert (found.before, found.after, found.difference) == (0.8, 0.72, -0.08)
    # Two-sided: twice the chance of at most 2 heads in 12 throws, (1 + 12 + 66) / 4096.
    assert found.p_value == pytest.approx(2 * 79 / 4096)


def test_points_lost_are_the_nearest_numbers():
    """-100 * -0.007 is more than 0.7, so a loss of exactly 0.7 points was one above a bound of 0.7."""
    found = paired_accuracy(*_pairs(900, 12, 5, 83))
    assert -100 * found.difference > 0.7
    assert found.points_lost == found.summary()["points_lost"] == 0.7
    assert paired_accuracy(*_pairs(1, 0, 2, 1)).points_lost == -50


def test_interval_is_that_of_a_bootstrap_over_images():
    before, after = (np.array(side) for side in _pairs(140, 25, 10, 25))
    found = paired_accuracy(before, after)
    generator = np.random.default_rng(1)
    draws = generator.integers(0, 200, (20_000, 200))
    differences = (after[draws].astype(int) - before[draws].astype(int)).mean(1)
    assert found.interval == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.006)
    assert found.interval[0] < found.difference < found.interval[1] < 0


def test_models_that_never_differ_are_not_certain_to_be_equal():
    found = paired_accuracy(*_pairs(40, 0, 0, 10))
    assert found.difference == 0
    assert found.p_value == 1
    # The rate at which 50 images show nothing in 2.5 % of the cases.
    assert found.interval == pytest.approx((-(1 - 0.025**0.02), 1 - 0.025**0.02))


def test_more_images_make_a_narrower_interval():
    few, many = (paired_accuracy(*_pairs(7 * n, 2 * n, n, 0)) for n in (5, 500))
    assert np.ptp(many.interval) < np.ptp(few.interval) / 5


@pytest.mark.parametrize("pair", [([True], [True, False]), ([], []), ([[True]], [[True]])])
def test_wrong_shapes_are_said(pair):
    with pytest.raises(ValueError, match="one length"):
        paired_accuracy(*pair)
