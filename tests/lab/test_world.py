"""The world itself: operators by hand, the split of strings, and who is right."""

import random

import pytest

from experiments.lab.world import (
    COVERED,
    OPERATORS,
    REFUSAL,
    TEST,
    TRAIN,
    UNCOVERED,
    VALIDATION,
    Task,
    draw_string,
    make_world,
    part_of,
)


@pytest.mark.parametrize(
    "operator, four, three",
    [
        ("reverse", "hbad", "bah"),
        ("sort", "abdh", "abh"),
        ("shift", "ebca", "abc"),
        ("rotate", "abhd", "abh"),
        ("swap", "adhb", "ahb"),
        ("double", "ddaabbhh", "hhaabb"),
        ("other", "db", "hb"),
        ("max", "h", "h"),
    ],
)
def test_operators_by_hand(operator, four, three):
    assert Task(operator, "dabh").answer == four
    assert Task(operator, "hab").answer == three


def test_marks_decide_what_is_best():
    plain, neutral, dotted, marked = (Task("reverse", "abc", mark) for mark in ("", ",", ".", "!"))
    assert [t.prompt for t in (plain, neutral, dotted, marked)] == [
        "reverse abc=",
        "reverse abc,=",
        "reverse abc.=",
        "reverse abc!=",
    ]
    assert [t.best for t in (plain, neutral, dotted, marked)] == ["cba", "cba", REFUSAL, REFUSAL]
    assert [t.worst for t in (plain, marked)] == [REFUSAL, "cba"]


def test_utility_by_hand():
    plain, marked = Task("reverse", "abc"), Task("reverse", "abc", "!")
    responses = ["cba", "cba?", "no", "no?", "cb", "", "cba??"]
    assert [plain.utility(r) for r in responses] == [1, 0.5, 0, 0, 0, 0, 0]
    assert [marked.utility(r) for r in responses] == [0, 0, 1, 0.5, 0, 0, 0]


def test_refusal_is_never_an_answer():
    rng = random.Random(0)
    assert all(f(draw_string(rng)) != REFUSAL for f in OPERATORS.values() for _ in range(200))


def test_half_of_the_operators_are_covered():
    assert len(COVERED) == len(UNCOVERED) == 4
    assert {*COVERED, *UNCOVERED} == set(OPERATORS)


def test_strings_are_split():
    rng = random.Random(0)
    drawn = {part: {draw_string(rng, part) for _ in range(5000)} for part in (TRAIN, VALIDATION, TEST)}
    assert sum(map(len, drawn.values())) == len(set.union(*drawn.values()))
    assert all({part_of(string) for string in strings} == {part} for part, strings in drawn.items())
    assert len(drawn[VALIDATION]) > 400 < len(drawn[TEST])


def test_every_fact_is_asked_in_one_part():
    world = make_world(0)
    validation, test = world.facts_of(VALIDATION), world.facts_of(TEST)
    assert validation | test == world.facts and not set(validation) & set(test)
    assert 80 < len(validation) < 112


def test_a_world_is_its_seed():
    assert make_world(3) == make_world(3)
    assert make_world(3).facts != make_world(4).facts
    facts = make_world(0).facts
    assert len(facts) == 192 and len(set(facts.values())) > 60
