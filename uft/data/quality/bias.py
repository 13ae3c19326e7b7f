"""Does length give the answer away?  Shares come with 95 % intervals of Wilson, means with those of Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


def share(hits: int, of: int) -> dict[str, Any]:
    """A share with its interval (Wilson 1927); None where there is nothing to take a share of."""
    if not of:
        return {"hits": 0, "of": 0, "share": None, "low": None, "high": None}
    low, high = stats.binomtest(hits, of).proportion_ci(0.95, method="wilson")
    return {"hits": int(hits), "of": int(of), "share": hits / of, "low": float(low), "high": float(high)}


def mean(values: Sequence[float]) -> dict[str, Any]:
    """A mean with its interval; no interval for one value."""
    n = len(values)
    if not n:
        return {"n": 0, "mean": None, "low": None, "high": None}
    middle = float(np.mean(values))
    error = float(stats.sem(values)) if n > 1 else math.nan
    half = stats.t.ppf(0.975, n - 1) * error if n > 1 else math.nan
    ends = (None, None) if math.isnan(half) else (middle - float(half), middle + float(half))
    return {"n": n, "mean": middle, "low": ends[0], "high": ends[1]}


def length_bias(chosen: Sequence[int], rejected: Sequence[int]) -> dict[str, Any]:
    """How much longer the chosen responses of pairs are.

    chosen_longer     share of the pairs of unequal length whose chosen response is the longer one
    rule_accuracy     of "the longer response is better" on all pairs; a tie is half right
    difference        mean of chosen less rejected, in the unit of the lengths
    p                 two-sided sign test of chosen_longer against 1/2
    """
    difference = np.asarray(chosen, dtype=float) - np.asarray(rejected, dtype=float)
    longer, shorter = int((difference > 0).sum()), int((difference < 0).sum())
    n = len(difference)
    return {
        "pairs": n,
        "ties": n - longer - shorter,
        "chosen_longer": share(longer, longer + shorter),
        "p": float(stats.binomtest(longer, longer + shorter).pvalue) if longer + shorter else None,
        "rule_accuracy": (longer + (n - longer - shorter) / 2) / n if n else None,
        "difference": mean(difference.tolist()),
    }


def length_and_target(lengths: Sequence[int], targets: Sequence[float]) -> dict[str, Any]:
    """Spearman's ρ of length and target (label or score) over responses; None where one of them does not vary."""
    if len(lengths) < 3 or len(set(lengths)) < 2 or len(set(targets)) < 2:
        return {"responses": len(lengths), "rho": None, "p": None}
    found = stats.spearmanr(lengths, targets)
    return {"responses": len(lengths), "rho": float(found.statistic), "p": float(found.pvalue)}
