"""Gaps, tax, fronts and volumes, by hand and against counting."""

import numpy as np
import pytest

from uft.evaluation.tradeoff import alignment_tax, hypervolume, ideal_distance, optimality_gaps, pareto_front


def test_gaps_and_distance():
    losses = np.array([[2.0, 0.9], [1.0, 0.5]])
    np.testing.assert_allclose(optimality_gaps(losses, [1.7, 0.5]), [[0.3, 0.4], [-0.7, 0.0]])
    np.testing.assert_allclose(ideal_distance(losses, [1.7, 0.5]), [0.5, 0.7])
    assert ideal_distance([2.0, 0.9], [1.7, 0.5]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"losses \[2, 2\], optima \[3\]"):
        optimality_gaps(losses, [1, 2, 3])


def test_tax_at_equal_reward():
    """Ours falls along 1 − r, the baseline's along 1 − r/2, from 0 to 1: at reward r the tax is r/2."""
    ours = [0.5, 0.0, 1.0], [0.5, 1.0, 0.0]  # in any order
    found = alignment_tax(*ours, [0.0, 1.0], [1.0, 0.5])
    np.testing.assert_allclose(found.reward, [0, 0.5, 1])
    np.testing.assert_allclose(found.tax, [0, 0.25, 0.5])
    assert found.mean == pytest.approx(0.25)
    assert alignment_tax([0.0, 1.0], [1.0, 0.5], *ours).mean == pytest.approx(-0.25)


def test_tax_counts_only_where_both_have_been():
    found = alignment_tax([0, 2], [1, 0], [1, 3], [0.5, 0.5])
    assert found.reward.min() == 1 and found.reward.max() == 2
    assert found.mean == pytest.approx(0.25)  # 0.5 minus (0.5 to 0)
    with pytest.raises(ValueError, match="from 0 to 1 and the baseline's from 1 to 2"):
        alignment_tax([0, 1], [1, 1], [1, 2], [1, 1])


def test_tax_of_a_kinked_curve_is_integrated_exactly():
    """The mean is over reward, not over points: a cluster of points counts no more than its interval."""
    found = alignment_tax([0, 0.01, 0.02, 1], [0, 0, 0, 0], [0, 0.5, 1], [0, 1, 0])
    assert found.mean == pytest.approx(0.5)


def test_equal_rewards_are_averaged():
    assert alignment_tax([0, 0, 1], [0.2, 0.4, 0.3], [0, 1], [1, 1]).tax[0] == pytest.approx(0.7)


@pytest.mark.parametrize(
    "curve, message",
    [(([1, 2], [1]), r"\[2\] rewards and \[1\]"), (([], []), r"want \[n"), (([1, np.nan], [1, 1]), "no number")],
)
def test_tax_refuses(curve, message):
    with pytest.raises(ValueError, match=message):
        alignment_tax(*curve, [0, 1], [1, 1])


def test_front_by_hand():
    points = [[1, 3], [2, 2], [3, 1], [1, 1], [2, 2], [1, 2]]
    assert pareto_front(points).tolist() == [True, True, True, False, True, False]
    with pytest.raises(ValueError, match="want numbers"):
        pareto_front([[1, np.inf]])


def test_volume_by_hand():
    assert hypervolume([[1, 3], [2, 2], [3, 1]], [0, 0]) == pytest.approx(6)
    assert hypervolume([[1, 3], [2, 2], [3, 1]], [1, 1]) == pytest.approx(1)  # two of them add nothing
    assert hypervolume([[2, 3, 4]], [0, 1, 1]) == pytest.approx(2 * 2 * 3)
    assert hypervolume([[0.5], [2.0]], [1.0]) == pytest.approx(1)
    assert hypervolume([[0, 0]], [1, 1]) == 0
    with pytest.raises(ValueError, match="reference"):
        hypervolume([[1, 2]], [0, 0, 0])


@pytest.mark.parametrize("d", [2, 3, 4])
def test_volume_counts_cells(d):
    """On a grid of whole numbers the volume is how many unit cells some point dominates."""
    random = np.random.default_rng(d)
    points = random.integers(0, 5, (7, d))
    corners = np.stack(np.meshgrid(*[np.arange(5)] * d), -1).reshape(-1, d)  # upper corners are one more
    counted = (points[:, None] >= corners + 1).all(-1).any(0).sum()
    assert hypervolume(points, [0] * d) == pytest.approx(counted)
    front = points[pareto_front(points)]
    assert hypervolume(front, [0] * d) == pytest.approx(counted)  # the others add nothing
