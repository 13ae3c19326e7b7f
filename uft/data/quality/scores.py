"""Scores, and what UNA's losses make of them.

(σ(r) − s)² and −s log σ(r) − (1 − s) log σ(−r) (`uft.losses.pointwise`) are least at r = logit(s), that is at a
log-ratio log π / π_ref = logit(s) / β.  From the reference (r = 0) on, every response with s > 0.5 is made likelier and
every other one less likely, whatever scale the scores were meant on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

EPSILON = 1e-6  # how near scores may come to 0 and 1 before their logits are taken
BALANCED = (0.4, 0.6)  # share above 0.5
SKEWED = 1.0  # in absolute value: from there on the mean says little of where most scores are


def logit(scores: np.ndarray) -> np.ndarray:
    s = np.clip(scores, EPSILON, 1 - EPSILON)
    return np.log(s) - np.log1p(-s)


def describe(scores: Sequence[float], beta: float) -> dict[str, Any]:
    """Distribution of scores in [0, 1] and their effect; log-ratios in nats, of scores clipped to [ε, 1 − ε]."""
    s = np.asarray(scores, dtype=float)
    ratios = logit(s) / beta
    skewness = float(stats.skew(s)) if len(s) > 2 and s.std() > 0 else 0.0
    above = float((s > 0.5).mean())
    return {
        "responses": len(s),
        "mean": float(s.mean()),
        "quantiles": {f"{q:g}": float(np.quantile(s, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
        "skewness": skewness,
        "share_above_half": above,
        "share_at_0_or_1": float(((s <= EPSILON) | (s >= 1 - EPSILON)).mean()),
        "beta": beta,
        "mean_target_log_ratio": float(ratios.mean()),
        "median_target_log_ratio": float(np.median(ratios)),
        "histogram": np.histogram(s, 20, (0, 1))[0].tolist(),
        "suggestion": suggestion(above, skewness, len(set(s.tolist()))),
    }


def suggestion(above_half: float, skewness: float, values: int) -> str:
    """keep, centre or rank.  A rule of thumb: keep what is balanced around 0.5, move what is merely off it, rank what
    is crowded at one end."""
    if values < 2:
        return "keep: all scores are the same, and say nothing about each other"
    if BALANCED[0] <= above_half <= BALANCED[1]:
        return f"keep: {above_half:.0%} lie above 0.5"
    where = f"{above_half:.0%} lie above 0.5, and would be made likelier"
    if abs(skewness) >= SKEWED:
        return f"rank: {where}; skewness {skewness:.1f}, so that most scores are crowded together"
    return f"centre: {where}; about symmetric, so that moving the median to 0.5 is enough"


def rank(scores: Sequence[float]) -> np.ndarray:
    """(rank − 1/2) / n, equal scores sharing their mean rank: uniform in (0, 1)."""
    return (stats.rankdata(scores) - 0.5) / len(scores) if len(scores) else np.zeros(0)


def centre(scores: Sequence[float]) -> np.ndarray:
    """σ(logit(s) − logit(median)): the median comes to 0.5, differences in log-odds stay.  Scores within ε = 1e-6 of 0
    and 1 count as ε away."""
    if not len(scores):
        return np.zeros(0)
    s = np.asarray(scores, dtype=float)
    return 1 / (1 + np.exp(logit(np.array([np.median(s)]))[0] - logit(s)))


HOW: dict[str, Callable[[Sequence[float]], np.ndarray]] = {"rank": rank, "centre": centre}
