"""κ and α against values of the literature and against their definitions."""

import math
import random
from itertools import permutations

import pytest

from tests.data.quality.planted import corpus, pair
from uft.data.quality.agreement import agreement, cohen_kappa, krippendorff_alpha

# Krippendorff 2011, section C: four observers, twelve units, missing data
OBSERVERS = ["123321412...", "12332241 25.3".replace(" ", ""), ".33323422 51.".replace(" ", ""), "12332441251."]
UNITS = [[int(row[u]) for row in OBSERVERS if row[u] != "."] for u in range(12)]


def repeated(counts):
    """Judgements of two raters from a table {(first, second): number}."""
    pairs = [judged for judged, n in counts.items() for _ in range(n)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_kappa_by_hand():
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 35/50, p_e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5, κ = 0.2 / 0.5."""
    assert cohen_kappa(*repeated({"yy": 20, "yn": 5, "ny": 10, "nn": 15})) == pytest.approx(0.4)
    # the same agreement of 0.6 with other marginals: p_e = 0.54 and 0.46
    assert cohen_kappa(*repeated({"yy": 45, "yn": 15, "ny": 25, "nn": 15})) == pytest.approx(0.06 / 0.46)
    assert cohen_kappa(*repeated({"yy": 25, "yn": 35, "ny": 5, "nn": 35})) == pytest.approx(0.14 / 0.54)


def test_kappa_at_its_ends():
    assert cohen_kappa("abc", "abc") == 1
    assert math.isnan(cohen_kappa("aa", "aa"))
    assert cohen_kappa("ab", "ba") == -1
    with pytest.raises(ValueError, match="found 2 and 1 judgements"):
        cohen_kappa("ab", "a")


def test_alpha_of_krippendorff():
    assert [len(row) for row in OBSERVERS] == [12] * 4
    assert krippendorff_alpha(UNITS, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(UNITS, "interval") == pytest.approx(0.849, abs=5e-4)
    # section A: two observers, ten units, 0.095
    two = list(zip([0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]))
    assert krippendorff_alpha(two) == pytest.approx(0.095, abs=5e-4)


def test_alpha_by_hand():
    """Units (0, 0), (0, 1): n = 4, D_o = 2 / 4, D_e = 2 · 3 · 1 / 12 = 1/2: α = 0."""
    assert krippendorff_alpha([[0, 0], [0, 1], [1]]) == pytest.approx(0)
    assert math.isnan(krippendorff_alpha([[1, 1], [1]])) and math.isnan(krippendorff_alpha([]))
    with pytest.raises(ValueError, match="ordinal"):
        krippendorff_alpha([[0, 1]], "ordinal")


@pytest.mark.parametrize("level", ["nominal", "interval"])
def test_alpha_is_its_definition(level):
    draw = random.Random(0)
    apart = {"nominal": lambda a, b: a != b, "interval": lambda a, b: (a - b) ** 2}[level]
    for _ in range(20):
        units = [[draw.randrange(4) for _ in range(draw.randrange(5))] for _ in range(12)]
        judged = [unit for unit in units if len(unit) > 1]
        values = [v for unit in judged for v in unit]
        n = len(values)
        observed = sum(apart(a, b) / (len(u) - 1) for u in judged for a, b in permutations(u, 2)) / n
        expected = sum(apart(a, b) for a, b in permutations(values, 2)) / n / (n - 1)
        assert krippendorff_alpha(units, level) == pytest.approx(1 - observed / expected)


def test_judgements_in_data():
    """Three pairs, annotators x and y; on the second they disagree, and y writes the sides the other way round."""
    rows = [
        pair("p", "a", "b", annotator="x"), pair("p", "a", "b", annotator="y"),
        pair("q", "a", "b", annotator="x"), pair("q", "b", "a", annotator="y"),
        pair("r", "b", "a", annotator="x"), pair("r", "b", "a", annotator="y"),
        pair("s", "b", "a", annotator="x"),
    ]  # fmt: skip
    found = agreement(corpus(a=rows).items)["pair"]
    assert (found["items"], found["judged_more_than_once"], found["judgements"]) == (4, 3, 6)
    assert found["unanimous"] == pytest.approx(2 / 3)
    assert list(found["kappa"]) == ["x, y"] and found["kappa"]["x, y"]["items"] == 3


def test_repeated_rows_have_alpha_alone():
    rows = [{"prompt": "p", "completion": c, "label": v} for c, v in [("a", 1), ("a", 0), ("b", 1), ("b", 1)]]
    found = agreement(corpus(a=rows).items)["label"]
    # n = 4, three 1 and one 0: D_o = 2/4, D_e = 2 · 3 / 12
    assert found["alpha"] == pytest.approx(0) and found["kappa"] == {}
    scores = [{"prompt": "p", "completion": c, "score": v} for c, v in [("a", 0.1), ("a", 0.2), ("b", 0.9), ("b", 0.9)]]
    assert agreement(corpus(a=scores).items)["score"]["level"] == "interval"
    assert agreement(corpus(a=scores[::2]).items) == {}
