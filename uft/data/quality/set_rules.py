"""Rules of `uft data filter` that look at rows beside each other, or beside evaluation files.  As in
`uft.data.quality.row_rules`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uft.data.quality.contamination import Overlap, look_for
from uft.data.quality.duplicates import Near, same, same_or_near
from uft.data.quality.graph import conflicts, label_conflicts, preferences_of
from uft.data.quality.items import Item
from uft.data.quality.row_rules import Context, Dropped, want
from uft.data.rows import DataError

OF = ("row", "prompt")


@dataclass(frozen=True)
class Contamination(Overlap):
    """Rows that hold a prompt of the evaluation files; see `uft.data.quality.contamination`."""

    def __call__(self, left: Sequence[int], context: Context) -> Dropped:
        corpus, asked = context.corpus, context.evaluation
        if asked is None:
            raise DataError("contamination needs evaluation files; want `eval_dataset` with their names and paths")
        found = look_for(asked.texts, corpus, left, self)
        first = {way: hits.first() for way, hits in found.ways.items()}
        names = {
            "exact": "the prompt is", "near": "the prompt is near", "ngram": f"{self.ngram}-gram of",
            "whole": "holds, as many prompts do, the whole of",
        }  # fmt: skip
        for k, i in enumerate(left):
            way = next((way for way in first if k in first[way]), None)
            if way is not None:
                yield i, f"{names[way]} {asked.place(first[way][k])}"


@dataclass(frozen=True)
class Contradictions:
    """Pairs that are judged both ways, and responses that are labelled both ways: all rows of them."""

    def __call__(self, left: Sequence[int], context: Context) -> Dropped:
        items = [context.corpus.items[i] for i in left]
        groups = conflicts(preferences_of(items)).contradictions + label_conflicts(items)
        yield from _with_another(groups, items, left)


@dataclass(frozen=True)
class Cycles:
    """Pairs on a cycle of preferences a > b > c > a: all rows of them."""

    def __call__(self, left: Sequence[int], context: Context) -> Dropped:
        items = [context.corpus.items[i] for i in left]
        yield from _with_another(conflicts(preferences_of(items)).cycles, items, left)


def _with_another(groups: Sequence[Sequence[int]], items: Sequence[Item], left: Sequence[int]) -> Dropped:
    for group in groups:
        for k in group:
            other = items[next(j for j in group if j != k)]
            yield left[k], f"{len(group)} rows, with {other.group} row {other.row}"


@dataclass(frozen=True)
class ExactDuplicates:
    """Rows (`of: row`: prompt and all responses; `of: prompt`) that are an earlier one of the same kind after
    normalisation, in any source.  The first stays."""

    of: str = "row"

    def __post_init__(self):
        want(self.of in OF, "of", self.of, " or ".join(OF))

    def __call__(self, left: Sequence[int], context: Context) -> Dropped:
        items = [context.corpus.items[i] for i in left]
        yield from _repeats(same(_keys(items, self.of)), items, left, "the same as")


@dataclass(frozen=True)
class NearDuplicates(Near):
    """Rows (or prompts) near an earlier one of the same kind, in any source.  The first stays."""

    of: str = "row"

    def __post_init__(self):
        super().__post_init__()
        want(self.of in OF, "of", self.of, " or ".join(OF))

    def __call__(self, left: Sequence[int], context: Context) -> Dropped:
        corpus = context.corpus
        for kind in dict.fromkeys(corpus.items[i].kind for i in left):
            mine = [i for i in left if corpus.items[i].kind == kind]
            items = [corpus.items[i] for i in mine]
            make = corpus.row_parts if self.of == "row" else corpus.prompt_parts
            parts = lambda k, mine=mine, make=make: make(mine[k], self.ngram)
            _, leader, similarity = same_or_near(_keys(items, self.of), parts, self, f"near {kind}s")
            yield from _repeats(leader, items, mine, "like", similarity)


def _keys(items: Sequence[Item], of: str) -> list[Any]:
    keys = [item.row_key if of == "row" else item.prompt_key for item in items]
    return [None if key is None else (item.kind, key) for item, key in zip(items, keys)]


def _repeats(leader, items: Sequence[Item], left: Sequence[int], how: str, similarity=None) -> Dropped:
    for k, first in enumerate(leader.tolist()):
        if first != k:
            near = "" if similarity is None else f" (similarity {similarity[k]:.2f})"
            yield left[k], f"{how} {items[first].group} row {items[first].row}{near}"
