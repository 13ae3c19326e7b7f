"""How well one number predicts another: curves, R2 on the runs fitted and on runs left out, rank correlation."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.optimize import isotonic_regression

Curve = Callable[[np.ndarray], np.ndarray]


class Correlation(NamedTuple):
    """Spearman's rho and its 95 % percentile interval over resampled clusters."""

    rho: float
    low: float
    high: float
    clusters: int

    def __str__(self) -> str:
        return f"{self.rho:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def quadratic(x: np.ndarray, y: np.ndarray) -> Curve:
    """Least squares with a + b x + c x², of lower degree where x has fewer than three values."""
    return np.polynomial.Polynomial.fit(x, y, min(2, len(np.unique(x)) - 1))


def monotone(x: np.ndarray, y: np.ndarray) -> Curve:
    """Least squares among all curves that never fall; straight between the values of x and level outside them."""
    values, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(where, weights=y) / counts
    heights = isotonic_regression(means, weights=counts).x
    return lambda at: np.interp(at, values, heights)


FITS: dict[str, Callable[[np.ndarray, np.ndarray], Curve]] = {"quadratic": quadratic, "monotone": monotone}


def r2(y: np.ndarray, predicted: np.ndarray, expected: float | np.ndarray | None = None) -> float:
    """1 - the squared error over that of `expected`, by default the mean of y; NaN where y does not vary."""
    total = ((y - (y.mean() if expected is None else expected)) ** 2).sum()
    return float(1 - ((y - predicted) ** 2).sum() / total) if total > 1e-12 else float("nan")


def fitted_r2(fit: str, x: np.ndarray, y: np.ndarray) -> float:
    return r2(y, FITS[fit](x, y)(x)) if len(np.unique(x)) > 1 else float("nan")


def left_out_r2(fit: str, x: np.ndarray, y: np.ndarray, groups: Sequence[Hashable]) -> float:
    """R2 of predictions for each group by the curve of all others, against the mean of these others.

    Below 0 where the curve predicts worse than that mean.  NaN for one group.
    """
    groups = _codes(groups)
    if groups.max(initial=0) == 0:
        return float("nan")
    predicted, expected = np.empty(len(y)), np.empty(len(y))
    for group in range(groups.max() + 1):
        out = groups == group
        predicted[out] = FITS[fit](x[~out], y[~out])(x[out])
        expected[out] = y[~out].mean()
    return r2(y, predicted, expected)


def within_r2(x: np.ndarray, y: np.ndarray, groups: Sequence[Hashable]) -> float:
    """The share of what varies inside groups that a quadratic explains: each group has a level of its own."""
    groups = _codes(groups)

    def inside(values: np.ndarray) -> np.ndarray:
        means = np.bincount(groups, weights=values) / np.bincount(groups)
        return values - means[groups]

    scaled = (x - x.mean()) / (x.std() or 1.0)
    design = np.stack([inside(scaled), inside(scaled**2)], axis=1)
    rest = inside(y)
    return r2(rest, design @ np.linalg.lstsq(design, rest, rcond=None)[0], 0.0)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def resampled_spearman(
    xs: np.ndarray, y: np.ndarray, clusters: Sequence[Hashable], draws: int = 2000, seed: int = 0
) -> np.ndarray:
    """[draws, predictors]: rho of every row of xs with y, whole clusters drawn with replacement, the same for all."""
    codes = _codes(clusters)
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    random = np.random.default_rng(seed)
    both, found = np.vstack([xs, y]), np.empty((draws, len(xs)))
    for draw in range(draws):
        chosen = np.concatenate([members[i] for i in random.integers(0, len(members), len(members))])
        ranks = stats.rankdata(both[:, chosen], axis=1)
        ranks -= ranks.mean(1, keepdims=True)
        length = np.linalg.norm(ranks, axis=1)
        with np.errstate(invalid="ignore"):  # 0 / 0 where one does not vary
            found[draw] = ranks[:-1] @ ranks[-1] / (length[:-1] * length[-1])
    return found


def correlation(x: np.ndarray, y: np.ndarray, draws: np.ndarray, clusters: Sequence[Hashable]) -> Correlation:
    """rho with the percentile interval of its resampled values."""
    low, high = np.nanpercentile(draws, [2.5, 97.5]) if np.isfinite(draws).any() else (np.nan, np.nan)
    return Correlation(spearman(x, y), float(low), float(high), len(set(clusters)))


def _codes(groups: Sequence[Hashable]) -> np.ndarray:
    names = {name: code for code, name in enumerate(dict.fromkeys(groups))}
    return np.array([names[name] for name in groups])
