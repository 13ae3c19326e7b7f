"""κ and α against values of the literature and against their definitions."""

import math
import random
from itertools import permutations

import pytest

from tests.data.quality.planted import corpus, pair
from uft.data.quality.agreement import agreement, cohen_kappa, krippendorff_alpha
from uft.data.quality.markdown import _kappas, markdown
from uft.data.quality.measure import ALL, measure
from uft.data.sources import Source

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


def test_the_first_of_ones_own_judgements_counts():
    """x judges p three times: with y there is one agreement, and x's own say nothing."""
    rows = [pair("p", "a", "b", annotator="x")] * 2 + [pair("p", "b", "a", annotator="x")]
    assert agreement(corpus(a=rows).items) == {}
    more = [
        pair("p", "a", "b", annotator="y"), pair("q", "a", "b", annotator="y"), pair("q", "b", "a", annotator="x"),
        pair("q", "a", "b", annotator=" "), pair("q", "a", "b", annotator=None),
    ]  # fmt: skip
    found = agreement(corpus(a=rows + more).items)["pair"]
    # those without a name count each
    assert (found["judgements"], found["own_repeats"], found["unanimous"]) == (6, 2, 0.5)
    assert found["kappa"]["x, y"]["items"] == 2 and list(found["kappa"]) == ["x, y"]


def test_a_file_per_annotator():
    """The four judgements of test_alpha_by_hand, in two files."""
    files = {
        who: [pair(p, *sides, annotator=who) for p, sides in zip("pq", said)]
        for who, said in {"x": ("ab", "ab"), "y": ("ab", "ba")}.items()
    }
    found = measure([Source(name=name, data=rows) for name, rows in files.items()])
    assert list(found["agreement"]) == [ALL]
    assert found["agreement"][ALL]["pair"]["kappa"]["x, y"]["items"] == 2
    assert found["agreement"][ALL]["pair"]["alpha"] == pytest.approx(0)
    assert f"{ALL}, pair" in markdown(found)
    assert ALL not in measure([Source(name="x", data=files["x"])])["agreement"]


def test_of_many_pairs_of_annotators_the_ends_are_shown():
    draw = random.Random(0)
    rows = [
        {"prompt": f"p{i}", "completion": "c", "label": draw.randrange(2), "annotator": f"a{k:02}"}
        for i in range(12) for k in range(12)
    ]  # fmt: skip
    found = measure([Source(name="s", data=rows)])
    kappas = found["agreement"]["s"]["label"]["kappa"]
    assert len(kappas) == 66
    lines = [line for line in markdown(found).splitlines() if line.startswith("| s, label: ")]
    values = sorted(each["kappa"] for each in kappas.values())
    shown = [float(line.split("|")[3]) for line in lines]
    assert shown == pytest.approx([*values[:3], (values[32] + values[33]) / 2, *values[-3:]], rel=0.01, abs=0.001)
    assert "median of 66 of 66 pairs" in lines[3]
    # few are shown all
    assert len(_kappas("s", dict(list(kappas.items())[:7]))) == 7


def test_repeated_rows_have_alpha_alone():
    rows = [{"prompt": "p", "completion": c, "label": v} for c, v in [("a", 1), ("a", 0), ("b", 1), ("b", 1)]]
    found = agreement(corpus(a=rows).items)["label"]
    # n = 4, three 1 and one 0: D_o = 2/4, D_e = 2 · 3 / 12
    assert found["alpha"] == pytest.approx(0) and found["kappa"] == {}
    scores = [{"prompt": "p", "completion": c, "score": v} for c, v in [("a", 0.1), ("a", 0.2), ("b", 0.9), ("b", 0.9)]]
    assert agreement(corpus(a=scores).items)["score"]["level"] == "interval"
    assert agreement(corpus(a=scores[::2]).items) == {}
