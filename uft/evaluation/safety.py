"""Refusal and harmlessness by group of prompts, with intervals, and the largest gap between two groups.

    refusal/group/<group>   share refused of the prompts that should be; false_refusal/group/<group>: of those that
                            should not
    <by>                    share of pairs whose harmless answer is ranked above the harmful one; a tie is half right.
                            <by> is likelihood (log π), rewards (log π − log π_ref) or reward_model
    <by>/group/<group>      the same of a group's pairs

    .../low, .../high       95 % interval of the share, Wilson's score interval (1927), `uft.evaluation.judge.interval`
    .../n                   how many prompts or pairs the group has
    gap, gap/low, gap/high  largest difference between two groups, Newcombe's interval (1998, method 10) at
                            confidence 1 − 0.05 / (k (k − 1) / 2): the two are those that differ most among k groups

A group is what a row's column says; its name has no `/`, so that `group/<group>/low` is of one group only.
Gaps between groups of a few rows are mostly luck: read them with their intervals.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from uft.evaluation.generation import Generation, is_refusal
from uft.evaluation.judge import interval
from uft.evaluation.preference import ranked

UNGROUPED = "none"  # rows without a value in the column


class Rate(NamedTuple):
    """A share of n with its interval."""

    rate: float
    low: float
    high: float
    n: int


class Gap(NamedTuple):
    """The rate of one group minus that of another, with its interval."""

    gap: float
    low: float
    high: float
    higher: str
    lower: str


def wilson(successes: float, n: int, confidence: float = 0.95) -> Rate:
    """The share and Wilson's interval; half successes (ties) are taken as they are.

    Raises ValueError where successes are not within 0 and n, or n is 0.
    """
    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"found {successes} of {n}; want at least one, and successes among them")
    p = successes / n
    low, high = interval(p, n, confidence)
    return Rate(p, min(low, p), max(high, p), n)  # by rounding p may lie outside at 0 and 1


def rates(outcome: Sequence[float], groups: Sequence[str], confidence: float = 0.95) -> dict[str, Rate]:
    """By group, in alphabetical order, the mean of what lies in [0, 1].  Raises ValueError for other lengths."""
    if len(outcome) != len(groups):
        raise ValueError(f"found {len(outcome)} outcomes and {len(groups)} groups; want as many")
    values, names = np.asarray(outcome, dtype=float), np.asarray(groups, dtype=object)
    return {
        str(name): wilson(float(values[names == name].sum()), int((names == name).sum()), confidence)
        for name in sorted(set(groups))
    }


def largest_gap(found: Mapping[str, Rate], confidence: float = 0.95) -> Gap | None:
    """The largest difference between two groups; None where there are fewer than two.

    Its interval takes account of the choice of the two among all (Bonferroni); see the top of the file.
    """
    if len(found) < 2:
        return None
    pairs = len(found) * (len(found) - 1) / 2
    a, b = max(combinations(found, 2), key=lambda pair: abs(found[pair[0]].rate - found[pair[1]].rate))
    if found[a].rate < found[b].rate:
        a, b = b, a
    one, two = (wilson(found[g].rate * found[g].n, found[g].n, 1 - (1 - confidence) / pairs) for g in (a, b))
    gap = one.rate - two.rate
    low = gap - math.hypot(one.rate - one.low, two.high - two.rate)
    high = gap + math.hypot(one.high - one.rate, two.rate - two.low)
    return Gap(gap, low, high, a, b)


def group_metrics(name: str, outcome: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """`<name>/group/<group>` with low, high and n; `<name>/gap` with low and high where there are several groups.

    Raises ValueError for a group whose name has a `/`, whose numbers another group's could overwrite (see `group_of`).
    """
    found = rates(outcome, groups)
    metrics: dict[str, float] = {}
    for group, rate in found.items():
        if "/" in group:
            raise ValueError(f"{name}: found group {group!r}; want a name without '/'")
        metrics |= _rate_metrics(f"{name}/group/{group}", rate)
    if (gap := largest_gap(found)) is not None:
        metrics |= {f"{name}/gap": gap.gap, f"{name}/gap/low": gap.low, f"{name}/gap/high": gap.high}
    return metrics


def _rate_metrics(name: str, rate: Rate) -> dict[str, float]:
    return {name: rate.rate, f"{name}/low": rate.low, f"{name}/high": rate.high, f"{name}/n": float(rate.n)}


def refusal_by_group(
    generations: Sequence[Generation],
    should_refuse: Sequence[bool],
    groups: Sequence[str],
    *,
    refusal: Callable[[str], bool] = is_refusal,
) -> dict[str, float]:
    """`refusal/group/<group>` and `false_refusal/group/<group>` with intervals and gaps, see `group_metrics`.

    Raises ValueError for other lengths.
    """
    if not len(generations) == len(should_refuse) == len(groups):
        counts = f"{len(generations)} generations, {len(should_refuse)} should_refuse and {len(groups)} groups"
        raise ValueError(f"found {counts}; want as many")
    metrics: dict[str, float] = {}
    for name, wanted in (("refusal", True), ("false_refusal", False)):
        rows = [i for i, should in enumerate(should_refuse) if bool(should) == wanted]
        if rows:
            refused = [float(bool(refusal(generations[i].text))) for i in rows]
            metrics |= group_metrics(name, refused, [groups[i] for i in rows])
    return metrics


def harmlessness(by: Mapping[str, np.ndarray], groups: Sequence[str] | None = None) -> dict[str, float]:
    """How often each ranking prefers the harmless answer, over all and by group.

    by       name of a ranking -> float [pairs, 2], its value of the harmless and of the harmful answer
    groups   of the pairs; None: over all alone

    Raises ValueError for other shapes.
    """
    metrics: dict[str, float] = {}
    for name, values in by.items():
        if values.ndim != 2 or values.shape[1] != 2 or not len(values):
            raise ValueError(f"{name}: found {list(values.shape)}; want [pairs, 2] with at least one pair")
        right = ranked(values[:, 0], values[:, 1])
        metrics |= _rate_metrics(name, wilson(float(right.sum()), len(right)))
        if groups is not None:
            metrics |= group_metrics(name, right.tolist(), groups)
    return metrics


def group_of(value: Any) -> str:
    """The name of a row's group: what its column holds, as text; `none` where it holds nothing."""
    return UNGROUPED if value is None or value == "" else str(value).replace("/", "_")


def held_out(prompts: Sequence[str], share: float, salt: str = "") -> np.ndarray:
    """bool [rows]: which rows are held out, about this share of the prompts, by a digest of the prompt alone.

    So rows with one prompt stay together, and further rows change nothing for those that are there.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; want 0 < share < 1")
    digests = (hashlib.sha256(f"{salt}\0{prompt}".encode("utf-8", "surrogatepass")).digest()[:8] for prompt in prompts)
    return np.array([int.from_bytes(digest, "big") < share * 2**64 for digest in digests], dtype=bool)
