"""Lists of terms, and which responses hold one of them: groups of people, unsafe content.

A file has a line per group, `name: term, term, ...`; `#` begins a comment line.  Terms are matched as whole words
without case; a term of several words is matched with its words in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from uft.data.quality.bias import share
from uft.data.quality.items import Words, flat_words, only_words
from uft.data.rows import DataError, shown

TERMS = Path(__file__).with_name("terms.txt")
UNSAFE = Path(__file__).with_name("unsafe.txt")


def read_terms(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Terms by group.  Raises `DataError` for a file or line that cannot be used."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of terms: {error}") from None
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        group, colon, rest = line.partition(":")
        terms = tuple(dict.fromkeys(term.strip() for term in rest.split(",") if term.strip()))
        if not colon or not group.strip() or not terms:
            raise DataError(f"{path}, line {number}: found {shown(line)}; want `group: term, term`")
        if group.strip() in found:
            raise DataError(f"{path}, line {number}: group {group.strip()!r} stands twice; want one line for each")
        found[group.strip()] = terms
    if not found:
        raise DataError(f"{path}: found no terms; want lines `group: term, term`")
    return found


class Matcher:
    """Finds the groups of which a text holds a term, and the first such term."""

    def __init__(self, groups: Mapping[str, Sequence[str]], words: Words):
        self.groups = tuple(groups)
        # by the first word of each term
        self._terms: dict[int, list[tuple[int, str, np.ndarray]]] = {}
        for g, terms in enumerate(groups.values()):
            for term in terms:
                hashes = only_words(words(term))
                if not len(hashes):
                    raise DataError(f"term {term!r} of group {self.groups[g]!r}: found no word; want one at least")
                self._terms.setdefault(int(hashes[0]), []).append((g, term, hashes))
        self._first = np.array(sorted(self._terms), dtype=np.uint64)

    def __call__(self, texts: Sequence[np.ndarray]) -> list[dict[str, str]]:
        """Of each text (as `Words` gives it): group -> the first of its terms that was found."""
        found: list[dict[str, str]] = [{} for _ in texts]
        flat, text_of = flat_words(texts)
        at = np.searchsorted(self._first, flat)
        at[at == len(self._first)] = 0
        for i in np.flatnonzero(self._first[at] == flat).tolist():
            here = found[text_of[i]]
            for g, term, wanted in self._terms[int(flat[i])]:
                if len(wanted) == 1 or np.array_equal(flat[i : i + len(wanted)], wanted):
                    here.setdefault(self.groups[g], term)
        return found


def rates(
    groups: Sequence[str], better: Sequence[Mapping[str, str]], worse: Sequence[Mapping[str, str]], paired: bool
) -> dict[str, Any]:
    """By group: the share of better and of worse responses that hold a term, with intervals.

    p is two-sided: of McNemar's exact test on the pairs in which one side alone holds a term where responses are
    paired, of Fisher's exact test otherwise.  It is not corrected for the number of groups.
    """
    found = {}
    for group in groups:
        first, second = np.array([group in m for m in better], bool), np.array([group in m for m in worse], bool)
        if not first.any() and not second.any():
            continue
        a, b = int(first.sum()), int(second.sum())
        if paired:
            only, other = int((first & ~second).sum()), int((second & ~first).sum())
            p = stats.binomtest(only, only + other).pvalue if only + other else 1.0
        else:
            p = stats.fisher_exact([[a, len(first) - a], [b, len(second) - b]]).pvalue
        found[group] = {"better": share(a, len(first)), "worse": share(b, len(second)), "p": float(p)}
    return found
