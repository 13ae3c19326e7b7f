"""Calibration of a reward model, by hand and on margins whose probabilities are true by construction."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed import examples
from scipy.special import expit

from uft.rlhf.calibration import calibration, expected_calibration_error, figure, pair_margins, reliability, temperature

margins_ = st.lists(st.floats(-20, 20), min_size=1, max_size=50).map(np.array)


def logit(p):
    return math.log(p / (1 - p))


def test_everything_by_hand():
    """Confidences 0.8, 0.8, 0.8, 0.8 (three right) and 0.6, 0.6 (one right), in five bins of width 0.1.

    ECE = 4/6 |0.75 − 0.8| + 2/6 |0.5 − 0.6| = 1/15
    Brier = (3 · 0.2² + 0.8² + 0.4² + 0.6²) / 6
    """
    found = calibration(np.array([logit(0.8)] * 3 + [-logit(0.8), logit(0.6), -logit(0.6)]), bins=5)
    assert found.pairs == 6 and found.accuracy == pytest.approx(4 / 6)
    assert found.ece == pytest.approx(1 / 15)
    assert found.brier == pytest.approx((3 * 0.04 + 0.64 + 0.16 + 0.36) / 6)
    assert found.nll == pytest.approx(-(3 * math.log(0.8) + math.log(0.2) + math.log(0.6) + math.log(0.4)) / 6)
    assert [each.count for each in found.bins] == [2, 0, 4, 0, 0]
    assert found.low < 4 / 6 < found.high


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it():
    found = reliability(np.array([0.0, logit(0.75), 40.0]), bins=2)
    assert [each.count for each in found] == [2, 1]
    assert found[0].accuracy == pytest.approx(0.75)  # a tie is half right


def test_true_probabilities_are_calibrated_and_scaled_ones_are_not():
    random = np.random.default_rng(0)
    size = random.exponential(1.5, 40_000)
    margins = np.where(random.random(len(size)) < expit(size), size, -size)
    true, sure = calibration(margins), calibration(3 * margins)
    assert true.ece < 0.01 and true.temperature == pytest.approx(1, abs=0.05)
    assert sure.ece > 0.08 and sure.temperature == pytest.approx(3, abs=0.15)
    assert sure.ece_rescaled < 0.015
    assert true.accuracy == sure.accuracy and true.nll < sure.nll


def test_temperature_where_there_is_none():
    assert temperature(np.array([1.0, 2.0])) == 0.0
    assert temperature(np.array([1.0, -2.0])) == math.inf


@given(margins_)
@settings(deadline=None, max_examples=60)
def test_bounds_and_order(margins):
    found = calibration(margins)
    assert 0 <= found.ece <= 1 and 0 <= found.brier <= 1 and 0 <= found.accuracy <= 1
    assert sum(each.count for each in found.bins) == len(margins)
    assert calibration(margins[::-1]).ece == pytest.approx(found.ece)
    # never more than the mean distance, pair by pair
    confidence, right = expit(abs(margins)), (margins > 0) + 0.5 * (margins == 0)
    assert found.ece <= abs(confidence - right).mean() + 1e-12


@given(margins_)
@settings(deadline=None, max_examples=60)
def test_temperature_is_a_minimum(margins):
    t = temperature(margins)
    if 0 < t < math.inf:
        nll = lambda at: calibration(margins / at).nll
        assert nll(t) <= min(nll(0.9 * t), nll(1.1 * t)) + 1e-9


def test_margins_are_taken_from_the_preferences():
    data = [*examples("pairs", 2), *examples("scores", 1)]
    assert pair_margins([[3.0, 1.0], [0.0, 4.0], [9.0]], data).tolist() == [2.0, -4.0]
    with pytest.raises(ValueError, match="found 1 examples and no pair"):
        pair_margins([[1.0]], examples("scores", 1))


@pytest.mark.parametrize("margins", [np.zeros(0), np.zeros((2, 2)), np.array([1.0, np.nan])])
def test_what_are_no_margins_is_refused(margins):
    with pytest.raises(ValueError, match=r"want \[pairs\]"):
        calibration(margins)


def test_the_figure_shows_every_bin(tmp_path):
    figure(calibration(np.array([0.5, -1.0, 2.0, 3.0])), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_no_bin_is_no_error():
    assert expected_calibration_error(reliability(np.array([9.0]), bins=1)) == pytest.approx(1 - expit(9.0))
