"""A judge of politeness: naive Bayes on the words and word pairs of an answer, learnt from training answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


def features(text: str) -> set[str]:
    words = re.findall(r"[\w']+|[?!]", text.lower())
    return {*words, *map(" ".join, zip(words, words[1:]))}


@dataclass(frozen=True)
class Judge:
    """weights: log-odds of a feature, polite against plain, with a half added to both counts."""

    weights: dict[str, float]

    @classmethod
    def learnt(cls, polite: Sequence[str], plain: Sequence[str]) -> Judge:
        ours, theirs = (Counter(f for text in texts for f in features(text)) for texts in (polite, plain))
        return cls(
            {
                f: math.log((ours[f] + 0.5) / (len(polite) + 1)) - math.log((theirs[f] + 0.5) / (len(plain) + 1))
                for f in ours | theirs
                if ours[f] + theirs[f] > 1
            }
        )

    def polite(self, text: str) -> bool:
        return sum(self.weights.get(f, 0.0) for f in features(text)) > 0
