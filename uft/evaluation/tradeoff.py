"""What is kept against what is gained: gaps to single-objective optima, tax at matched reward, Pareto fronts.

Arrays in, numbers out.  Losses are smaller-is-better, scores larger-is-better; each function says which it takes.

[XR]   Fernando et al., arXiv:2410.15483 (ALRIGHT, MAXRIGHT): optimality gaps and ideal distance in the plane
       (f_SFT, f_DPO)
[TAX]  Lin et al., arXiv:2309.06256: alignment tax, abilities lost at the reward that was reached
[HV]   Zitzler & Thiele 1999: hypervolume, here by slicing along the last objective
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


def optimality_gaps(losses: ArrayLike, optima: ArrayLike) -> np.ndarray:
    """[XR] float64 [..., objectives]: loss above what training on each objective alone reaches.

    losses   [..., objectives]
    optima   [objectives]

    A negative gap says that the "optimum" was none: that run was too short, or badly tuned.
    """
    losses, optima = np.asarray(losses, dtype=np.float64), np.asarray(optima, dtype=np.float64)
    if optima.ndim != 1 or losses.ndim < 1 or losses.shape[-1] != len(optima):
        raise ValueError(
            f"found losses {list(losses.shape)}, optima {list(optima.shape)}; want [..., objectives] and [objectives]"
        )
    return losses - optima


def ideal_distance(losses: ArrayLike, optima: ArrayLike) -> np.ndarray:
    """[XR] float64 [...]: Euclidean distance from the ideal point, at which every objective has its own optimum.

    As in the paper, losses count in their own units, so one that varies more decides; and a negative gap counts as
    distance.
    """
    return np.linalg.norm(optimality_gaps(losses, optima), axis=-1)


class Tax(NamedTuple):
    """The tax at each of some rewards, and its mean over the rewards that both curves reach.

    reward, tax   float64 [n]
    mean          in units of retention; positive where ours keeps less at the same reward
    """

    reward: np.ndarray
    tax: np.ndarray
    mean: float


def alignment_tax(
    reward: ArrayLike, retention: ArrayLike, baseline_reward: ArrayLike, baseline_retention: ArrayLike
) -> Tax:
    """[TAX] Retention of the baseline minus ours at equal reward, both curves interpolated linearly.

    reward, retention   [n] each, points of a curve in any order; of points with equal reward the mean is taken.  The
                        baseline's curve may have another number of points

    Raises ValueError where the curves share no interval of reward: then there is nothing to compare.
    """
    ours, theirs = _curve(reward, retention, "ours"), _curve(baseline_reward, baseline_retention, "the baseline's")
    low, high = max(ours[0][0], theirs[0][0]), min(ours[0][-1], theirs[0][-1])
    if not low < high:
        raise ValueError(
            f"rewards are from {ours[0][0]:g} to {ours[0][-1]:g} and the baseline's from {theirs[0][0]:g} to "
            f"{theirs[0][-1]:g}; want an interval that both reach"
        )
    at = np.unique(np.clip(np.concatenate([ours[0], theirs[0], [low, high]]), low, high))
    tax = np.interp(at, *theirs) - np.interp(at, *ours)  # linear between these rewards, so that the mean is exact
    return Tax(at, tax, float(np.trapezoid(tax, at) / (high - low)))


def _curve(reward: ArrayLike, retention: ArrayLike, whose: str) -> tuple[np.ndarray, np.ndarray]:
    reward, retention = np.asarray(reward, dtype=np.float64), np.asarray(retention, dtype=np.float64)
    if reward.ndim != 1 or reward.shape != retention.shape or not len(reward):
        raise ValueError(
            f"{whose}: found {list(reward.shape)} rewards and {list(retention.shape)} retentions; want [n]"
        )
    if not (np.isfinite(reward).all() and np.isfinite(retention).all()):
        raise ValueError(f"{whose}: found a reward or retention that is no number")
    levels, where, count = np.unique(reward, return_inverse=True, return_counts=True)
    return levels, np.bincount(where, weights=retention) / count


def pareto_front(scores: ArrayLike) -> np.ndarray:
    """bool [n]: which points no other is at least as good as everywhere and better somewhere.  Equal points stand or
    fall together.

    scores   [n, objectives], larger is better
    """
    s = _points(scores)
    at_least, better = (s[:, None] >= s[None]).all(-1), (s[:, None] > s[None]).any(-1)
    return ~(at_least & better).any(0)


def hypervolume(scores: ArrayLike, reference: ArrayLike) -> float:
    """[HV] Volume of what some point dominates above the reference point, in the product of the objectives' units.

    scores      [n, objectives], larger is better; points that are not above the reference everywhere add nothing
    reference   [objectives], the worst that still counts: the result depends on it, so it has to be stated

    Exact.  O(n^(d - 1) log n) for d objectives: meant for two or three.
    """
    s, corner = _points(scores), np.asarray(reference, dtype=np.float64)
    if corner.shape != s.shape[1:]:
        raise ValueError(f"found scores {list(s.shape)} and a reference {list(corner.shape)}; want [objectives] of it")
    return _volume((s - corner)[(s > corner).all(-1)])


def _volume(s: np.ndarray) -> float:
    """Of boxes from the origin to each point."""
    if not len(s):
        return 0.0
    if s.shape[1] == 1:
        return float(s.max())
    s = s[np.argsort(-s[:, -1], kind="stable")]  # the highest first: a slab below it sees all points down to there
    depth = s[:, -1] - np.append(s[1:, -1], 0.0)
    return float(sum(thick * _volume(s[: i + 1, :-1]) for i, thick in enumerate(depth) if thick > 0))


def _points(scores: ArrayLike) -> np.ndarray:
    s = np.asarray(scores, dtype=np.float64)
    if s.ndim != 2 or not s.size or not np.isfinite(s).all():
        raise ValueError(f"scores: found shape {list(s.shape)}, or what is no number; want numbers [n, objectives]")
    return s
