"""Length bias, scores and terms, by hand."""

import math

import numpy as np
import pytest

from uft.data.quality.bias import length_and_target, length_bias, mean, share
from uft.data.quality.items import Words
from uft.data.quality.scores import centre, describe, rank, suggestion
from uft.data.quality.terms import TERMS, UNSAFE, Matcher, rates, read_terms
from uft.data.rows import DataError


def test_share_with_wilsons_interval():
    """8 of 10, z = 1.96: (0.8 + z²/20 ± z √(0.016 + z²/400)) / (1 + z²/10)."""
    found, z = share(8, 10), 1.959964
    middle, half = 0.8 + z**2 / 20, z * math.sqrt(0.8 * 0.2 / 10 + z**2 / 400)
    assert found["low"] == pytest.approx((middle - half) / (1 + z**2 / 10), abs=1e-6)
    assert found["high"] == pytest.approx((middle + half) / (1 + z**2 / 10), abs=1e-6)
    assert share(0, 0)["share"] is None


def test_mean_with_its_interval():
    """1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.3027."""
    found = mean([1, 2, 3])
    assert found["mean"] == 2 and found["high"] == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-3)
    assert mean([5])["low"] is None and mean([])["mean"] is None


def test_length_bias_by_hand():
    """Chosen longer by 4, 2 and 0, and shorter by 1: of three unequal pairs two; the rule is right on 2 + 1/2 of 4."""
    found = length_bias([5, 4, 3, 2], [1, 2, 3, 3])
    assert (found["pairs"], found["ties"]) == (4, 1)
    assert (found["chosen_longer"]["hits"], found["chosen_longer"]["of"]) == (2, 3)
    assert found["rule_accuracy"] == 2.5 / 4
    assert found["difference"]["mean"] == 1.25
    assert found["p"] == pytest.approx(1.0)  # 2 or more of 3, twice


def test_length_and_target():
    assert length_and_target([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])["rho"] == pytest.approx(1)
    assert length_and_target([1, 2, 3, 4], [1, 1, 1, 1])["rho"] is None


# ---- scores ----


def test_what_una_makes_of_scores():
    """logit(0.5) = 0, logit(0.2) = −ln 4; β = 0.1: mean target −10 ln 4 / 2."""
    found = describe([0.5, 0.2], beta=0.1)
    assert found["mean_target_log_ratio"] == pytest.approx(-5 * math.log(4))
    assert found["share_above_half"] == 0 and found["share_at_0_or_1"] == 0
    assert describe([0.0, 1.0, 0.7], beta=0.1)["share_at_0_or_1"] == pytest.approx(2 / 3)
    assert sum(found["histogram"]) == 2


@pytest.mark.parametrize(
    "above, skewness, values, hint",
    [(0.5, 3, 9, "keep"), (0.1, 2.7, 9, "rank"), (0.9, 0.1, 9, "centre"), (1, 0, 1, "keep")],
)
def test_suggestions(above, skewness, values, hint):
    assert suggestion(above, skewness, values).startswith(hint + ":")


def test_ranks_and_centre():
    assert rank([0.9, 0.1, 0.1, 0.5]).tolist() == [7 / 8, 2 / 8, 2 / 8, 5 / 8]
    draw = np.random.default_rng(0).beta(0.3, 3, 101)
    moved = centre(draw)
    assert np.median(moved) == pytest.approx(0.5)
    assert (np.argsort(moved) == np.argsort(draw)).all()
    # differences in log-odds stay
    odds = lambda s: np.log(s / (1 - s))
    inside = (draw > 1e-5) & (draw < 1 - 1e-5)
    assert np.ptp((odds(moved) - odds(draw))[inside]) < 1e-6
    assert 0 < centre([0.0, 0.5, 1.0])[0] < 1e-5


# ---- terms ----


def matched(text, **groups):
    words = Words()
    return Matcher({name: tuple(terms) for name, terms in groups.items()}, words)([words(text)])[0]


def test_terms_are_whole_words_in_a_row():
    groups = {"g": ["old people"], "h": ["he", "non-binary"]}
    assert matched("The OLD, people", **groups) == {"g": "old people"}
    assert matched("people, old; then", **groups) == {}
    assert matched("non binary", **groups) == {"h": "non-binary"}


def test_a_term_does_not_run_from_one_text_into_the_next():
    words = Words()
    matcher = Matcher({"g": ("old people",)}, words)
    assert matcher([words("so old"), words("people say"), words("old people")]) == [{}, {}, {"g": "old people"}]


def test_rates_of_pairs_by_hand():
    """In four pairs the chosen side alone holds a term, in none the rejected alone: p = 2 / 2⁴."""
    yes, no = {"g": "he"}, {}
    found = rates(["g", "never"], [yes] * 5 + [no], [no] * 4 + [yes, no], paired=True)
    assert list(found) == ["g"]
    assert (found["g"]["better"]["hits"], found["g"]["worse"]["hits"], found["g"]["p"]) == (5, 1, 0.125)
    # Fisher's test: 3 of 3 against 0 of 3: 2 / (6 choose 3)
    assert rates(["g"], [yes] * 3, [no] * 3, paired=False)["g"]["p"] == pytest.approx(0.1)


def test_lists_that_come_along_can_be_read():
    assert len(read_terms(TERMS)) > 5 and "he" in read_terms(TERMS)["men"]
    assert len(read_terms(UNSAFE)) > 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("# nothing\n", "no terms"),
        ("a, b\n", "line 1: found 'a, b'"),
        ("g: a\ng: b\n", "'g' stands twice"),
        ("g: ,\n", "line 1"),
    ],
)
def test_broken_lists_are_refused(tmp_path, text, message):
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_terms(tmp_path / "l.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_terms(tmp_path / "gone.txt")
