"""Planted contradictions and cycles of preferences."""

import random

from tests.data.quality.planted import corpus, pair
from uft.data.quality.graph import Conflicts, conflicts, label_conflicts, preferences_of


def conflicts_of(*judgements, prompt="p"):
    return conflicts(preferences_of(corpus(a=[pair(prompt, a, b) for a, b in judgements]).items))


def test_a_contradiction():
    found = conflicts_of("ab", "bc", "BA", "ab")
    assert found.contradictions == [[0, 2, 3]]
    assert found.cycles == []


def test_a_cycle_and_what_hangs_on_it():
    found = conflicts_of("ab", "bc", "ca", "cd", "xa")
    assert found.contradictions == [] and found.cycles == [[0, 1, 2]]
    assert sorted(found.shortest[0]) == [0, 1, 2]


def test_two_contradictions_in_a_row_are_no_cycle():
    """a and b, b and c judged both ways: one strongly connected component without a cycle of three."""
    found = conflicts_of("ab", "ba", "bc", "cb")
    assert len(found.contradictions) == 2 and found.cycles == []


def test_the_shortest_of_several_cycles():
    found = conflicts_of("ab", "bc", "cd", "de", "ea", "ca")
    assert found.cycles == [[0, 1, 2, 3, 4, 5]]
    assert sorted(found.shortest[0]) == [0, 1, 5]


def test_prompts_and_sources():
    rows = corpus(a=[pair("p", "a", "b"), pair("q", "b", "a")], b=[pair("P ", "B", "a")])
    assert conflicts(preferences_of(rows.items)).contradictions == [[0, 2]]


def test_an_order_has_no_conflict_and_a_turned_edge_has():
    draw = random.Random(1)
    for _ in range(20):
        names = [chr(97 + i) for i in range(8)]
        edges = {(names[i], names[j]) for i in range(7) for j in [i + 1, draw.randrange(i + 1, 8)]}
        edges = sorted(edges)
        draw.shuffle(edges)
        assert conflicts_of(*edges) == Conflicts([], [], [])
        found = conflicts_of(*edges, ("h", "a"))  # a > b > ... > h is there, so this closes a cycle, or contradicts
        assert found.cycles or found.contradictions


def test_labels_that_contradict():
    rows = [
        {"prompt": "p", "completion": c, "label": v} for c, v in [("a", True), ("b", False), ("A ", False), ("b", 0)]
    ]
    assert label_conflicts(corpus(a=rows).items) == [[0, 2]]
