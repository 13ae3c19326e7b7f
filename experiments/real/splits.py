"""Held out by what a row is about, not by its wording.

The same passage or question stands in up to a dozen templates, and politeness pairs repeat the prompts of
demonstrations.  Rows with the same key (a prompt, or how a dialogue begins), with the same answer of at least three
words, or with a run of six words in common form a group, and the hash of the group says whether it trains, validates
or tests.  A run counts only if no three words of it stand in many rows: those belong to a template.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

RUN, SHORT_RUN, MANY, LONG_ANSWER = 6, 3, 40, 3
PARTS = ("train", "validation", "test")
# of 20 buckets: two validate, four test
BUCKETS = ("validation",) * 2 + ("test",) * 4 + ("train",) * 14


def split(keys: Sequence[str], prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """train, validation or test for each row.  An empty prompt or answer ties its row to no other."""
    return [BUCKETS[_number(name) % len(BUCKETS)] for name in groups(keys, prompts, answers)]


def groups(keys: Sequence[str], prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """For each row the name of its group: the smallest key in it."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for rows in _together(keys, prompts, answers):
        for i in rows[1:]:
            parent[root(i)] = root(rows[0])
    names: dict[int, str] = {}
    for i, key in enumerate(keys):
        names[root(i)] = min(key, names.get(root(i), key))
    return [names[root(i)] for i in range(len(keys))]


def _together(keys: Sequence[str], prompts: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
    texts = [[_words(prompt), _words(answer)] for prompt, answer in zip(prompts, answers)]
    common = Counter(run for both in texts for run in {run for text in both for run in _runs(text, SHORT_RUN)})
    together: dict[tuple, list[int]] = defaultdict(list)
    for i, both in enumerate(texts):
        together["key", keys[i]].append(i)
        if len(both[1]) >= LONG_ANSWER:
            together["answer", *both[1]].append(i)
        for run in {run for text in both for run in _runs(text, RUN)}:
            if all(common[short] <= MANY for short in _runs(run, SHORT_RUN)):
                together["run", *run].append(i)
    return [rows for rows in together.values() if len(rows) > 1]


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _runs(words: tuple[str, ...], n: int) -> list[tuple[str, ...]]:
    return [words[k : k + n] for k in range(len(words) - n + 1)]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
