"""The search: as many trials for every arm, found again after an interruption, and it finds what is there."""

import json
import math
from dataclasses import dataclass

import pytest

from experiments.search import DESIGNED, FINALISTS, TRIALS, best_trial, designed, grid_search, retention, score, search

SPACES = {
    "one": {"learning_rate": (1e-5, 1e-2)},
    "two": {"learning_rate": (1e-4, 1e-1), "beta": (0.1, 10.0)},
    "three": {"learning_rate": (1e-4, 1e-1), "beta": (0.1, 10.0), "first_rate": (1e-4, 1e-1)},
}
BEST = {"learning_rate": 7e-4, "beta": 2.0, "first_rate": 3e-3}


@dataclass(frozen=True)
class FakePlan:
    arm: str
    seed: int
    settings: str
    stages: tuple = ("one",)

    @property
    def key(self) -> str:
        return f"{self.arm} {self.settings} {self.seed}"


def plan_of(arm, seed, settings):
    return FakePlan(arm, seed, json.dumps(settings))


def judge(arm, record):
    return record["score"]


class Runner:
    """Scores a plan by its distance from the best settings; stops where it is told to."""

    def __init__(self, stop_after: int | None = None):
        self.ran, self.stop_after = [], stop_after

    def __call__(self, plans, title, keep_last):
        results = []
        for _, plan in plans:
            if self.stop_after is not None and len(self.ran) >= self.stop_after:
                raise KeyboardInterrupt
            self.ran.append(plan)
            settings = json.loads(plan.settings)
            distance = sum(math.log10(value / BEST[name]) ** 2 for name, value in settings.items())
            results.append({"score": 1.0 - 0.3 * distance + 0.01 * plan.seed})
        return results


def test_score_by_hand():
    measures = {"skill": 0.9, "refusal.": 0.6, "fact_recall": 0.3, "alignment": 0.8}
    assert retention(measures) == pytest.approx(0.6)
    assert score(measures) == pytest.approx(0.7)


@pytest.mark.parametrize("name", SPACES)
def test_the_design_lies_inside_and_is_balanced(name):
    space = SPACES[name]
    found = designed(space)
    assert len(found) == len({json.dumps(s) for s in found}) == DESIGNED
    for setting, (low, high) in space.items():
        places = [math.log(s[setting] / low) / math.log(high / low) for s in found]
        assert min(places) > 0.05 and max(places) < 0.95
        assert sum(places) / len(places) == pytest.approx(0.5, abs=0.01)  # as often above the middle as below


@pytest.fixture(scope="module")
def found():
    runner = Runner()
    return search(SPACES, (5, 6, 7), plan_of, judge, runner, "search"), runner


def test_every_arm_has_as_many_trials_and_the_best_again_on_other_seeds(found):
    settings, runner = found
    for arm, best in settings.items():
        own = [plan for plan in runner.ran if plan.arm == arm]
        first = [plan for plan in own if plan.seed == 5]
        assert len(first) == len({plan.settings for plan in first}) == TRIALS == best["trials"]
        for seed in (6, 7):
            again = {plan.settings for plan in own if plan.seed == seed}
            ranked = sorted(best["grid"], key=lambda trial: -trial["scores"][0])[:FINALISTS]
            assert {json.dumps({k: v for k, v in trial.items() if k in SPACES[arm]}) for trial in ranked} == again
        assert best["seeds"] == [5, 6, 7]


def test_it_finds_what_is_there(found):
    for arm, best in found[0].items():
        assert best["inside"]
        for name in SPACES[arm]:
            assert abs(math.log10(best[name] / BEST[name])) < (0.3 if len(SPACES[arm]) < 3 else 0.6), (arm, name)


def test_an_interrupted_search_ends_as_a_whole_one(found, tmp_path):
    """Runs are cached elsewhere; here the same trials must be asked for, with or without a journal."""
    store = tmp_path / "search.journal"
    with pytest.raises(KeyboardInterrupt):
        search(SPACES, (5, 6, 7), plan_of, judge, Runner(stop_after=3 * 7 + 1), "search", store)
    again = search(SPACES, (5, 6, 7), plan_of, judge, Runner(), "search", store)
    assert again == found[0]


def test_the_journal_is_one_that_optuna_reads(tmp_path):
    import optuna

    store, spaces = tmp_path / "search.journal", {"two": SPACES["two"]}
    search(spaces, (5,), plan_of, judge, Runner(), "search", store, trials=6)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(store)))
    [summary] = optuna.get_all_study_summaries(storage)
    assert summary.n_trials == 6 and summary.study_name.startswith("two ")
    # another range is another study
    search({"two": {**SPACES["two"], "beta": (0.2, 5.0)}}, (5,), plan_of, judge, Runner(), "search", store, trials=1)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(store)))
    assert sorted(s.n_trials for s in optuna.get_all_study_summaries(storage)) == [1, 6]


def test_the_mean_over_seeds_decides_among_those_tried_on_all():
    scores = {
        '{"learning_rate": 1.0}': [0.9, 0.1],
        '{"learning_rate": 2.0}': [0.6, 0.6],
        '{"learning_rate": 3.0}': [0.8],
    }
    found = best_trial({"learning_rate": (0.5, 8.0)}, scores, (0, 1))
    assert found["learning_rate"] == 2 and found["score"] == pytest.approx(0.6) and found["trials"] == 3
    assert [trial["scores"] for trial in found["grid"]] == [[0.9, 0.1], [0.6, 0.6], [0.8]]


@pytest.mark.parametrize(
    "low, high, inside", [(1.9, 8.0, False), (0.5, 2.1, False), (0.5, 8.0, True), (2.0, 2.0, False)]
)
def test_the_edge_of_a_range(low, high, inside):
    found = best_trial({"learning_rate": (low, high)}, {'{"learning_rate": 2.0}': [0.5]}, (0,))
    assert found["inside"] is inside and found["beta_inside"] is None


def test_a_grid_is_tried_whole_on_every_seed():
    runner = Runner()
    grid = [{"learning_rate": rate} for rate in (1e-4, 1e-3, 1e-2)]
    found = grid_search({"one": grid, "two": grid}, (0, 1), plan_of, judge, runner)
    assert len(runner.ran) == 12
    assert found["one"]["learning_rate"] == 1e-3 and found["one"]["inside"] and found["one"]["trials"] == 3
