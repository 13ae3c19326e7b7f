"""Whether the probabilities that a reward model gives to preferences are true.

    m = r(x, y_w) − r(x, y_l)                the margin of a pair
    p = σ(m)                                 the probability that the model gives to what was preferred
    right                                    m > 0; a tie is half right
    confidence  c = max(p, 1 − p) = σ(|m|)   in its own choice

    ECE = Σ_bins n_bin / n · |share right in the bin − mean confidence in the bin|    [Guo] Eq. 3
    Brier score = mean (1 − p)²              of "the first is preferred" seen from both sides, which is the same
    nll = mean −log p                        nats

Bins are of equal width over [0.5, 1], where the confidence in one of two lies.  With few pairs ECE is above 0 for a
perfectly calibrated model as well: a share right of 20 pairs is off by 0.1.

[Guo]  Guo et al. 2017, arXiv:1706.04599
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, log_expit

from uft.evaluation.judge import interval
from uft.evaluation.preference import ranked
from uft.feedback import Example

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence is in (low, high].  accuracy and confidence are means, NaN where there are none."""

    low: float
    high: float
    count: int
    accuracy: float
    confidence: float


@dataclass(frozen=True)
class Calibration:
    """See the top of the file.

    low, high        95 % interval of the accuracy, Wilson's: of independent pairs
    temperature      T for which mean −log σ(m / T) is smallest; 0 where every pair is right, inf where the mean margin
                     is not positive
    ece_rescaled     ECE of σ(m / T), T fitted on one half of the pairs and used on the other, both ways; NaN where one
                     of the two is 0 or inf
    """

    pairs: int
    accuracy: float
    low: float
    high: float
    ece: float
    brier: float
    nll: float
    temperature: float
    ece_rescaled: float
    bins: tuple[Bin, ...]

    def metrics(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name != "bins"}


def pair_margins(rewards: Sequence[Sequence[float]], examples: Sequence[Example]) -> np.ndarray:
    """float64 [pairs]: the margin of every (better, worse) of the examples, in their order.

    Raises ValueError where there are none.
    """
    margins = [
        of_example[better] - of_example[worse]
        for of_example, example in zip(rewards, examples, strict=True)
        for better, worse in example.preferences
    ]
    if not margins:
        raise ValueError(f"found {len(examples)} examples and no pair among them; want prompt, chosen, rejected")
    return np.array(margins, dtype=np.float64)


def calibration(margins: np.ndarray, bins: int = BINS) -> Calibration:
    """margins: float64 [pairs].  Raises ValueError for none, and for margins that are not finite."""
    margins = np.asarray(margins, dtype=np.float64)
    if margins.ndim != 1 or not len(margins) or not np.isfinite(margins).all():
        raise ValueError(f"margins: found {list(margins.shape)}; want [pairs], at least one and all of them finite")
    if bins < 1:
        raise ValueError(f"bins is {bins}; want at least 1")
    accuracy = float(ranked(margins, np.zeros_like(margins)).mean())
    low, high = interval(accuracy, len(margins))
    found = reliability(margins, bins)
    return Calibration(
        pairs=len(margins),
        accuracy=accuracy,
        low=low,
        high=high,
        ece=expected_calibration_error(found),
        brier=float(np.square(expit(-margins)).mean()),
        nll=float(-log_expit(margins).mean()),
        temperature=temperature(margins),
        ece_rescaled=_rescaled(margins, bins),
        bins=found,
    )


def reliability(margins: np.ndarray, bins: int = BINS) -> tuple[Bin, ...]:
    """The share right by confidence, in bins of equal width over [0.5, 1]."""
    confidence, right = expit(np.abs(margins)), ranked(margins, np.zeros_like(margins))
    edges = np.linspace(0.5, 1.0, bins + 1)
    # right-closed as in [Guo], and the lowest bin closed on both sides
    of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    found = []
    for b in range(bins):
        inside = of == b
        means = (float(x[inside].mean()) if inside.any() else float("nan") for x in (right, confidence))
        found.append(Bin(float(edges[b]), float(edges[b + 1]), int(inside.sum()), *means))
    return tuple(found)


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Σ n_bin / n · |accuracy − confidence|, in probability.  [Guo] Eq. 3."""
    n = sum(each.count for each in bins)
    return sum(each.count / n * abs(each.accuracy - each.confidence) for each in bins if each.count)


def temperature(margins: np.ndarray) -> float:
    """T > 0 for which mean −log σ(m / T) is smallest.  [Guo] Sec. 4.2, for two classes; see `Calibration`."""
    if margins.mean() <= 0:
        return float("inf")
    if margins.min() >= 0:
        return 0.0

    def slope(log_inverse: float) -> float:  # of the mean −log σ(a m) in a, which is convex in a
        return -float((margins * expit(-np.exp(log_inverse) * margins)).mean())

    low, high = -1.0, 1.0
    while slope(low) > 0:
        low *= 2
    while slope(high) < 0:
        high *= 2
    return float(np.exp(-brentq(slope, low, high, xtol=1e-12)))


def _rescaled(margins: np.ndarray, bins: int) -> float:
    halves = margins[::2], margins[1::2]
    if not all(len(half) for half in halves):
        return float("nan")
    fitted = [temperature(half) for half in halves]
    if not all(0 < t < np.inf for t in fitted):
        return float("nan")
    crossed = np.concatenate([halves[0] / fitted[1], halves[1] / fitted[0]])
    return expected_calibration_error(reliability(crossed, bins))


def draw(axes: Any, found: Calibration, label: str | None = None) -> None:
    """The reliability curve, with 95 % intervals, on matplotlib axes."""
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, linestyle="--")
    bins = [each for each in found.bins if each.count]
    x, y = [each.confidence for each in bins], [each.accuracy for each in bins]
    ends = np.array([interval(each.accuracy, each.count) for each in bins])
    error = np.abs(ends.T - np.array(y))
    axes.errorbar(x, y, yerr=error, marker="o", markersize=4, linewidth=1.2, capsize=2, label=label)
    axes.set(xlim=(0.48, 1.02), ylim=(min(0.4, ends.min() - 0.02), 1.02))
    axes.set(xlabel="confidence σ(|margin|)", ylabel="share of pairs ranked right")


def figure(found: Calibration, path: str | Path, title: str = "") -> None:
    """A PNG: reliability above, how many pairs each bin holds below."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.2, 4.6), dpi=150, layout="constrained")
    above, below = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    draw(above, found)
    above.set_title(title or f"{found.pairs} pairs, ECE {found.ece:.3f}", fontsize=10)
    above.set_xlabel("")
    middles = [(each.low + each.high) / 2 for each in found.bins]
    below.bar(middles, [each.count for each in found.bins], width=0.9 * (found.bins[0].high - found.bins[0].low))
    below.set(xlabel="confidence σ(|margin|)", ylabel="pairs")
    drawn.savefig(path)
