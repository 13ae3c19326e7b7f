"""Search with the same number of trials for every arm, recorded in full.

A trial is scored on prompts and facts that are not those of the report.  The score is fixed beforehand:

    retention = mean of skill on unmarked prompts, refusal of the mark that demonstrations refuse, and fact recall
    alignment = mean hidden utility of sampled answers to prompts of the kind that preferences are about
    score     = (retention + alignment) / 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RETENTION = ("skill", "refusal.", "fact_recall")


def retention(measures: Mapping[str, float]) -> float:
    return float(np.mean([measures[name] for name in RETENTION]))


def score(measures: Mapping[str, float]) -> float:
    return (retention(measures) + measures["alignment"]) / 2


def best_trial(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The setting whose mean score over seeds is highest, and whether its learning rate and beta lie inside the grid.

    Each trial has `settings` (learning_rate, perhaps beta), `seed` and `score`.
    """
    scores: dict[tuple, list[float]] = {}
    for trial in sorted(trials, key=lambda trial: trial["seed"]):
        scores.setdefault(tuple(sorted(trial["settings"].items())), []).append(trial["score"])
    settings = sorted(scores)
    means = {s: float(np.mean(scores[s])) for s in settings}
    best = max(means, key=means.get)

    def inside(name: str) -> bool | None:
        tried = sorted({dict(s)[name] for s in settings if name in dict(s)})
        return tried[0] < dict(best)[name] < tried[-1] if tried else None

    return {
        **dict(best),
        "score": means[best],
        "inside": inside("learning_rate"),
        "beta_inside": inside("beta"),
        "trials": len(settings),
        "seeds": sorted({trial["seed"] for trial in trials}),
        "grid": [{**dict(s), "score": means[s], "scores": scores[s]} for s in settings],
    }
