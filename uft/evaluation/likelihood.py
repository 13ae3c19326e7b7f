"""Held-out likelihood of what is to be imitated: demonstrations, documents, chosen answers.

    nll            −Σ log π(y | x) / Σ tokens, over all responses: nats per token
    nll_sequence   mean of −log π(y | x): nats per response
    perplexity     exp(nll)

The rise of held-out demonstration NLL in a preference stage is what arXiv:2601.07389 proves, and f_SFT of
arXiv:2410.15483.
"""

from __future__ import annotations

import math

import numpy as np

from uft.evaluation.scoring import Scores


def imitated(scores: Scores) -> np.ndarray:
    """int64: the entries that are to be imitated, as `uft.metrics.by_source` has it: demonstrations, documents, chosen
    answers, responses called good; of these, those with a token that counts."""
    return np.flatnonzero(~(scores.target < 0.5) & (scores.length > 0))


def likelihood(logp: np.ndarray, length: np.ndarray) -> dict[str, float]:
    """The measures above.

    logp     float64 [n], nats per response
    length   float64 [n], tokens of each

    Raises ValueError where there are no tokens.
    """
    if not len(logp) or len(logp) != len(length) or not np.sum(length) > 0:
        raise ValueError(f"found {len(logp)} log-probabilities of {float(np.sum(length)):g} tokens; want at least one")
    nll = -float(np.sum(logp) / np.sum(length))
    return {"nll": nll, "nll_sequence": -float(np.mean(logp)), "perplexity": math.exp(min(nll, 700.0))}


def by_source(measure, scores: Scores, source: np.ndarray, *columns: np.ndarray) -> dict[str, float]:
    """What `measure` says of the columns, and of each source's part of them as `<source>/...`, where there are several.

    source   int64 [n], position in `scores.names` of each entry of the columns
    """
    found = dict(measure(*columns))
    present = np.unique(source)
    for code in present if len(present) > 1 else ():
        part = measure(*(column[source == code] for column in columns))
        found |= {f"{scores.names[code]}/{name}": value for name, value in part.items()}
    return found


def demonstration_likelihood(scores: Scores) -> dict[str, float]:
    """`likelihood` of what is to be imitated, over all and by source."""
    rows = imitated(scores)
    return by_source(likelihood, scores, scores.source[rows], scores.logp[rows], scores.length[rows])
