"""A judge of politeness: logistic regression on the words and word pairs of an answer, learnt from training answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

PENALTY = 3e-4


def features(text: str) -> set[str]:
    words = re.findall(r"[\w']+|[?!]", text.lower())
    return {*words, *map(" ".join, pairwise(words))}


@dataclass(frozen=True)
class Judge:
    """weights   log-odds of a feature, polite against plain; bias for equally many of both"""

    weights: dict[str, float]
    bias: float

    @classmethod
    def learnt(cls, polite: Sequence[str], plain: Sequence[str]) -> Judge:
        """Features that stand in two answers or more; both classes weigh the same; a penalty on squared weights."""
        texts = [features(text) for text in (*polite, *plain)]
        counts = Counter(feature for text in texts for feature in text)
        index = {feature: i for i, feature in enumerate(sorted(f for f, n in counts.items() if n > 1))}
        x = torch.zeros(len(texts), len(index) + 1)
        x[:, -1] = 1.0
        for row, text in zip(x, texts):
            row[[index[feature] for feature in text if feature in index]] = 1.0
        y = torch.cat([torch.ones(len(polite)), torch.zeros(len(plain))])
        share = torch.where(y > 0, 0.5 / len(polite), 0.5 / len(plain))
        w = torch.zeros(x.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            nll = binary_cross_entropy_with_logits(x @ w, y, weight=share, reduction="sum")
            total = nll + PENALTY * w[:-1].square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        *weights, bias = w.tolist()
        return cls(dict(zip(index, weights)), bias)

    def polite(self, text: str) -> bool:
        return bool(text) and self.bias + sum(self.weights.get(f, 0.0) for f in features(text)) > 0
