"""The contrasts that were named beforehand, tested; and every arm beside the best sequential one, only described.

Named     best joint arm − best sequential arm; best joint arm − likelihood on demonstrations and chosen answers, on
          `score`.  "Best" is by the search, which never saw a reported base model, prompt or fact.
Test      sign flips of the differences paired by seed (`statistics.sign_flip`), adjusted by Holm over all contrasts
          of a report
Others    t-interval, interquartile mean, effect size: no claim
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.statistics import (
    Interval,
    effect_size,
    holm,
    interquartile_mean,
    interval,
    paired_difference,
    sign_flip,
)

BySeed = Mapping[int, float]


class Contrast(NamedTuple):
    """a − b of one measure, over the seeds that both have.

    p, p_holm   of a mean of 0 by sign flips, alone and adjusted; NaN below two seeds
    effect      mean in standard deviations of the differences
    """

    a: str
    b: str
    difference: Interval
    interquartile: float
    effect: float
    p: float
    p_holm: float


def contrast(a: str, b: str, of_a: BySeed, of_b: BySeed) -> Contrast:
    """Unadjusted."""
    seeds = sorted(set(of_a) & set(of_b))
    differences = [of_a[seed] - of_b[seed] for seed in seeds]
    p = sign_flip(differences) if len(seeds) > 1 else float("nan")
    found = paired_difference(of_a, of_b)
    return Contrast(a, b, found, interquartile_mean(differences), effect_size(differences), p, p)


def adjusted(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """With Holm's correction over all of them."""
    known = {str(k): c.p for k, c in enumerate(contrasts) if c.p == c.p}
    of_holm = holm(known)
    return [c._replace(p_holm=of_holm.get(str(k), c.p)) for k, c in enumerate(contrasts)]


def named(arms: Mapping[str, Any], chosen: Mapping[str, Any], present: Sequence[str]) -> list[tuple[str, str]]:
    """The two contrasts, as (joint arm, what it is compared with), as far as their arms are present.

    arms     name -> `Arm`, of which the family counts
    chosen   name -> what the search found, with its score
    """
    unified, sequential = (best_of(family, arms, chosen, present) for family in ("unified", "sequential"))
    found = [(unified, sequential)] if unified and sequential else []
    return found + ([(unified, "sft_chosen")] if unified and "sft_chosen" in present else [])


def best_of(family: str, arms: Mapping[str, Any], chosen: Mapping[str, Any], present: Sequence[str]) -> str | None:
    """The arm of a family with the best score in the search (not in what is reported)."""
    names = [name for name in present if arms[name].family == family and name in chosen]
    return max(names, key=lambda name: chosen[name]["score"], default=None)


def described(values: Sequence[float]) -> dict[str, float]:
    """What is reported of a measure of one arm."""
    return {**interval(values)._asdict(), "interquartile_mean": interquartile_mean(values)}
