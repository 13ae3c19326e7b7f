"""Evaluation prompts in training data: word n-grams they share, and near copies.

As in GPT-3 (Brown et al. 2020, arXiv:2005.14165, Appendix C): words without punctuation and case, N = 13.  An n-gram
that stands in more than `max_documents` = 10 training documents is a template and no copy.  What differs from there:

- Documents are different training prompts, since one prompt may have many responses; n-grams in more than
  `max_documents` evaluation prompts with different words are templates too.
- An evaluation prompt of 8 to 12 words is looked for as a whole (GPT-3 takes one N per evaluation set, at least 8); a
  shorter one counts only where it is a training prompt, word for word.
- An evaluation prompt that a row holds whole is found however many rows hold it: where all its n-grams are templates
  it is counted apart, since it may be a template itself or a copy that was made often.
- A row is hit, and not cut around the place.

In scripts without spaces a letter is a word (`uft.data.quality.items.Words`), so that 13 of them are a short clause.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from uft.data.quality.corpus import Corpus
from uft.data.quality.duplicates import Leaders, Near, minhashes
from uft.data.quality.items import flat_words, key, ngrams, only_words, shingles
from uft.data.rows import DataError

SHORTEST = 8  # words; GPT-3's least N, below which n-grams coincide by chance
BLOCK = 2048  # rows whose n-grams are looked up at once


@dataclass(frozen=True)
class Overlap:
    """When a training row holds an evaluation prompt: n-grams of `ngram` words in common, or prompts that are near."""

    ngram: int = 13
    max_documents: int = 10
    near: Near = field(default_factory=Near)

    def __post_init__(self):
        for name, least in (("ngram", SHORTEST), ("max_documents", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise DataError(f"{name} is {value!r}; want a whole number from {least} on")


class Hits(NamedTuple):
    """Which row holds which evaluation prompt: positions of both in what was handed in, int64 [hits] each, sorted."""

    row: np.ndarray
    prompt: np.ndarray

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> Hits:
        found = np.array(sorted(set(pairs)), dtype=np.int64).reshape(-1, 2)
        return cls(found[:, 0], found[:, 1])

    def first(self) -> dict[int, int]:
        """The first evaluation prompt of each row that has one."""
        return dict(zip(self.row[::-1].tolist(), self.prompt[::-1].tolist()))


@dataclass(frozen=True)
class Found:
    """exact, near: the row's prompt, or a user's turn in it, is an evaluation prompt, or is like one.  ngram: words in
    a row that a text of the row shares with one.  whole: all n-grams of one are in the row, and all are templates.
    templates: n-grams that were ignored, since too many prompts have them."""

    exact: Hits
    near: Hits
    ngram: Hits
    whole: Hits
    templates: int

    @property
    def ways(self) -> dict[str, Hits]:
        return {"exact": self.exact, "near": self.near, "ngram": self.ngram, "whole": self.whole}


def look_for(evaluation: Sequence[str], corpus: Corpus, rows: Sequence[int], settings: Overlap) -> Found:
    """Looks for evaluation prompts in these rows of the corpus (hits count within `rows`): in prompts and user turns,
    and in all texts of a row, of which no n-gram runs from one into the next."""
    items = [corpus.items[i] for i in rows]
    eval_words = [corpus.words(text) for text in evaluation]
    row_words = [[*corpus.row_words[i], *corpus.later_words(i)] for i in rows]
    asked = [(k, text) for k, item in enumerate(items) for text in (item.prompt, *item.asked)]
    # those of prompts are there already
    asked_words = [
        words for k, texts in enumerate(row_words) for words in (texts[0], *map(corpus.words, items[k].asked))
    ]
    ngram, whole, templates = _by_ngrams(eval_words, [item.prompt for item in items], row_words, settings)
    near = _near(eval_words, [k for k, _ in asked], asked_words, settings.near)
    return Found(_exact(evaluation, asked), near, ngram, whole, templates)


def _exact(evaluation: Sequence[str], asked: Sequence[tuple[int, str]]) -> Hits:
    wanted: dict[bytes, list[int]] = {}
    for j, text in enumerate(evaluation):
        wanted.setdefault(key(text), []).append(j)
    return Hits.of((i, j) for i, text in asked for j in wanted.get(key(text), ()))


def _by_ngrams(eval_words, prompts, row_words, settings) -> tuple[Hits, Hits, int]:
    grams, owners, sizes = _grams_of(eval_words, settings.ngram)
    if not len(grams) or not len(prompts):
        return Hits.of(()), Hits.of(()), 0
    rows, found = _occurrences(row_words, grams, sizes)
    keys: dict[bytes, int] = {}
    document_of = [
        keys.setdefault(key(text) if text.strip() else b"%d" % i, len(keys)) for i, text in enumerate(prompts)
    ]
    documents = np.array(document_of, dtype=np.int64)[rows]
    # a gram counts once per document, and once per evaluation prompt
    in_training = np.unique(np.stack([found, documents]), axis=1)[0]
    in_documents = np.bincount(in_training, minlength=len(grams))
    in_evaluation = np.array([len(each) for each in owners])
    template = (in_documents > settings.max_documents) | (in_evaluation > settings.max_documents)
    meant = ~template[found]
    hits = Hits.of((i, j) for i, g in zip(rows[meant].tolist(), found[meant].tolist()) for j in owners[g])
    return hits, _whole(rows, found, owners, template), int((template & (in_documents > 0)).sum())


def _whole(rows: np.ndarray, found: np.ndarray, owners: Sequence[Sequence[int]], template: np.ndarray) -> Hits:
    """Rows (at n-gram `found`) that hold every n-gram of an evaluation prompt all of whose n-grams are templates."""
    grams_of: dict[int, list[int]] = {}
    for g, having in enumerate(owners):
        for j in having:
            grams_of.setdefault(j, []).append(g)
    order = np.argsort(found, kind="stable")  # rows stay in order within an n-gram
    ends = np.searchsorted(found[order], np.arange(len(owners) + 1))
    pairs = []
    for j, grams in grams_of.items():
        if not template[grams].all():
            continue
        # the rarest first: hardly any row is left then
        grams = sorted(grams, key=lambda g: ends[g + 1] - ends[g])
        left = rows[order[ends[grams[0]] : ends[grams[0] + 1]]]
        for g in grams[1:]:
            if not len(left):
                break
            left = np.intersect1d(left, rows[order[ends[g] : ends[g + 1]]], assume_unique=True)
        pairs += [(i, j) for i in left.tolist()]
    return Hits.of(pairs)


def _occurrences(row_words, grams: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and positions of n-grams, one of each for every n-gram of the evaluation prompts that a row has."""
    rows, found = [], []
    starts = range(0, len(row_words), BLOCK)
    for start in tqdm(starts, "n-grams", unit=f" × {BLOCK} rows", disable=None, delay=1, leave=False):
        block = row_words[start : start + BLOCK]
        flat, text_of = flat_words([text for texts in block for text in texts])
        row_of = np.repeat(np.arange(start, start + len(block)), [len(texts) for texts in block])
        for size in sizes:
            at, positions = _positions(grams, ngrams(flat, size))
            rows.append(row_of[text_of[at]])
            found.append(positions)
    pairs = np.unique(np.stack([np.concatenate(rows), np.concatenate(found)]), axis=1)
    return pairs[0], pairs[1]


