"""What a comparison makes of runs that end otherwise than they should, and of what decides a run."""

import math
import shutil

import pytest
from comparison_workplace import COMPARISON, changed, read, uft, write

from uft.comparison import compare, runs
from uft.comparison.budget import Total
from uft.comparison.compare import Prepared
from uft.comparison.identity import decides, digest
from uft.comparison.planning import expected_of_all
from uft.comparison.recipe import Comparison
from uft.comparison.report import budget_line
from uft.comparison.report import write as write_report
from uft.comparison.summary import contrasts_of, summary_of
from uft.losses import tables
from uft.signals import Interrupted, Terminated

LOSS = """
from uft.losses.tables import register

@register
def squared_gap_of_{name}(chosen_reward, rejected_reward, *, gap=1.0):
    return (chosen_reward - rejected_reward - gap).square()
"""


def test_dry_run_gives_every_arm_what_the_deciding_arm_costs(workplace, capsys):
    costs = expected_of_all(Prepared.of(Comparison.of(COMPARISON)))
    decided, (joint,) = sum(each.flops for each in costs["sequential"]), costs["joint"]
    # nearest whole step; the last one of an epoch may be short
    assert abs(joint.flops - decided) <= joint.flops / joint.steps
    assert joint.steps != COMPARISON["max_steps"]
    costs = expected_of_all(Prepared.of(Comparison.of(COMPARISON | {"budget": {"steps": 7}})))
    assert costs["joint"][0].steps == 7 and [each.steps for each in costs["sequential"]] == [2, 5]


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (Interrupted, 130), (Terminated, 143)])
def test_stopped_comparison_goes_on_with_the_same_command(error, status, compared, monkeypatch, capsys):
    words = () if error is KeyboardInterrupt else ("stopped by Ctrl-C after step 1 of 3",)

    def stopped(*args, **more):
        raise error(*words)

    monkeypatch.chdir(compared)
    monkeypatch.setattr(runs, "run_stages", stopped)
    assert uft("compare", "--config", "compare.yaml", "--seeds", 0, 1, 7) == status
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"uft: {words[0] if words else 'interrupted'}: the same command goes on"


# ---- what decides ----


def test_content_of_imported_files_decides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("a = 1")
    values = {"model": "m", "learning_rate": 1}
    first = digest(decides(values | {"import": "mine.py"}))
    assert digest(decides(values | {"import": ["mine.py"]})) == first != digest(decides(values))
    (tmp_path / "mine.py").write_text("a = 2")
    assert digest(decides(values | {"import": "mine.py"})) != first


def test_a_worker_imports_before_it_reads_the_recipe(workplace):
    """In this process the loss is unknown before, as in one that was spawned."""
    (workplace / "mine.py").write_text(LOSS.format(name="worker"))
    own = changed(COMPARISON, {"arms.joint.objective": {"preset": "dpo_nll", "loss": "squared_gap_of_worker"}})
    with pytest.raises(ValueError, match="squared_gap_of_worker"):
        Comparison.of(own)
    try:
        record = compare._in_worker(own | {"import": "mine.py"}, "joint", 0, Total("steps", 1))
    finally:
        tables.PAIRWISE.pop("squared_gap_of_worker", None)
    assert record["stages"][0]["objective"]["terms"][1]["loss"] == "squared_gap_of_worker"


@pytest.mark.slow
def test_imports_with_workers(workplace):
    (workplace / "mine.py").write_text(LOSS.format(name="pool"))
    changes = {"arms.joint.objective": {"preset": "dpo_nll", "loss": "squared_gap_of_pool"}, "workers": 2}
    write(workplace, "compare.yaml", changed(COMPARISON, changes) | {"import": "mine.py"})
    try:
        assert uft("compare", "--config", "compare.yaml") == 0
    finally:
        tables.PAIRWISE.pop("squared_gap_of_pool", None)
    assert read(workplace / "out/joint/seed1/run.json")["stages"][0]["steps"] > 0


def test_saving_decides_where_the_best_checkpoint_is_loaded():
    def of(**more):
        return digest(decides({"model": "m", **more}))

    assert of(save_steps=1) == of(save_steps=2)
    assert of(save_steps=1, load_best_model_at_end=True) != of(save_steps=2, load_best_model_at_end=True)
    assert of(save_strategy="no", logging_steps=1) == of()
    stages = [{"objective": "sft", "load_best_model_at_end": True}]
    assert of(save_steps=1, stages=stages) != of(save_steps=2, stages=stages)


def test_with_the_best_checkpoint_the_last_stays_too(workplace, monkeypatch):
    """With a limit of one, transformers would leave the best alone at the end, and a comparison that is killed before
    its measures would train on from there."""
    saving = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4,
        "load_best_model_at_end": True, "eval_dataset": {"instructions": {"path": "demonstrations.jsonl"}},
    }  # fmt: skip
    there, measures = [], runs.Run._measures

    def looked_at(run, stage, *rest):
        there.extend(sorted(path.name for path in (run.folder / stage.name).glob("checkpoint-*")))
        return measures(run, stage, *rest)

    monkeypatch.setattr(runs.Run, "_measures", looked_at)
    changes = {"arms.sequential": {"objective": "sft_chosen"}, "arms.joint.learning_rate": 0.5, "budget": "none"}
    plan = Comparison.of(changed(COMPARISON | saving, changes))
    prepared = Prepared.of(plan)
    prepared.base()
    prepared.run(plan.arm("joint"), 0, None).record()
    assert there == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert not list((workplace / "out").rglob("checkpoint-*"))


# ---- runs without an end ----


