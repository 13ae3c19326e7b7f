"""Contrasts by hand."""

import math
from types import SimpleNamespace

import pytest

from experiments.contrasts import adjusted, best_of, contrast, described, named

ARMS = {
    name: SimpleNamespace(family=family)
    for name, family in {"j": "unified", "k": "unified", "s": "sequential", "sft_chosen": "control"}.items()
}


def test_a_contrast_by_hand():
    a, b = {0: 1.0, 1: 2.0, 2: 3.0, 9: 7.0}, {0: 0.5, 1: 1.0, 2: 1.5}
    found = contrast("a", "b", a, b)  # differences 0.5, 1, 1.5 on the seeds that both have
    assert found.difference.mean == pytest.approx(1.0) and found.difference.n == 3
    assert found.effect == pytest.approx(2.0) and found.interquartile == pytest.approx(1.0)
    assert found.p == found.p_holm == 2 / 8
    assert math.isnan(contrast("a", "b", {0: 1.0}, {0: 0.5}).p)


def test_ten_seeds_can_speak_and_three_cannot():
    ten = contrast("a", "b", {s: 0.1 for s in range(10)}, {s: 0.0 for s in range(10)})
    assert ten.p == 2 / 2**10
    assert contrast("a", "b", {s: 0.1 for s in range(3)}, {s: 0.0 for s in range(3)}).p == 0.25


def test_holm_over_all_of_a_report():
    strong = contrast("a", "b", {s: 0.1 for s in range(10)}, {s: 0.0 for s in range(10)})
    weak = contrast("a", "c", {s: float(s - 1) for s in range(10)}, {s: 0.0 for s in range(10)})
    alone = contrast("a", "d", {0: 1.0}, {0: 0.0})
    found = adjusted([weak, strong, alone])
    assert found[1].p_holm == pytest.approx(2 * strong.p) and found[0].p_holm == pytest.approx(weak.p)
    assert math.isnan(found[2].p_holm)


def test_the_best_is_that_of_the_search():
    chosen = {"j": {"score": 0.7}, "k": {"score": 0.8}, "s": {"score": 0.9}, "sft_chosen": {"score": 1.0}}
    assert named(ARMS, chosen, list(ARMS)) == [("k", "s"), ("k", "sft_chosen")]
    assert named(ARMS, chosen, ["j", "sft_chosen"]) == [("j", "sft_chosen")]
    assert named(ARMS, chosen, ["s", "sft_chosen"]) == []
    assert best_of("sequential", ARMS, {}, list(ARMS)) is None


def test_what_is_described():
    found = described([1.0, 2.0, 3.0, 100.0])
    assert found["mean"] == 26.5 and found["interquartile_mean"] == 2.5 and found["n"] == 4
