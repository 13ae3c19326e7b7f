"""Search with the same number of trials for every arm, recorded in full.

A trial is scored on prompts and facts that are not those of the report.  The score is fixed beforehand:

    retention = mean of skill on unmarked prompts, refusal of the mark that demonstrations refuse, and fact recall
    alignment = mean hidden utility of sampled answers to prompts of the kind that preferences are about
    score     = (retention + alignment) / 2

Every arm begins with the same design in its own ranges: their middle, and corners half way to it.  A Gaussian process
(optuna) chooses the other trials; the best few are then tried on more base models, and the mean over all decides.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .runs import Plan, Record, Runner, Settings, run_sharing

RETENTION = ("skill", "refusal.", "fact_recall")
DESIGNED, TRIALS, FINALISTS = 5, 10, 3
EDGE = 0.05  # of a range's logarithmic width: what lies nearer to an end is called "at the edge"

Space = Mapping[str, tuple[float, float]]
"""The range of each setting, searched on a logarithmic scale."""


def retention(measures: Mapping[str, float]) -> float:
    return float(np.mean([measures[name] for name in RETENTION]))


def score(measures: Mapping[str, float]) -> float:
    return (retention(measures) + measures["alignment"]) / 2


def designed(space: Space) -> list[Settings]:
    """The first DESIGNED trials: five evenly spaced values of one setting; of more, the middle and four corners that
    lie half way between it and the ends (of three settings, a half fraction of the eight)."""
    places: list[tuple[float, ...]] = [(p,) for p in (0.1, 0.3, 0.5, 0.7, 0.9)]
    if len(space) > 1:
        signs = [(*s, math.prod(s))[: len(space)] for s in product((-1, 1), repeat=2)]
        places = [(0.5,) * len(space), *(tuple(0.5 + 0.25 * each for each in s) for s in signs)]
    return [
        {name: _rounded(low * (high / low) ** p) for (name, (low, high)), p in zip(space.items(), place)}
        for place in places
    ]


def search(
    spaces: Mapping[str, Space], seeds: Sequence[int], plan_of: Callable[[str, int, Settings], Plan],
    judge: Callable[[str, Record], float], run: Runner, title: str = "search", store: Path | None = None,
    trials: int = TRIALS, finalists: int = FINALISTS,
) -> dict[str, Any]:  # fmt: skip
    """Arm -> its best settings, with every trial's score.  All arms have a trial each in every round.

    seeds     the base model of all trials, then those that the best ones are tried on as well
    plan_of   (arm, seed, settings) -> what a trial runs
    judge     (arm, record) -> its score; higher is better
    store     a file in which optuna keeps the studies (its journal); an interrupted search goes on, with or without,
              since runs are cached and each trial is a function of those before
    """
    studies = {arm: _Study(arm, space, plan_of, seeds[0], store) for arm, space in spaces.items()}
    for k in range(trials):
        asked = {arm: study.ask(k) for arm, study in studies.items()}
        results = _run(asked.items(), seeds[0], plan_of, run, f"{title}, trial {k + 1} of {trials}")
        for (arm, settings), result in zip(asked.items(), results):
            studies[arm].tell(settings, judge(arm, result))
    if len(seeds) > 1 and finalists:
        again = [(arm, settings) for arm, study in studies.items() for settings in study.best(finalists)]
        for seed in seeds[1:]:
            results = _run(again, seed, plan_of, run, f"{title}, the best {finalists} on seed {seed}")
            for (arm, settings), result in zip(again, results):
                studies[arm].scores[_key(settings)].append(judge(arm, result))
    return {arm: study.found(seeds) for arm, study in studies.items()}


def _run(asked, seed: int, plan_of, run: Runner, title: str) -> list[Record]:
    return run_sharing([(_named(arm, s, seed), plan_of(arm, seed, s)) for arm, s in asked], run, title)


def _named(arm: str, settings: Settings, seed: int) -> str:
    return f"{arm} {' '.join(f'{k}={v:g}' for k, v in settings.items())} seed {seed}"


class _Study:
    """One arm's trials."""

    def __init__(self, arm: str, space: Space, plan_of, seed: int, store: Path | None):
        try:
            import optuna
        except ImportError:
            raise ImportError("searching needs optuna: pip install 'unified-finetuning[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self.optuna, self.space, self.seed = optuna, space, seed
        self.scores: dict[str, list[float]] = {}  # by settings, as JSON
        storage = None
        if store is not None:
            store.parent.mkdir(parents=True, exist_ok=True)
            backend = optuna.storages.journal.JournalFileBackend(str(store))
            storage = optuna.storages.JournalStorage(backend)
        # trials of other code, data or ranges are trials of another study
        about = [space, plan_of(arm, seed, designed(space)[0]).key]
        version = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        self.study = optuna.create_study(
            storage=storage, study_name=f"{arm} {version}", direction="maximize", load_if_exists=True
        )

    def ask(self, k: int) -> Settings:
        """Settings of trial k, a function of the trials before."""
        if k < DESIGNED:
            return designed(self.space)[k]
        gaussian = self.optuna.samplers.GPSampler(seed=k, n_startup_trials=0, deterministic_objective=False)
        # only those of this call, so that a stored study that is further on changes nothing
        told = self.optuna.create_study(direction="maximize", sampler=gaussian)
        for settings, scores in self.scores.items():
            told.add_trial(self._trial(json.loads(settings), scores[0]))
        for attempt in range(100):
            asked = told.ask(self._distributions())
            settings = {name: _rounded(asked.params[name]) for name in self.space}
            if _key(settings) not in self.scores:
                break
            # asked before, as at the end of a range: anything else teaches more
            told.sampler = self.optuna.samplers.RandomSampler(seed=100 * k + attempt)
        return settings

    def tell(self, settings: Settings, score: float) -> None:
        self.scores.setdefault(_key(settings), [score])
        if len(self.study.trials) < len(self.scores):
            self.study.add_trial(self._trial(settings, score))

    def _trial(self, settings: Settings, score: float):
        return self.optuna.trial.create_trial(params=settings, distributions=self._distributions(), value=score)

    def _distributions(self) -> dict[str, Any]:
        floats = self.optuna.distributions.FloatDistribution
        return {name: floats(low, high, log=True) for name, (low, high) in self.space.items()}

    def best(self, count: int) -> list[Settings]:
        ranked = sorted(self.scores, key=lambda s: -self.scores[s][0])
        return [json.loads(s) for s in ranked[:count]]

    def found(self, seeds: Sequence[int]) -> dict[str, Any]:
        return best_trial(self.space, self.scores, seeds)


def best_trial(space: Space, scores: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> dict[str, Any]:
    """The settings whose mean score is highest among those tried on the most seeds, and whether they lie inside.

    scores   settings, as JSON -> their scores, in the order of `seeds`
    """
    means = {settings: float(np.mean(found)) for settings, found in scores.items()}
    most = max(map(len, scores.values()))
    best = max((settings for settings, found in scores.items() if len(found) == most), key=means.get)
    chosen = json.loads(best)

    def inside(name: str) -> bool | None:
        if name not in space:
            return None
        low, high = space[name]
        if low == high:
            return False
        return EDGE <= math.log(chosen[name] / low) / math.log(high / low) <= 1 - EDGE

    return {
        **chosen,
        "score": means[best],
        "inside": inside("learning_rate"),
        "beta_inside": inside("beta"),
        "trials": len(scores),
        "seeds": list(seeds),
        "space": {name: list(ends) for name, ends in space.items()},
        "grid": [{**json.loads(s), "score": means[s], "scores": list(found)} for s, found in scores.items()],
    }


def grid_search(
    grids: Mapping[str, Sequence[Settings]], seeds: Sequence[int], plan_of: Callable[[str, int, Settings], Plan],
    judge: Callable[[str, Record], float], run: Runner, title: str = "search",
) -> dict[str, Any]:  # fmt: skip
    """As `search`, over settings that are listed: all of them on every seed."""
    trials = [(arm, seed, settings) for arm, seed in product(grids, seeds) for settings in grids[arm]]
    results = run_sharing([(_named(arm, s, seed), plan_of(arm, seed, s)) for arm, seed, s in trials], run, title)
    scores: dict[str, dict[str, list[float]]] = {arm: {} for arm in grids}
    for (arm, _, settings), result in zip(trials, results):
        scores[arm].setdefault(_key(settings), []).append(judge(arm, result))
    found = {}
    for arm, listed in grids.items():
        tried = {name: sorted({s[name] for s in listed}) for name in listed[0]}
        found[arm] = best_trial({name: (values[0], values[-1]) for name, values in tried.items()}, scores[arm], seeds)
    return found


def _key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)


def _rounded(value: float) -> float:
    """To three digits, which is how settings are reported."""
    return float(f"{value:.3g}")
