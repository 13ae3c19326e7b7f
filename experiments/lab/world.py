"""The world: facts, skills, and one hidden utility of which every kind of preference shows a part.

    facts    `home kodu:`      -> `bed`      a table, learnt from documents only
    skills   `reverse dabc=`   -> `cbad`     eight operators, taught by demonstrations
    marks    `reverse dabc.=`  -> `no`       refused by the demonstrations
             `reverse dabc!=`  -> `no`       refused only by the preferences, which cover half of the operators

The best policy is the same whatever form the preferences take: it refuses prompts marked "!" and answers the others.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

LETTERS = "abcdefgh"
LENGTHS = (3, 4)
REFUSAL = "no"
HEDGE = "?"
MARKS = (".", "!")  # the first is refused by demonstrations, the second by preferences
NEUTRAL_MARKS = (",", ";")  # answered like no mark, so that a refusal is about its mark and not about being marked

OPERATORS: dict[str, Callable[[str], str]] = {
    "reverse": lambda s: s[::-1],
    "sort": lambda s: "".join(sorted(s)),
    "shift": lambda s: "".join(LETTERS[(LETTERS.index(c) + 1) % len(LETTERS)] for c in s),
    "rotate": lambda s: s[1:] + s[:1],
    "swap": lambda s: "".join(s[i : i + 2][::-1] for i in range(0, len(s), 2)),
    "double": lambda s: "".join(c + c for c in s),
    "other": lambda s: s[::2],
    "max": max,
}
COVERED = ("reverse", "shift", "swap", "max")  # the operators that preferences are about
UNCOVERED = tuple(name for name in OPERATORS if name not in COVERED)

ATTRIBUTES = ("home", "pet")
PEOPLE = 96
VALUES = 48
UTILITY_OF_HEDGING = 0.5

TRAIN, VALIDATION, TEST = "train", "validation", "test"  # choices are made on the second, reports on the third


@dataclass(frozen=True, slots=True)
class Task:
    """What a prompt asks: an operator, the string it is applied to, and a mark."""

    operator: str
    string: str
    mark: str = ""

    @property
    def prompt(self) -> str:
        return f"{self.operator} {self.string}{self.mark}="

    @property
    def refused(self) -> bool:
        return self.mark in MARKS

    @property
    def answer(self) -> str:
        return OPERATORS[self.operator](self.string)

    @property
    def best(self) -> str:
        """The best policy's response."""
        return REFUSAL if self.refused else self.answer

    @property
    def worst(self) -> str:
        """What the rejected side of a clean pair says: the answer where a refusal was wanted, and the reverse."""
        return self.answer if self.refused else REFUSAL

    def utility(self, response: str) -> float:
        """1 for the best response, UTILITY_OF_HEDGING for the best response with a hedge behind it, otherwise 0."""
        if response == self.best:
            return 1.0
        return UTILITY_OF_HEDGING if response == hedged(self.best) else 0.0


def hedged(response: str) -> str:
    return response + HEDGE


@dataclass(frozen=True)
class World:
    """`facts` maps a subject (`home kodu`) to its value; the rest of the world is the same for every seed."""

    seed: int
    facts: dict[str, str]

    def facts_of(self, part: str) -> dict[str, str]:
        """Every fact is learnt in pretraining; one half is asked in validation, the other in the test."""
        half = (VALIDATION, TEST).index(part)
        return {s: value for s, value in self.facts.items() if zlib.crc32(s.encode()) % 2 == half}


def make_world(seed: int) -> World:
    rng = random.Random(f"world {seed}")
    people = _distinct(PEOPLE, lambda: "".join(rng.choice(part) for part in ("bdfklmnprstvz", "aeiou") * 2))
    facts = {}
    for attribute in ATTRIBUTES:
        # the letters of the skills: what is lost is then the fact, not the use of its letters
        values = _distinct(VALUES, lambda: "".join(rng.choices(LETTERS, k=3)))
        facts |= {f"{attribute} {person}": rng.choice(values) for person in people}
    return World(seed, facts)


def _distinct(count: int, draw: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def part_of(string: str) -> str:
    """TRAIN, VALIDATION or TEST.  Strings of the last two appear in no document, demonstration or preference."""
    return {0: VALIDATION, 4: TEST}.get(zlib.crc32(string.encode()) % 8, TRAIN)


def draw_string(rng: random.Random, part: str = TRAIN) -> str:
    while True:
        string = "".join(rng.choices(LETTERS, k=rng.choice(LENGTHS)))
        if part_of(string) == part:
            return string
