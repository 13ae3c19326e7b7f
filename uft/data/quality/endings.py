"""Responses that are empty or cut off, by signs on their surface.  Each is a heuristic, and named by what it looks at.

no text         neither a letter nor a digit nor any other symbol that is not punctuation
mid word        the last word stands nowhere else in the data and is the beginning of a longer word that does
open fence      an odd number of ``` fences
longest         exactly as long as the longest response of its group, as are at least two others: a length limit
max length      prompt and response together have at least `max_length` tokens (only with a tokenizer)
no final mark   at least eight words, and no final punctuation behind the last one; titles, lists and code end so too
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence

from uft.data.quality.items import ALONE, MARKS

# letters with their marks; scripts without spaces have no words that could be cut.  Possessive, since at the end of a
# text a word would otherwise be tried in 2^n ways
WORDS = re.compile(rf"(?:[^\W\d_{ALONE}]++[{MARKS}]*+)++")
ASCII_WORDS = re.compile(r"[^\W\d_]+")
LAST = re.compile(rf"({WORDS.pattern})\Z")
CLOSING = "\"'”’»›)]}*_`"
FINAL = ".!?…。！？؟।۔;:"
SIGNS = ("no text", "mid word", "open fence", "longest", "max length", "no final mark")
MANY = 8  # words from which on a response is expected to be a sentence
LEAST_LONGEST = 50  # characters; shorter responses are of the same length by chance
SHARED_LONGEST = 3


class Lexicon:
    """How often each word stands in the data, and whether a word is the beginning of another."""

    def __init__(self, texts: Iterable[str]):
        self.counts: Counter[str] = Counter()
        for text in texts:
            self.counts.update((ASCII_WORDS if text.isascii() else WORDS).findall(text.lower()))
        # what stands there once may be cut itself
        self._known = sorted(word for word, count in self.counts.items() if count > 1)

    def is_cut(self, text: str) -> bool:
        found = LAST.search(text.rstrip())
        if not found or len(found[1]) < 2:
            return False
        word = found[1].lower()
        if self.counts[word] > 1:
            return False
        at = bisect_right(self._known, word)
        return at < len(self._known) and self._known[at].startswith(word)


def no_text(text: str) -> bool:
    return all(c.isspace() or unicodedata.category(c)[0] == "P" for c in text)


def open_fence(text: str) -> bool:
    return text.count("```") % 2 == 1


def no_final_mark(text: str) -> bool:
    bare = text.rstrip().rstrip(CLOSING).rstrip()
    if not bare or len(bare.split(None, MANY)) < MANY or text.rstrip().endswith("```"):
        return False
    # a symbol or a number may well be the end
    return bare[-1] not in FINAL and (bare[-1].isalpha() or bare[-1] in ",-–—")


def at_longest(lengths: Sequence[int]) -> set[int]:
    """Positions of the responses that are as long as the longest, where that is shared by several."""
    longest = max(lengths, default=0)
    found = {i for i, n in enumerate(lengths) if n == longest}
    return found if longest >= LEAST_LONGEST and len(found) >= SHARED_LONGEST else set()


def signs(text: str, lexicon: Lexicon) -> list[str]:
    """Which of the signs the text itself shows; those of lengths need its group."""
    if no_text(text):
        return ["no text"]
    seen = [
        ("mid word", lexicon.is_cut(text)),
        ("open fence", open_fence(text)),
        ("no final mark", no_final_mark(text)),
    ]
    return [name for name, yes in seen if yes]