def _grams_of(eval_words: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, list[list[int]], list[int]]:
    """Sorted n-grams, the different evaluation prompts that have each, and the sizes that occur."""
    owners: dict[int, list[int]] = {}
    sizes, seen = set(), set()
    for j, hashes in enumerate(eval_words):
        bare = only_words(hashes)
        n = min(size, len(bare))
        # the same words once more are found with the first
        if n < SHORTEST or bare.tobytes() in seen:
            continue
        seen.add(bare.tobytes())
        sizes.add(n)
        for gram in np.unique(ngrams(bare, n)).tolist():
            owners.setdefault(gram, []).append(j)
    ordered = sorted(owners)
    return np.array(ordered, np.uint64), [owners[gram] for gram in ordered], sorted(sizes)


def _positions(ordered: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the values are in `ordered`, and where there."""
    at = np.searchsorted(ordered, values)
    at[at == len(ordered)] = 0
    there = np.flatnonzero(ordered[at] == values)
    return there, at[there]


def _near(
    eval_words: Sequence[np.ndarray], row_of: Sequence[int], prompt_words: Sequence[np.ndarray], settings: Near
) -> Hits:
    index = Leaders(settings)
    texts = [[shingles(hashes, settings.ngram)] for hashes in eval_words]
    for j, found in enumerate(minhashes(texts, settings.permutations, "MinHash of evaluation prompts")):
        if len(texts[j][0]):
            index.add(j, found, texts[j])
    rows_of: dict[bytes, list[int]] = {}
    for i, hashes in zip(row_of, prompt_words):
        if len(hashes):
            rows_of.setdefault(hashes.tobytes(), []).append(i)
    groups = list(rows_of.values())
    texts = [[shingles(np.frombuffer(hashes, np.uint64), settings.ngram)] for hashes in rows_of]
    found = minhashes(texts, settings.permutations, "MinHash against evaluation")
    like = [index.all_like(each, text) for each, text in zip(found, texts)]
    return Hits.of((i, j) for rows, prompts in zip(groups, like) for i in rows for j in prompts)