def diverging(arm, seeds):
    whole = runs.run_stages

    def run_stages(model, stages, data, args, *rest, **more):
        if any(args.output_dir == f"out/{arm}/seed{seed}" for seed in seeds):
            raise FloatingPointError("loss is nan in step 2")
        return whole(model, stages, data, args, *rest, **more)

    return run_stages


def test_an_arm_that_diverges_is_kept_as_such_and_the_others_go_on(workplace, monkeypatch, capsys):
    monkeypatch.setattr(runs, "run_stages", diverging("joint", [0, 1]))
    assert uft("compare", "--config", "compare.yaml") == 0
    said = capsys.readouterr().out
    assert "joint, seed 1; diverged: loss is nan in step 2" in said and "joint (without 2 seeds)" in said
    assert "joint diverged on seeds 0, 1: its means and contrasts have no number there and leave them out.\n" in said
    assert "there is no seed on which both" in said
    summary = read(workplace / "out/summary.json")
    assert summary["arms"]["joint"]["without_end"]["0"] == "diverged: loss is nan in step 2"
    assert {each["mean"] for each in summary["contrasts"]} == {None}
    assert "- joint, seed 0, diverged: loss is nan in step 2" in (workplace / "out/comparison.md").read_text()
    monkeypatch.setattr(runs, "run_stages", None)  # nothing is run again
    compare.run(Prepared.of(Comparison.of(COMPARISON)))
    assert capsys.readouterr().out.count("found finished") == 4


def test_a_seed_that_diverged_is_left_out_of_means_and_contrasts(compared, tmp_path, monkeypatch):
    monkeypatch.chdir(compared)
    plan = Comparison.of(COMPARISON)
    found = {a: {s: read(compared / f"out/{a}/seed{s}/run.json") for s in (0, 1)} for a in ("sequential", "joint")}
    whole = contrasts_of(plan, found)[0]
    # its stages before are there, and are not taken for its end
    found["sequential"][1] = {"stages": found["sequential"][1]["stages"][:1], "diverged": "loss is nan"}
    part = contrasts_of(plan, found)[0]
    assert part["by_seed"] == {0: whole["by_seed"][0]} and part["mean"] == whole["by_seed"][0] and part["p"] == 1.0
    summary = summary_of(plan, {}, found)
    assert list(summary["arms"]["sequential"]["stages"][1]["measures"]["demonstrations/nll"]["by_seed"]) == [0]
    assert list(summary["arms"]["joint"]["flops_relative_to_the_deciding_arm"]) == [0]
    assert summary["conclusions"][0].startswith("sequential diverged on seed 1")
    write_report(summary, tmp_path)
    assert "sequential (without 1 seed)" in (tmp_path / "comparison.md").read_text()


def test_without_the_deciding_arm_there_is_no_budget(workplace, monkeypatch, capsys):
    monkeypatch.setattr(runs, "run_stages", diverging("sequential", [0]))
    assert uft("compare", "--config", "compare.yaml", "--seeds", 0) == 0
    said = capsys.readouterr().out
    assert "joint, seed 0; not run: sequential, whose cost is the budget, diverged on this seed" in said
    assert not (workplace / "out/joint").exists()


def test_a_missing_p_counts_in_holm(compared, monkeypatch):
    """Otherwise the sentence that counts the seeds needed for all tests contradicts those of single contrasts."""
    monkeypatch.chdir(compared)
    seeds = list(range(6))
    plan = Comparison.of(COMPARISON | {"seeds": seeds})

    def record(nll, accuracy):
        measures = {"demonstrations/nll": nll, "pairs/rewards/accuracies": accuracy}
        return {"stages": [{"measures": {name: value for name, value in measures.items() if value is not None}}]}

    found = {"sequential": {s: record(2.0, None) for s in seeds}, "joint": {s: record(1.0, 0.5) for s in seeds}}
    known, missing = contrasts_of(plan, found)
    assert known["p"] == 2**-5 and known["p_holm"] == 2 * 2**-5
    assert math.isnan(missing["p"]) and missing["p_holm"] == 1.0


def test_arms_with_a_budget_of_their_own_are_not_counted_as_equal(compared, monkeypatch):
    monkeypatch.chdir(compared)
    plan = Comparison.of(changed(COMPARISON, {"arms.joint.budget": {"flops": 1e9}}))
    assert plan.arm("joint").total == Total("flops", 1e9)
    found = {a: {s: read(compared / f"out/{a}/seed{s}/run.json") for s in (0, 1)} for a in ("sequential", "joint")}
    summary = summary_of(plan, {}, found)
    line = budget_line(summary)
    assert "Reached: 1.000 to 1.000" in line and "With a budget of their own, and so not equal: joint." in line
    assert summary["conclusions"][0] == "joint has a budget of its own: differences from it are not at equal cost."
    assert "not at equal cost" in summary["conclusions"][-1]


# ---- models ----


def test_models_and_their_cards(workplace, capsys):
    def run(**more):
        compare.run(prepared := Prepared.of(Comparison.of(COMPARISON | {"seeds": [0]} | more)))
        return prepared, capsys.readouterr().out

    assert "without its model" not in run()[1]
    asked = "without its model (save_models was false); to have it, remove out/joint/seed0 and run again"
    assert asked in run(save_models=True)[1]
    shutil.rmtree(workplace / "out/joint/seed0")
    run(save_models=True)
    assert asked not in run(save_models=True)[1]
    card = (workplace / "out/joint/seed0/README.md").read_text()
    assert 'MODEL = "out/joint/seed0"' in card and "No evaluation beyond" not in card
    assert f"{measured(workplace)['demonstrations/nll']:.4g}" in card


def measured(folder):
    return read(folder / "out/joint/seed0/train/evaluation.json")["metrics"]
