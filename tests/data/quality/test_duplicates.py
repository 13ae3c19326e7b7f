"""Exact and near duplicates: planted ones are found, and nothing that is none."""

import random

import numpy as np
import pytest

from tests.data.quality.planted import sentence
from uft.data.quality.duplicates import Near, jaccard, near, same, same_or_near, shared_rows
from uft.data.quality.items import Words, key, shingles
from uft.data.rows import DataError


def sets_of(texts, size=3):
    words = Words()
    return [[shingles(words(part), size) for part in text.split("|")] for text in texts]


def test_the_first_equal_key():
    assert same(["a", "b", "a", None, None, "b"]).tolist() == [0, 1, 0, 3, 4, 1]


def test_jaccard_by_hand():
    assert jaccard(np.array([1, 2, 3]), np.array([2, 3, 4, 5])) == 2 / 5
    assert jaccard(np.array([1]), np.array([], dtype=int)) == 0


def test_one_word_more_is_near_and_another_text_is_not():
    """40 words have 38 trigrams; with a word more at the end 39, 38 of them shared: 38 / 39 = 0.974."""
    texts = [sentence(1), sentence(2), sentence(1) + " more", "", ""]
    leader, similarity = near(sets_of(texts), Near(0.8))
    assert leader.tolist() == [0, 1, 0, 3, 4]
    assert similarity[2] == pytest.approx(38 / 39)
    assert near(sets_of(texts), Near(0.98))[0].tolist() == [0, 1, 2, 3, 4]


def test_punctuation_keeps_formulas_apart():
    assert near(sets_of(["what is 3 + 4 ?", "what is 3 - 4 ?"]), Near(0.8))[0].tolist() == [0, 1]


def test_every_part_must_be_near():
    """A long prompt in common does not hide that answers differ, and sides that are exchanged make another pair."""
    long, a, b = sentence(1, 200), sentence(2, 20), sentence(3, 20)
    texts = [
        f"{long}|yes",
        f"{long} more|no",
        f"{long} more|yes",
        f"{long}|{a}|{b}",
        f"{long}|{b}|{a}",
        f"{long}|{a} more|{b}",
    ]
    leader, alike = near(sets_of(texts), Near(0.8))
    assert leader.tolist() == [0, 1, 0, 3, 4, 3]
    assert alike[2] == pytest.approx(198 / 199) and alike[5] == pytest.approx(18 / 19)


def test_parts_that_both_lack_say_nothing():
    assert near(sets_of(["|" + sentence(1), "|" + sentence(1) + " more", "|", "|"]), Near())[0].tolist() == [0, 0, 2, 3]


def test_against_all_comparisons():
    """Random edits of a few texts: what is called near is near, leaders are not near each other, hardly any is "
    "missed."""
    draw = random.Random(0)
    texts = []
    for _ in range(150):
        words = sentence(draw.randrange(12)).split()
        for _ in range(draw.randrange(4)):
            words[draw.randrange(len(words))] = f"x{draw.randrange(1000)}"
        texts.append(" ".join(words))
    sets, settings = sets_of(texts), Near(0.7)
    leader, similarity = near(sets, settings)
    missed = 0
    for i in range(len(texts)):
        leaders = [j for j in range(i) if leader[j] == j]
        like = [j for j in leaders if jaccard(*sets[i], *sets[j]) >= 0.7]
        if leader[i] != i:
            assert leader[i] in like
            assert similarity[i] == jaccard(*sets[i], *sets[leader[i]])
        missed += bool(like) and leader[i] == i
    assert (leader != np.arange(len(texts))).sum() > 50
    assert missed <= 2


def test_recall_by_hand():
    settings = Near()
    index = settings.index()
    assert settings.recall(0.8) == pytest.approx(1 - (1 - 0.8**index.r) ** index.b)
    assert settings.recall(0.8) > 0.95 and settings.recall(1.0) == 1


def test_equal_texts_share_the_leader_of_the_first():
    texts = [sentence(1), sentence(1) + " more", sentence(1) + " MORE", ""]
    words, asked = Words(), []

    def make(i):
        asked.append(i)
        return [shingles(words(texts[i]), 3)]

    keys = [key(text) if text else None for text in texts]
    first, leader, similarity = same_or_near(keys, make, Near())
    assert first.tolist() == [0, 1, 1, 3] and leader.tolist() == [0, 0, 0, 3]
    assert asked == [0, 1]
    assert similarity.tolist() == pytest.approx([1, 38 / 39, 38 / 39, 1])


def test_rows_shared_between_parts():
    """Groups {0, 1, 2} and {3}; parts a, a, b, b: both rows of a share with a and with b, row 2 of b with a alone."""
    assert shared_rows(np.array([0, 0, 0, 3]), np.array([0, 0, 1, 1]), 2).tolist() == [[2, 2], [1, 0]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 0}, "threshold is 0"),
        ({"ngram": 0}, "ngram is 0"),
        ({"permutations": True}, "permutations is True"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(DataError, match=message):
        Near(**options)
