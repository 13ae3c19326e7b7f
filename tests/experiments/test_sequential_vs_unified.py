"""The main comparison: its arms as data, its committed search and results, and a run of toy size from end to end."""

import json

import numpy as np
import pytest

from experiments.arms import ARMS, DOCUMENTS, RANK, REPLAY, TRAINED, with_beta
from experiments.lab.training import Scale, design_flops, run_plan
from experiments.reporting.tables import LIKE_WITH_LIKE
from experiments.runs import SFT_STAGE
from experiments.search import TRIALS, designed
from experiments.sequential_vs_unified import (
    CONTRAST_SEEDS,
    MAIN,
    RESULTS,
    SEARCH_SEEDS,
    SEEDS,
    TOY,
    VARIANTS,
    contrasted,
    main,
    plan_of,
)
from uft.presets import make_objective


def chosen():
    return json.loads((RESULTS / "search.json").read_text())


@pytest.mark.parametrize("arm", TRAINED)
def test_every_arm_is_stages_that_can_be_trained(arm):
    for variant in VARIANTS:
        space = ARMS[arm].space_for(variant)
        assert set(space) <= {"learning_rate", "beta", "first_rate"} and "learning_rate" in space
        assert all(0 < low < high for low, high in space.values())
        tuned = {arm: designed(space)[0], SFT_STAGE: {"learning_rate": 1e-4}}
        for equal in ("flops", "examples"):
            plan = plan_of(arm, 0, variant, TOY, equal, tuned)
            stages = [branch for stage in plan.stages for branch in stage.parallel or (stage,)]
            if reinforced := [stage.rl for stage in stages if stage.rl is not None]:
                assert reinforced[0].kl == pytest.approx(tuned[arm]["beta"])
                continue
            objectives = [make_objective(stage.objective) for stage in stages]  # which refuses what is unknown
            if beta := tuned[arm].get("beta"):
                numbers = [number for o in objectives for t in o.terms for number in (getattr(t, "beta", 0), t.weight)]
                assert any(number == pytest.approx(beta) for number in numbers), "the searched beta is used"


def test_beta_goes_where_it_is_asked_for():
    assert with_beta("dpo", 0.5) == {"preset": "dpo", "beta": 0.5}
    assert with_beta({"preset": "dpo_nll", "balance": "alright"}, 2.0)["beta"] == 2.0
    terms = {"sft": {"loss": "nll"}, "preference": {"loss": "cpo", "beta": None}, "balance": "alright"}
    assert with_beta(terms, 3.0) == {**terms, "preference": {"loss": "cpo", "beta": 3.0}}
    assert with_beta("sft", None) == "sft"


def test_the_arms_that_the_question_needs_are_there():
    families = {name: arm.family for name, arm in ARMS.items()}
    assert {"sft", "sft_chosen"} <= {n for n, f in families.items() if f == "control"}
    assert {f"sft_{loss}" for loss in ("dpo", "ipo", "kto", "simpo", "una", "orpo")} <= set(ARMS)
    assert {"sft_dpo_replay", "sft_dpo_documents", "dpo_sft", "paft_linear", "paft_ties"} <= set(ARMS)
    joint = {n for n, f in families.items() if f == "unified"}
    assert joint == {
        "dpo_nll",
        "dpo_nll_documents",
        "mpo",
        "cpo",
        "orpo",
        "kto_nll",
        "uft",
        "uft_nll",
        "alright",
        "maxright",
    }
    assert set(MAIN) <= set(ARMS) and len(CONTRAST_SEEDS) == 10
    assert set(SEEDS) <= set(CONTRAST_SEEDS) and not set(SEARCH_SEEDS) & set(CONTRAST_SEEDS)


def test_the_contrasts_are_chosen_by_the_search():
    found = {name: {"score": 0.5} for name in TRAINED} | {"mpo": {"score": 0.6}, "sft_ipo": {"score": 0.7}}
    assert contrasted(list(ARMS), found) == ["mpo", "sft_ipo", "sft_chosen"]
    assert contrasted(["base", "sft_dpo"], found) == []


def test_adapters_trained_apart_are_of_one_rank():
    tuned = {"paft_ties": {"learning_rate": 1e-3, "beta": 1.0}}
    [stage] = plan_of("paft_ties", 0, VARIANTS[0], TOY, "flops", tuned).stages
    assert stage.lora == RANK and [branch.name for branch in stage.parallel] == ["sft", "dpo"]
    assert {branch.learning_rate for branch in stage.parallel} == {1e-3}


def test_the_committed_search_holds_every_arm_and_all_its_trials():
    found = chosen()
    searched = [variant for variant in VARIANTS if variant in found]
    assert searched[0] == VARIANTS[0]
    for arms in (found[variant] for variant in searched):
        assert {settings["trials"] for settings in arms.values()} == {TRIALS}  # as many for every arm
        assert set(arms) == {SFT_STAGE, *TRAINED}
        for settings in arms.values():
            assert settings["seeds"] == list(SEARCH_SEEDS)
            finalists = [trial for trial in settings["grid"] if len(trial["scores"]) == len(SEARCH_SEEDS)]
            assert settings["trials"] == len(settings["grid"]) and len(finalists) == 3
            assert settings["score"] == max(trial["score"] for trial in finalists)


