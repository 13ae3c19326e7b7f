"""Exact paths: arms are what they say, and what is written says what was found."""

import json

import numpy as np
import pytest
from matplotlib import image

from experiments import exact_paths
from experiments.exact_paths import ARMS, NORMAL, RATES, TOY, Chosen, tuned
from experiments.exact_report import Truth, judged, path_of
from experiments.lab.enumerable.optimum import Front
from experiments.lab.enumerable.paths import Plan
from experiments.lab.enumerable.world import World
from uft.presets import make_objective

CHOSEN = Chosen({"sft": 1e-3, "dpo": 2e-3}, 0.3, (0.6, 0.4))


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_takes_the_same_steps_and_examples(name):
    stages = ARMS[name].stages(3e-3, CHOSEN)
    assert sum(stage.share for stage in stages) == 1
    demonstrations, preferences = (
        sum(stage.share * getattr(stage, kind) for stage in stages) for kind in ("demonstrations", "preferences")
    )
    alone = {"sft": (1, 0), "dpo": (0, 1)}
    assert (demonstrations, preferences) == alone.get(name, (0.5, 0.5))
    assert stages[-1].learning_rate == 3e-3
    for stage in stages:
        objective = make_objective(stage.objective)
        assert all(getattr(term, "beta", 0.3) == 0.3 for term in objective.terms)
        assert objective.kinds_with_reference or stage.reference == "base"


def test_sequences_begin_with_the_tuned_arm():
    first, last = ARMS["sft_dpo"].stages(5e-3, CHOSEN)
    assert (first.objective, first.learning_rate, last.reference) == ({"preset": "sft"}, 1e-3, "start")
    assert ARMS["sft_dpo_base"].stages(5e-3, CHOSEN)[1].reference == "base"
    first, last = ARMS["dpo_sft"].stages(5e-3, CHOSEN)
    assert first.objective == {"preset": "dpo", "beta": 0.3} and last.objective == {"preset": "sft"}
    (stage,) = ARMS["maxright"].stages(5e-3, CHOSEN)
    assert make_objective(stage.objective).balancer.optimum == {"sft": 0.6, "preference": 0.4}


def test_plans_differ():
    plans = [Plan(arm.stages(3e-3, CHOSEN), seed, NORMAL, World()) for arm in ARMS.values() for seed in (0, 1)]
    assert len({plan.key for plan in plans}) == len(plans)


def test_sequences_are_tuned_after_what_they_begin_with(monkeypatch):
    asked = []

    def plan_of(name, seed, rate, found):
        asked.append(name)
        rates = {arm: found[arm]["learning_rate"] for arm in ("sft", "dpo") if arm in found}
        return Plan(ARMS[name].stages(rate, CHOSEN._replace(rates=rates)), seed, NORMAL, World())

    def run(plans, title, keep_last):
        # 1e-3 is best for whatever judges
        gap = [abs(plan.stages[-1].learning_rate - 1e-3) for _, plan in plans]
        return [{"measures": {"sft": g, "dpo": g, "ideal": g}} for g in gap]

    monkeypatch.setattr(exact_paths, "judged", lambda truth, measures: {})
    found = tuned(["sft", "dpo", "sft_dpo", "joint_50", "joint_75"], plan_of, None, run)
    assert {arm: chosen["learning_rate"] for arm, chosen in found.items()} == dict.fromkeys(found, 1e-3)
    assert set(asked[: 2 * len(RATES)]) == {"sft", "dpo"} and "joint_75" not in asked
    assert found["joint_75"] == found["joint_50"] and found["sft_dpo"]["trials"] == len(RATES)


def test_the_experiment_runs(tmp_path, monkeypatch):
    """Jobs run here instead of in processes of their own."""

    def here(jobs, cache, **options):
        cache.mkdir(parents=True, exist_ok=True)
        return [json.loads(json.dumps(job.function(**job.arguments))) for job in jobs]

    monkeypatch.setattr(exact_paths, "run_jobs", here)
    arms = ["sft", "sft_dpo", "joint_50", "maxright", "kto_nll"]
    assert exact_paths.main(["--quick", "--output", str(tmp_path), "--arms", *arms]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["arms"]) == [*arms, "limit"] and summary["scale"]["steps"] == TOY.steps
    base = summary["base"]
    for name, arm in summary["arms"].items():
        (path,) = arm["paths"]
        assert path[0]["sft"] == pytest.approx(base["sft"]) and path[0]["kl_base"] == pytest.approx(0, abs=1e-12)
        assert path[0]["dpo"] == pytest.approx(np.log(2))
        assert [point.get("boundary") for point in path].count(True) == (name == "sft_dpo")
        assert arm["measures"]["front"]["mean"] > 0 and (name == "limit" or arm["compute"][0]["flops"] > 0)
        assert arm["measures"]["closest"]["mean"] <= arm["measures"]["ideal"]["mean"]
    text = (tmp_path / "report.md").read_text()
    assert "The transformer itself" in text and "Of the sequential arms" in text and "paired by seed" in text
    for name in ("losses", "reward", "kl"):
        assert f"({name}.png)" in text
        assert np.ptp(image.imread(tmp_path / f"{name}.png")[..., :3]) > 0.5


def test_paths_of_stages_are_one_path():
    first = [{"sft": 1.0, "step": 0}, {"sft": 0.5, "step": 3}]
    second = [{"sft": 0.5, "step": 0}, {"sft": 0.7, "step": 3}]
    points = path_of({"stages": [{"path": first}, {"path": second}]})
    assert [point["sft"] for point in points] == [1.0, 0.5, 0.7]
    assert [point.get("boundary", False) for point in points] == [False, True, False]


def test_what_was_avoidable_is_what_the_front_has_not():
    front = Front(np.array([1.0, 2.0, 3.0]), np.array([10.0, 4.0, 0.0]), np.array([0, 0.5, 1]), None)
    rewards = Front(np.array([1.0, 2.0]), np.array([-1.0, -2.0]), np.array([0, 0.5]), None)
    truth = Truth(front, rewards, rewards)
    found = judged(truth, {"sft": 2.5, "dpo": 4.0, "reward": 1.0, "kl_base": 1.5})
    assert found["forgotten"] == pytest.approx(1.5) and found["avoidable"] == pytest.approx(0.5)
