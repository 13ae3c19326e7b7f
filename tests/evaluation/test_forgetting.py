"""Forgetting and backward transfer, by hand and on guessers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uft.evaluation.forgetting import backward_transfer, forgetting_matrix, mean_forgetting, sample_forgetting

BEFORE = [1, 1, 1, 1, 1, 1, 0, 0]
AFTER = [1, 1, 1, 0, 0, 0, 1, 0]


def test_free_answers_by_hand():
    """Nobody guesses a free answer: what changed is what was forgotten and learnt."""
    found = sample_forgetting(BEFORE, AFTER)
    assert found._asdict() == pytest.approx(
        {"F": 3 / 8, "BT": 1 / 8, "F_chance": 0, "BT_chance": 0, "F_true": 3 / 8, "BT_true": 1 / 8, "F_max": 6 / 8}
    )


def test_four_options_by_hand():
    found = sample_forgetting(BEFORE, AFTER, 4)  # accuracies 3/4 and 1/2
    chance, back = (1 / 4) / 3 * (1 / 2), (1 / 4) * (1 / 2) / 3
    assert found.F_chance == pytest.approx(chance) and found.BT_chance == pytest.approx(back)
    assert found.F_true == pytest.approx(3 / 8 - chance)
    assert found.BT_true == pytest.approx(1 / 8 - back)
    assert found.F_max == pytest.approx((4 * 0.75 - 1) / 3)


def test_chance_is_not_symmetric_in_name_only():
    """Both chance terms are (1 − a_pre)(1 − a_post)/(k − 1): guessed right once, wrong the other time."""
    found = sample_forgetting([1, 0, 0, 0], [0, 0, 1, 1], 2)
    assert found.F_chance == found.BT_chance == pytest.approx(0.75 * 0.5)
    assert found.F_true == 0.0  # 1/4 is less than guessing gives
    assert found.F_max == 0.0  # below chance nothing was known


def test_options_differ_by_item():
    """Each k is a group with accuracies of its own, weighted by its size."""
    options = [2, 2, None, None, None, 2, 2, None]
    found = sample_forgetting(BEFORE, AFTER, options)
    two = np.array([k == 2 for k in options])
    part = sample_forgetting(np.array(BEFORE)[two], np.array(AFTER)[two], 2)
    free = sample_forgetting(np.array(BEFORE)[~two], np.array(AFTER)[~two])
    assert found.F_chance == pytest.approx(0.5 * part.F_chance) and part.F_chance > 0
    known = 0.5 * (2 * 0.75 - 1) / 1 + 0.5 * 0.75
    assert found.F_max == pytest.approx(known)
    assert pytest.approx((part.F + free.F) / 2) == found.F
    assert sample_forgetting(BEFORE, AFTER, [None] * 8) == sample_forgetting(BEFORE, AFTER)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([2, 3, 4, 10]), min_size=1, max_size=3, unique=True), st.integers(0, 10_000))
def test_guessers_forget_nothing(ks, seed):
    """Two models that guess: F is what chance explains, so F_true and BT_true are noise around 0."""
    random = np.random.default_rng(seed)
    n = 4000
    k = random.choice(ks, n)
    before, after = (random.random(n) < 1 / k for _ in range(2))
    found = sample_forgetting(before, after, k.tolist())
    assert found.F - found.F_chance == pytest.approx(0, abs=5 / np.sqrt(n))
    assert found.BT - found.BT_chance == pytest.approx(0, abs=5 / np.sqrt(n))
    assert found.F > 0.05  # which is forgetting, if chance is forgotten


def test_guessers_forget_nothing_in_expectation():
    random = np.random.default_rng(0)
    excess = []
    for _ in range(400):
        before, after = random.random((2, 200)) < 1 / 4
        found = sample_forgetting(before, after, 4)
        excess.append(found.F - found.F_chance)
    assert np.mean(excess) == pytest.approx(0, abs=4 * np.std(excess) / np.sqrt(400))
    assert np.std(excess) / np.sqrt(400) < 0.002  # so the line above says something


def test_a_known_share_is_found_again():
    """90 % known, half of it forgotten and then guessed at: F_true is the forgotten share less what is guessed back."""
    random = np.random.default_rng(1)
    n, k = 200_000, 4
    known = random.random(n) < 0.9
    kept = known & (random.random(n) < 0.5)
    before, after = (have | (random.random(n) < 1 / k) for have in (known, kept))
    found = sample_forgetting(before, after, k)
    assert found.F_max == pytest.approx(0.9, abs=0.01)
    # guessed right before (of the unknown) is independent of wrong after only within the unknown: the paper's
    # estimate is the product of the two margins
    wrong_after = 1 - after.mean()
    expected = (0.45 * 0.75 + 0.1 / 4 * 0.75) - (0.1 / 4) * wrong_after
    assert found.F_true == pytest.approx(expected, abs=0.01)


REFUSED = [
    (([1, 0], [1]), "2 samples before and 1 after"),
    (([], []), "at least one"),
    (([[1]], [[1]]), "shape"),
    (([0.5, 1], [1, 1]), "other than 0 and 1"),
    (([1, 0], [1, 0], 1), "found 1; want at least 2"),
    (([1, 0], [1, 0], [2, 0]), "found 0; want at least 2"),
    (([1, 0], [1, 0], [2]), "found 1 for 2 samples"),
]


@pytest.mark.parametrize("arguments, message", REFUSED)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_forgetting(*arguments)


# ---- over stages ----

R = [[0.9, 0.1, 0.2], [0.6, 0.8, 0.3], [0.7, 0.5, 0.9]]


def test_matrix_by_hand():
    assert backward_transfer(R) == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    f = forgetting_matrix(R)
    expected = [[np.nan] * 3, [0.3, np.nan, np.nan], [0.2, 0.3, np.nan]]
    np.testing.assert_allclose(f, expected)
    assert mean_forgetting(R) == pytest.approx(0.25)


def test_best_earlier_score_counts_not_the_last():
    """[RW] takes the maximum over all earlier stages, [GEM] the score when the task was learnt."""
    scores = [[0.5, 0], [0.9, 0.3], [0.6, 0.2]]
    assert forgetting_matrix(scores, [0, 1])[2, 0] == pytest.approx(0.3)
    assert backward_transfer(scores, [0, 1]) == pytest.approx(((0.6 - 0.5) + (0.2 - 0.3)) / 2)


def test_more_tasks_than_stages():
    """Facts of pretraining are there before the first stage: a row of their own, learnt in stage 0."""
    scores = [[1.0, 0.0, 0.9], [0.4, 0.8, 0.9]]
    assert backward_transfer(scores, [0, 1, 0]) == pytest.approx((-0.6 + 0.0) / 2)
    assert mean_forgetting(scores, [0, 1, 0]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "scores, learnt, message",
    [
        ([[1.0]], None, "at least two stages"),
        ([1.0, 2.0], None, "want \\[stages, tasks\\]"),
        ([[1, 2, 3], [1, 2, 3]], None, "no `learnt`"),
        ([[1, np.nan], [1, 2]], None, "after stage 0 on task 1"),
        ([[1, 2], [1, 2]], [0, 2], "from 0 to 1"),
        ([[1, 2], [1, 2]], [0, 0.5], "want a stage"),
        ([[1, 2], [1, 2]], [0], "for each task"),
        ([[1, 2], [1, 2]], [1, 1], "last stage"),
    ],
)
def test_what_no_matrix_is(scores, learnt, message):
    for measure in (backward_transfer, forgetting_matrix):
        with pytest.raises(ValueError, match=message):
            measure(scores, learnt)