def test_sequential_arms_share_their_supervised_stage():
    tuned = chosen()[VARIANTS[0]]
    plans = {name: plan_of(name, 0, VARIANTS[0], TOY, "flops", tuned) for name, arm in ARMS.items() if arm.after_sft}
    assert len(plans) >= 4
    assert len({plan.prefix(1).key for plan in plans.values()}) == 1
    assert all(len(plan.stages) == 2 for plan in plans.values())


def test_equal_examples_of_each_kind():
    tuned = chosen()[VARIANTS[0]]
    for name in TRAINED:
        if name == "sft":  # which has no preferences to draw
            continue
        stages = plan_of(name, 0, VARIANTS[0], TOY, "examples", tuned).stages
        stages = [branch for stage in stages for branch in stage.parallel or (stage,)]
        assert sum(stage.demonstrations for stage in stages) == pytest.approx(1.0), name
        if not any(stage.rl for stage in stages):  # whose reward model gets them all
            assert sum(stage.preferences for stage in stages) == pytest.approx(1.0), name
        replayed = {"sft_dpo_all_both": 2 * DOCUMENTS}.get(name, REPLAY if "documents" in name else 0.0)
        assert sum(stage.documents for stage in stages) == replayed
        assert all(stage.budget == "examples" for stage in stages)


def test_the_design_costs_what_its_stages_cost(tmp_path):
    """The compute that every arm gets is that of supervised training and DPO on the design's draws."""
    scale = Scale(demonstrations=128, preferences=64, sft_draws=256, preference_draws=128, per_operator=2, points=0)
    tuned = {name: {"learning_rate": 1e-4, "beta": 0.1} for name in ("sft_dpo", SFT_STAGE)}
    plan = plan_of("sft_dpo", 0, VARIANTS[0], scale, "examples", tuned)
    record = run_plan(plan, str(tmp_path), curves=False)
    assert record["compute"]["flops"] == pytest.approx(design_flops(plan), rel=0.02)
    assert [stage["steps"] for stage in record["stages"]] == [4, 2]


def committed():
    tables = json.loads((RESULTS / "summary.json").read_text())["tables"]
    [title] = [title for title in tables if "FLOPs" in title]
    return tables[title]


# what the weights, or the responses that are written, decide while training: a step's cost is known in the mean alone
ESTIMATED = {"alright": 0.04, "maxright": 0.06, "sft_rm_ppo": 0.025, "sft_rm_rloo": 0.025}


def test_the_committed_results_had_equal_compute():
    for variant in committed().values():
        flops = {name: [run["flops"] for run in arm["compute"] if run] for name, arm in variant.items()}
        design = np.median([x for found in flops.values() for x in found])
        for name, found in flops.items():
            assert all(abs(x / design - 1) < ESTIMATED.get(name, 0.01) for x in found), name


def test_the_committed_contrasts_had_ten_seeds_and_the_rest_three():
    summary = json.loads((RESULTS / "summary.json").read_text())
    for name, variant in committed().items():
        ten = {*contrasted(list(ARMS), summary["search"][name]), *(arm for pair in LIKE_WITH_LIKE for arm in pair)}
        for arm, found in variant.items():
            seeds = sorted(map(int, found["per_seed"]["score"]))
            assert seeds == sorted(CONTRAST_SEEDS if arm in ten else SEEDS), arm


def test_the_world_is_what_it_should_be():
    """Supervised training teaches the skills; imitating chosen answers stays below the best policy, whose alignment is
    1, in every form of preferences."""
    for variant in committed().values():
        assert variant["sft"]["measures"]["skill"]["mean"] >= 0.95
        assert variant["sft_chosen"]["measures"]["alignment"]["mean"] <= 0.9


@pytest.mark.parametrize(
    "words", ["--quick --search", "--quick --results", "--variants labels", "--results --arms base"]
)
def test_what_would_overwrite_or_lacks_settings_is_refused(words, tmp_path):
    before = (RESULTS / "search.json").read_bytes()
    with pytest.raises(SystemExit):
        main([*words.split(), "--output", str(tmp_path)])
    assert (RESULTS / "search.json").read_bytes() == before


def test_an_arm_without_settings_is_named(tmp_path, monkeypatch, capsys):
    known = json.loads((RESULTS / "search.json").read_text())
    del known[VARIANTS[0]]["dpo_nll"]
    (tmp_path / "search.json").write_text(json.dumps(known))
    monkeypatch.setattr("experiments.sequential_vs_unified.SEARCH", tmp_path / "search.json")
    with pytest.raises(SystemExit):
        main(["--arms", "sft", "dpo_nll", "--output", str(tmp_path)])
    assert "no settings were searched for dpo_nll (hedged_pairs)" in capsys.readouterr().err


def test_quick_comparison_end_to_end(tmp_path, capsys):
    words = ["--quick", "--output", str(tmp_path), "--arms", "base", "sft_chosen", "sft_dpo", "dpo_nll"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "unified DPO + NLL" in printed and "report.md" in printed
    names = {path.name for path in tmp_path.iterdir()}
    variant = VARIANTS[0]
    figures = {f"{kind}-{table}-{variant}.png" for kind in ("tradeoff", "curves", "forgetting")
               for table in ("flops", "examples")}  # fmt: skip
    assert {"report.md", "summary.json", *figures} <= names
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["tables"]) == {"Equal FLOPs (reference passes counted)", "Equal examples of each kind"}
    report = (tmp_path / "report.md").read_text()
    for figure in figures:
        assert figure in report
    # a second call finds every run in the cache
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.json")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.json")} == before
