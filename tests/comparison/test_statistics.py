"""Intervals and tests, by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.figures import spread_labels
from uft.comparison.statistics import effect_size, holm, interquartile_mean, interval, paired_difference, sign_flip


def test_t_interval_by_hand():
    found = interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 * 1.0 / math.sqrt(3)  # t with two degrees of freedom, standard deviation 1
    assert found == pytest.approx((2.0, 2.0 - half, 2.0 + half, 3))


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(0).normal(size=7)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values)[1:3] == pytest.approx((low, high))


def test_one_seed_has_no_interval():
    assert math.isnan(interval([0.5]).low) and str(interval([0.5])) == "0.500"


def test_pairing_removes_what_seeds_share():
    base = {seed: float(seed) for seed in range(5)}
    a = {seed: value + 0.1 for seed, value in base.items()}
    found = paired_difference(a, base)
    assert found.mean == pytest.approx(0.1) and found.high - found.low < 1e-9
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 1.0, 2: 5.0}).mean == 1.0
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_labels_are_spread_and_keep_their_order():
    found = spread_labels([0.5, 0.5, 0.51, 0.9], 0.1)
    assert all(b - a >= 0.1 - 1e-6 for a, b in zip(sorted(found), sorted(found)[1:]))
    assert np.argsort(found, kind="stable").tolist() == [0, 1, 2, 3]


def test_sign_flips_by_hand():
    # of (+-1, +-2, +-3) only all plus and all minus are as far from 0 as 6
    assert sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip([-1.0, 2.0, 3.0]) == 4 / 8  # 4 and 6, either way
    assert sign_flip([0.1] * 10) == 2 / 2**10
    assert sign_flip([0.0, 0.0]) == 1.0
    with pytest.raises(ValueError, match="found 21 differences"):
        sign_flip([1.0] * 21)


def test_sign_flips_are_as_those_of_scipy():
    values = np.random.default_rng(0).normal(0.4, 1.0, 9)
    found = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(values) == pytest.approx(found.pvalue)


def test_holm_by_hand():
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == {"a": 0.06, "b": 0.03, "c": 0.06}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_interquartile_mean_by_hand():
    assert interquartile_mean([100.0, 1.0, 2.0, -50.0]) == 1.5
    # of six values the middle three: half of the second and fifth, all of the third and fourth
    assert interquartile_mean([0, 1, 2, 3, 4, 50]) == pytest.approx((0.5 * 1 + 2 + 3 + 0.5 * 4) / 3)
    assert interquartile_mean([7.0]) == 7.0


def test_effect_size_by_hand():
    assert effect_size([1.0, 2.0, 3.0]) == pytest.approx(2.0)
    assert effect_size([-2.0, -2.0]) == -np.inf and effect_size([0.0, 0.0]) == 0.0
