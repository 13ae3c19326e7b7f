"""Small-sample statistics over seeds: means with t-intervals, and differences paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean over n seeds and its 95 % t-interval.  For n = 1 the interval is NaN."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.n < 2 or not np.isfinite(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {(self.high - self.low) / 2:.3f}"


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t-interval of the mean."""
    values = np.asarray(values, dtype=float)
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), n)
    half = stats.t.ppf(0.5 + confidence / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)
    return Interval(mean, float(mean - half), float(mean + half), n)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Interval:
    """a - b over the seeds that both have: what differs between seeds but not between arms cancels."""
    seeds = sorted(set(a) & set(b))
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(a)} and {sorted(b)}")
    return interval([a[seed] - b[seed] for seed in seeds])
