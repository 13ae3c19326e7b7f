"""Forgetting and backward transfer, from what was right before and after; pure arithmetic.

Sample by sample, with what guessing alone would show taken off ([SW] arXiv:2510.17776):

    F  = mean 1[right before, wrong after]          BT = mean 1[wrong before, right after]
    F_chance  = (1 − a_pre) / (k − 1) · (1 − a_post)     guessed right before, wrong after
    BT_chance = (1 − a_pre) · (1 − a_post) / (k − 1)
    F_true = max(F − F_chance, 0)        BT_true = max(BT − BT_chance, 0)
    F_max  = max((k a_pre − 1) / (k − 1), 0)             what was known, not guessed

for questions with k options: of the 1 − p that is not known a share 1/k is guessed right, so that (1 − a) / (k − 1) is
the share guessed right.  A free answer is never guessed right: k = ∞, chance 0, F_max = a_pre.

Over stages, from R[i, j], the score on task j after stage i (larger is better):

    BWT   = mean over tasks of R[last, j] − R[learnt_j, j]       [GEM] Lopez-Paz & Ranzato, arXiv:1706.08840, Eq. 3
    f[k, j] = max over l < k of R[l, j] − R[k, j]                [RW]  Chaudhry et al., arXiv:1801.10112, Eq. 3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# ---- sample by sample ----


class SampleForgetting(NamedTuple):
    """Shares of all samples, in [0, 1]; see the top of the file."""

    F: float
    BT: float
    F_chance: float
    BT_chance: float
    F_true: float
    BT_true: float
    F_max: float


def sample_forgetting(
    before: ArrayLike, after: ArrayLike, options: int | Sequence[int | None] | None = None
) -> SampleForgetting:
    """[SW] of n samples.

    before, after   bool [n], whether each was right
    options         k of every sample, or [n] of each; None for a free answer.  Samples with the same k are taken
                    together: chance terms use the accuracies of their group, and are weighted by its size

    Raises ValueError for lengths that differ, no samples, values that are not 0 or 1, and fewer than two options.
    """
    pre, post = _marks(before, "before"), _marks(after, "after")
    if len(pre) != len(post):
        raise ValueError(f"found {len(pre)} samples before and {len(post)} after; want the same ones")
    k = _options(options, len(pre))
    forgotten, gained = float(np.mean(pre & ~post)), float(np.mean(~pre & post))
    chance, chance_back, known = 0.0, 0.0, 0.0
    for each in np.unique(k):
        group = k == each
        share, wrong_before, wrong_after = group.mean(), 1 - pre[group].mean(), 1 - post[group].mean()
        guessed = 0.0 if np.isinf(each) else 1 / (each - 1)
        chance += share * (wrong_before * guessed) * wrong_after
        chance_back += share * wrong_before * (wrong_after * guessed)
        known += share * (1 - wrong_before - wrong_before * guessed)  # (k a − 1) / (k − 1)
    return SampleForgetting(
        forgotten, gained, float(chance), float(chance_back), max(forgotten - float(chance), 0.0),
        max(gained - float(chance_back), 0.0), max(float(known), 0.0),
    )  # fmt: skip


def _marks(values: ArrayLike, name: str) -> np.ndarray:
    marks = np.asarray(values)
    if marks.ndim != 1 or not len(marks):
        raise ValueError(f"{name}: found shape {list(marks.shape)}; want [samples], at least one")
    if marks.dtype != bool and not np.isin(marks, (0, 1)).all():
        raise ValueError(f"{name}: found values other than 0 and 1; want whether each sample was right")
    return marks.astype(bool)


def _options(options: int | Sequence[int | None] | None, n: int) -> np.ndarray:
    """float64 [n], infinite for free answers."""
    each = [options] * n if options is None or np.ndim(options) == 0 else list(options)
    if len(each) != n:
        raise ValueError(f"options: found {len(each)} for {n} samples; want one of each, or one number")
    k = np.array([np.inf if value is None else float(value) for value in each])
    if not (k >= 2).all():
        raise ValueError(f"options: found {k[~(k >= 2)][0]:g}; want at least 2, or None for a free answer")
    return k


# ---- over stages ----


def backward_transfer(scores: ArrayLike, learnt: Sequence[int] | None = None) -> float:
    """[GEM] How the tasks that earlier stages taught stand at the end against when they were learnt; negative where
    they were forgotten.

    scores   R [stages, tasks], larger is better
    learnt   [tasks], the stage that taught each; by default stage j taught task j
    """
    R, learnt = _matrix(scores, learnt)
    earlier = np.flatnonzero(learnt < len(R) - 1)
    return float(np.mean(R[-1, earlier] - R[learnt[earlier], earlier]))


def forgetting_matrix(scores: ArrayLike, learnt: Sequence[int] | None = None) -> np.ndarray:
    """[RW] float64 [stages, tasks]: how far below its best earlier score each task is after each stage; NaN where no
    earlier stage had taught it.  Negative where it was never better.  Arguments as `backward_transfer`."""
    R, learnt = _matrix(scores, learnt)
    f = np.full(R.shape, np.nan)
    best = np.maximum.accumulate(R, axis=0)
    f[1:] = best[:-1] - R[1:]
    f[np.arange(len(R))[:, None] <= learnt[None, :]] = np.nan
    return f


def mean_forgetting(scores: ArrayLike, learnt: Sequence[int] | None = None) -> float:
    """[RW] F at the end: the mean of the last row of `forgetting_matrix` over tasks that earlier stages taught."""
    return float(np.nanmean(forgetting_matrix(scores, learnt)[-1]))


def _matrix(scores: ArrayLike, learnt: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    R = np.asarray(scores, dtype=np.float64)
    if R.ndim != 2 or len(R) < 2 or not R.shape[1]:
        raise ValueError(f"scores: found shape {list(R.shape)}; want [stages, tasks], at least two stages and a task")
    if not np.isfinite(R).all():
        stage, task = np.argwhere(~np.isfinite(R))[0]
        raise ValueError(f"scores: found {R[stage, task]} after stage {stage} on task {task}; want numbers")
    if learnt is None:
        if R.shape[0] != R.shape[1]:
            raise ValueError(f"scores: found shape {list(R.shape)} and no `learnt`; want a task for every stage, or it")
        learnt = range(len(R))
    stages = np.asarray(list(learnt))
    if stages.shape != R.shape[1:] or stages.dtype.kind not in "iu" or not ((stages >= 0) & (stages < len(R))).all():
        raise ValueError(f"learnt: found {list(learnt)}; want a stage from 0 to {len(R) - 1} for each task")
    if (stages == len(R) - 1).all():
        raise ValueError("learnt: found every task learnt in the last stage; want one that can have been forgotten")
    return R, stages
