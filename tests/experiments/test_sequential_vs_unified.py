"""The main comparison: its arms as data, its committed search and results, and a run of toy size from end to end."""

import json

import numpy as np
import pytest

from experiments.lab.training import Scale, design_flops, run_plan
from experiments.sequential_vs_unified import ARMS, RESULTS, SFT_STAGE, TOY, TRIALS, VARIANTS, grid, main, plan_of


def chosen():
    return json.loads((RESULTS / "search.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.last is not None])
def test_every_arm_gets_the_same_number_of_different_trials(arm, variant):
    settings = grid(ARMS[arm], variant)
    assert len({tuple(sorted(s.items())) for s in settings}) == TRIALS


def test_the_committed_search_holds_every_arm_and_all_its_trials():
    found = chosen()
    assert set(VARIANTS) <= set(found)
    for arms in (found[variant] for variant in VARIANTS):
        assert len({settings["trials"] for settings in arms.values()}) == 1  # as many for every arm
        assert all(settings["inside"] for settings in arms.values())
        assert set(arms) == {SFT_STAGE, *(name for name, arm in ARMS.items() if arm.last is not None)}
        for settings in arms.values():
            assert settings["trials"] == len(settings["grid"])
            assert settings["score"] == max(trial["score"] for trial in settings["grid"])


def test_sequential_arms_share_their_supervised_stage():
    tuned = chosen()[VARIANTS[0]]
    plans = {name: plan_of(name, 0, VARIANTS[0], TOY, "flops", tuned) for name, arm in ARMS.items() if arm.after_sft}
    assert len(plans) >= 4
    assert len({plan.prefix(1).key for plan in plans.values()}) == 1
    assert all(len(plan.stages) == 2 for plan in plans.values())


def test_equal_examples_of_each_kind():
    tuned = chosen()[VARIANTS[0]]
    for name, arm in ARMS.items():
        if arm.last is not None and name != "sft":  # which has no preferences to draw
            stages = plan_of(name, 0, VARIANTS[0], TOY, "examples", tuned).stages
            assert sum(stage.demonstrations for stage in stages) == pytest.approx(1.0), name
            assert sum(stage.preferences for stage in stages) == pytest.approx(1.0), name
            assert all(stage.budget == "examples" for stage in stages)


def test_the_design_costs_what_its_stages_cost(tmp_path):
    """The compute that every arm gets is that of supervised training and DPO on the design's draws."""
    from experiments.lab.base import load_base

    scale = Scale(demonstrations=128, preferences=64, sft_draws=256, preference_draws=128, per_operator=2, points=0)
    tuned = {name: {"learning_rate": 1e-4, "beta": 0.1} for name in [*ARMS, SFT_STAGE]}
    plan = plan_of("sft_dpo", 0, VARIANTS[0], scale, "examples", tuned)
    record = run_plan(plan, str(tmp_path), curves=False)
    assert record["compute"]["flops"] == pytest.approx(design_flops(plan, load_base(0)), rel=0.02)
    assert [stage["steps"] for stage in record["stages"]] == [4, 2]


def test_the_committed_results_had_equal_compute():
    summary = json.loads((RESULTS / "summary.json").read_text())
    [title] = [title for title in summary["tables"] if "FLOPs" in title]
    for variant in summary["tables"][title].values():
        flops = [run["flops"] for arm in variant.values() for run in arm["compute"] if run]
        assert (max(flops) - min(flops)) / np.mean(flops) < 0.02


def test_the_world_is_what_it_should_be():
    """Supervised training teaches the skills; imitating chosen answers stays below the best policy, whose alignment is
    1, in two forms of preferences; every learning rate was chosen inside its grid (above)."""
    tables = json.loads((RESULTS / "summary.json").read_text())["tables"]
    [title] = [title for title in tables if "FLOPs" in title]
    found = tables[title]
    assert set(VARIANTS) <= set(found)
    for variant in VARIANTS:
        assert found[variant]["sft"]["measures"]["skill"]["mean"] >= 0.95
        assert found[variant]["sft_chosen"]["measures"]["alignment"]["mean"] <= 0.9


@pytest.mark.parametrize("words", [["--quick", "--search"], ["--quick", "--results"], ["--variants", "labels"]])
def test_what_would_overwrite_or_lacks_settings_is_refused(words, tmp_path):
    before = (RESULTS / "search.json").read_bytes()
    with pytest.raises(SystemExit):
        main([*words, "--output", str(tmp_path)])
    assert (RESULTS / "search.json").read_bytes() == before


def test_quick_comparison_end_to_end(tmp_path, capsys):
    words = ["--quick", "--output", str(tmp_path), "--arms", "base", "sft_chosen", "sft_dpo", "unified_dpo_nll"]
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
