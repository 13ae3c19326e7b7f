"""Small-sample statistics over seeds: means with t-intervals, differences paired by seed, and tests of these.

No bootstrap: below ten seeds its intervals cover too rarely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
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


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value of a mean of 0, for differences that are as likely as their negatives.

    Exact: the share of the 2^n ways to flip signs whose mean is at least as far from 0.  Its smallest value is
    2^(1 - n), so that fewer than six seeds cannot reach 0.05.  Raises ValueError for more than 20 differences.
    """
    values = np.asarray(differences, dtype=float)
    if not 1 <= len(values) <= 20:
        raise ValueError(f"found {len(values)} differences; want 1 to 20, whose signs can all be tried")
    flipped = np.array(list(product((1.0, -1.0), repeat=len(values)))) @ values
    return float(np.mean(np.abs(flipped) >= abs(values.sum()) * (1 - 1e-12)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted so that the chance of any false claim among all of them is bounded (Holm 1979)."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def interquartile_mean(values: Sequence[float]) -> float:
    """The mean of the middle half, values on its edges by the share that lies inside (Agarwal et al. 2021)."""
    values = np.sort(np.asarray(values, dtype=float))
    n = len(values)
    # how much of each value's place [i, i + 1] lies between the quarters
    inside = np.clip(np.minimum(np.arange(1, n + 1), 0.75 * n) - np.maximum(np.arange(n), 0.25 * n), 0.0, None)
    return float((inside * values).sum() / inside.sum())


def effect_size(differences: Sequence[float]) -> float:
    """The mean of paired differences in standard deviations of them (Cohen's d_z); inf where they are all one value."""
    values = np.asarray(differences, dtype=float)
    mean, spread = values.mean(), values.std(ddof=1) if len(values) > 1 else float("nan")
    return float(mean / spread) if spread else float(np.copysign(np.inf, mean)) if mean else 0.0
