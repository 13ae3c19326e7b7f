"""Exact and near duplicates: which earlier text each text repeats.

Texts have parts: of a prompt itself alone, of a row its prompt and each of its responses.  Two are near duplicates if
of every part at least a given share of the word n-grams is common to both (Jaccard similarity |A ∩ B| / |A ∪ B|): a
long prompt in common does not make different answers alike, and a pair with its sides exchanged is another pair.

MinHash with locality-sensitive hashing (Broder 1997; datasketch) over all parts together finds candidates.  Where every
part has a similarity of s, so have all together, for (Σ a) / (Σ b) >= min a / b.  Candidates are then compared exactly,
part by part, so nothing is called a duplicate that is none.  What is missed: `recall` says how likely one is found.

Groups have a leader, the first of them; a text belongs to the first leader it resembles.  Only leaders are compared
with, so that a chain of small changes does not make one group of texts that have little in common.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

from uft.data.rows import DataError, is_number

Parts = Sequence[np.ndarray]  # of each part the sorted hashes of its n-grams

# a candidate costs a comparison, what is no candidate is lost
WEIGHTS = (0.02, 0.98)


@cache
def _bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Number of bands and rows of each that lose the fewest pairs; their search takes longer than an index."""
    found = MinHashLSH(threshold=threshold, num_perm=permutations, weights=WEIGHTS)
    return found.b, found.r


@dataclass(frozen=True)
class Near:
    """When two texts are near duplicates: word n-grams of every part with a Jaccard similarity of at least "
    "`threshold`."""

    threshold: float = 0.8
    ngram: int = 3
    permutations: int = 128

    def __post_init__(self):
        if not (is_number(self.threshold) and 0 < self.threshold <= 1):
            raise DataError(f"threshold is {self.threshold!r}; want a similarity, 0 < threshold <= 1")
        for name, least in (("ngram", 1), ("permutations", 16)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise DataError(f"{name} is {value!r}; want a whole number from {least} on")

        try:
            self.index()
        except ValueError as error:
            raise DataError(
                f"threshold is {self.threshold} and permutations is {self.permutations}, with which candidates cannot "
                f"be found ({error}); want a lower threshold or more permutations"
            ) from None

    def index(self) -> MinHashLSH:
        return MinHashLSH(num_perm=self.permutations, params=_bands(self.threshold, self.permutations))

    def recall(self, similarity: float) -> float:
        """Probability that two texts of this similarity become candidates: 1 − (1 − s^r)^b, b bands of r rows."""
        index = self.index()
        return 1 - (1 - similarity**index.r) ** index.b


def same(keys: Sequence[Hashable | None]) -> np.ndarray:
    """int64 [n]: the position of the first equal key; its own where there is none before, or where the key is None."""
    first: dict[Hashable, int] = {}
    return np.fromiter((i if k is None else first.setdefault(k, i) for i, k in enumerate(keys)), np.int64, len(keys))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted arrays without repetitions; 0 where one is empty."""
    if not len(a) or not len(b):
        return 0.0
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def similarity(a: Parts, b: Parts, threshold: float = 0.0) -> float:
    """The least Jaccard similarity of any part, parts that both lack left out; 0 where it is below the threshold, where
    all are empty, or where the numbers of parts differ."""
    both = [(x, y) for x, y in zip(a, b) if len(x) or len(y)]
    if len(a) != len(b) or not both:
        return 0.0
    least = 1.0
    for x, y in sorted(both, key=lambda two: len(two[0])):
        # similarity is at most the ratio of sizes
        if min(len(x), len(y)) < threshold * max(len(x), len(y)):
            return 0.0
        least = min(least, jaccard(x, y))
        if least < threshold:
            return 0.0
    return least


_SIDES = np.random.default_rng(2153).integers(0, 2**32, 64, dtype=np.uint64)


def minhashes(texts: Sequence[Parts], permutations: int, title: str = "MinHash") -> Iterator[MinHash]:
    """A MinHash of each text, one after the other; the same words in another part are other words."""
    bar = tqdm(texts, title, unit=" texts", disable=None, delay=1, leave=False)
    # the sets hold 64-bit hashes already, of which MinHash wants 32
    hashes = (
        [h for k, part in enumerate(parts) for h in ((part >> np.uint64(32)) ^ _SIDES[k % 64]).tolist()]
        for parts in bar
    )
    return MinHash.generator(hashes, num_perm=permutations, hashfunc=int)


class Leaders:
    """An index of texts that answers which of them a text resembles."""

    def __init__(self, near: Near):
        self.near, self._index, self._texts = near, near.index(), {}

    def add(self, position: int, found: MinHash, text: Parts) -> None:
        self._index.insert(position, found)
        self._texts[position] = text

    def first_like(self, found: MinHash, text: Parts) -> tuple[int, float] | None:
        """The first text that was added and is near, with its similarity."""
        return next(self._like(found, text), None)

    def all_like(self, found: MinHash, text: Parts) -> list[int]:
        return [position for position, _ in self._like(found, text)]

    def _like(self, found: MinHash, text: Parts) -> Iterator[tuple[int, float]]:
        for position in sorted(self._index.query(found)):
            alike = similarity(text, self._texts[position], self.near.threshold)
            if alike >= self.near.threshold:
                yield position, alike


def near(texts: Sequence[Parts], settings: Near, title: str = "near duplicates") -> tuple[np.ndarray, np.ndarray]:
    """int64 [n], the leader of each text (its own position if it is one), and float64 [n], its similarity to it.

    Texts without a word resemble nothing.
    """
    leader, alike = np.arange(len(texts)), np.ones(len(texts))
    leaders = Leaders(settings)
    for i, found in enumerate(minhashes(texts, settings.permutations, title)):
        if not any(map(len, texts[i])):
            continue
        like = leaders.first_like(found, texts[i])
        if like is None:
            leaders.add(i, found, texts[i])
        else:
            leader[i], alike[i] = like
    return leader, alike


def same_or_near(
    keys: Sequence[Hashable | None],
    make_parts: Callable[[int], Parts],
    settings: Near,
    title: str = "near duplicates",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First equal text, leader (int64 [n] each) and similarity to the leader; `make_parts(i)` gives the n-grams of text
    i, and is asked for one of several equal texts only."""
    first = same(keys)
    unique = np.array([i for i, k in enumerate(keys) if first[i] == i and k is not None], dtype=np.int64)
    found, alike_of = near([make_parts(i) for i in unique.tolist()], settings, title)
    leader, alike = np.arange(len(keys)), np.ones(len(keys))
    leader[unique], alike[unique] = unique[found], alike_of
    return first, leader[first], alike[first]


def shared_rows(leader: np.ndarray, parts: np.ndarray, count: int) -> np.ndarray:
    """int64 [count, count]: rows of part a (`parts` [n]) in whose group there is another row, of part b."""
    size = int(leader.max(initial=-1)) + 1
    members = np.zeros((size, count), np.int64)
    np.add.at(members, (leader, parts), 1)
    others = members[leader]  # [n, count]
    others[np.arange(len(parts)), parts] -= 1
    shared = np.zeros((count, count), np.int64)
    np.add.at(shared, parts, others > 0)
    return shared
