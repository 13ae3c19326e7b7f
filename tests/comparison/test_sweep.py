"""A whole sweep with a tiny model: the best is the best, and its recipe trains to the same number."""

import itertools
import json
import sys

import pytest
import torch
import yaml
from comparison_workplace import SWEEP, changed, read, uft, write

from uft.comparison import runs, sweep_study
from uft.comparison.recipe import Comparison
from uft.comparison.sweep_recipe import Sweep, as_words
from uft.comparison.sweep_report import own_measure
from uft.comparison.sweep_space import Parameter, takes_whole_numbers
from uft.comparison.sweep_study import Study
from uft.comparison.sweep_tuned import write_compare
from uft.recipe import RecipeError, override, read_yaml

LOSS = """
from uft.losses import register

@register
def mine(chosen_reward, rejected_reward):
    return (chosen_reward - rejected_reward - 0.5).square()
"""


def value(folder, number):
    record = read(folder / f"out/trials/{number:03d}/seed0/run.json")
    return record["stages"][-1]["measures"][SWEEP["metric"]]


def test_best_is_the_best_of_the_runs(swept):
    summary = read(swept / "out/sweep.json")["arms"]["one"]
    values = [value(swept, number) for number in (1, 2, 3)]
    assert [trial["value"] for trial in summary["trials"]] == values
    assert summary["best"]["number"] == 1 + values.index(min(values)) and summary["best"]["value"] == min(values)
    for trial in summary["trials"]:
        assert 1e-4 <= trial["params"]["learning_rate"] <= 1e-2 and trial["params"]["objective.beta"] in (0.1, 0.5)
        config = read(swept / f"out/trials/{trial['number']:03d}/seed0/run.json")["stages"][0]
        assert config["config"]["learning_rate"] == trial["params"]["learning_rate"]
        assert config["objective"]["terms"][1]["beta"] == trial["params"]["objective.beta"]
    assert (swept / "out/sweep.html").read_text().count("data:image/png;base64,") == 1


def test_best_recipe_trains_to_the_same_number(swept, monkeypatch):
    monkeypatch.chdir(swept)
    assert uft("train", "--config", "out/best.yaml") == 0
    metrics = read(swept / "out/best/eval_results.json")
    assert metrics[SWEEP["metric"]] == pytest.approx(
        read(swept / "out/sweep.json")["arms"]["one"]["best"]["value"], rel=1e-9
    )


def test_a_sweep_goes_on_where_it_ended(swept, monkeypatch, capsys):
    """More trials are the same sweep; those that are there are not run again, and other ranges are another sweep."""
    monkeypatch.chdir(swept)
    began, whole = [], runs.run_stages
    monkeypatch.setattr(runs, "run_stages", lambda *a, **k: began.append(a[3].output_dir) or whole(*a, **k))
    assert uft("sweep", "--config", "sweep.yaml") == 0 and began == []
    # killed in the middle of trial 4, which is taken up with its values
    monkeypatch.setattr(runs.Run, "_measures", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert uft("sweep", "--config", "sweep.yaml", "--trials", 4) == 130
    asked = read(swept / "out/trials/004/seed0/identity.json")["decided_by"]["recipe"]
    monkeypatch.undo()
    monkeypatch.chdir(swept)
    assert uft("sweep", "--config", "sweep.yaml", "--trials", 4, "--resume", "true", "--logging_steps", 1) == 0
    trials = read(swept / "out/sweep.json")["arms"]["one"]["trials"]
    assert len(trials) == 4 and trials[3]["params"]["learning_rate"] == asked["learning_rate"]
    assert len(began) == 1
    capsys.readouterr()
    assert uft("sweep", "--config", "sweep.yaml", "--sampler", "tpe") == 1
    assert "holds another sweep, with other sampler; want another output_dir" in capsys.readouterr().err
    # a row more than the trials before were trained on
    data = swept / "pairs.jsonl"
    data.write_text(data.read_text() + '\n{"prompt": "say:", "chosen": " c", "rejected": " b"}')
    assert uft("sweep", "--config", "sweep.yaml", "--trials", 5) == 1
    assert "holds another sweep, with other data; want another output_dir" in capsys.readouterr().err


def test_an_error_is_a_failed_trial_and_does_not_block(workplace, monkeypatch, capsys):
    """An error ends the sweep, kept with its reason; a lack of memory is a failed trial; the next start goes on."""
    whole = runs.run_stages
    errors = [OSError("no space left"), torch.OutOfMemoryError("out of memory")]

    def failing(*args, **options):
        if errors:
            raise errors.pop(0)
        return whole(*args, **options)

    monkeypatch.setattr(runs, "run_stages", failing)
    changes = {"seed": 7, "sweep": {"gradient_accumulation_steps": {"low": 1, "high": 8, "log": True}}}
    (workplace / "mine.py").write_text(LOSS)
    pairs = {"preferences": {"path": "pairs.jsonl"}}
    changes |= {"import": "mine.py", "objective": {"preference": {"loss": "mine"}}, "metric": "eval_loss",
                "train_dataset": pairs, "eval_dataset": pairs}  # fmt: skip
    write(workplace, "sweep.yaml", changed(SWEEP, changes))
    assert uft("sweep", "--config", "sweep.yaml") == 1
    assert uft("sweep", "--config", "sweep.yaml") == 0
    summary = read(workplace / "out/sweep.json")
    trials = summary["arms"]["one"]["trials"]
    assert [trial["state"] for trial in trials] == ["failed", "failed", "finished"]
    assert [trial.get("reason") for trial in trials] == ["OSError: no space left", "out of memory", None]
    assert all(isinstance(trial["params"]["gradient_accumulation_steps"], int) for trial in trials)
    best = read_yaml(str(workplace / "out/best.yaml"))
    assert summary["seeds"] == [7] and best["seed"] == 7 and best["import"] == "mine.py"
    assert "3 trials: 1 finished, 2 failed" in (workplace / "out/sweep.md").read_text()
    assert uft("train", "--config", "out/best.yaml") == 0
    found = read(workplace / "out/best/eval_results.json")["eval_loss"]
    assert found == pytest.approx(trials[2]["value"], rel=1e-9)
    # what is imported decides as data do
    (workplace / "mine.py").write_text(LOSS.replace("0.5", "0.6"))
    capsys.readouterr()
    assert uft("sweep", "--config", "sweep.yaml") == 1
    assert "with other content of what is imported" in capsys.readouterr().err


def test_a_trial_that_is_killed_again_and_again_is_given_up(workplace, monkeypatch):
    """Three times at the same place; a new checkpoint in between counts from one again."""
    plan = Sweep.of(SWEEP)
    plan.output_dir.mkdir()
    begun = []
    for checkpoint in (None, None, "checkpoint-1", None, None, None):
        study = Study(plan.arms[0], plan)
        trial = study.ask()
        if checkpoint:
            (study.folder(trial.number) / "seed0/train" / checkpoint).mkdir(parents=True)
        begun.append(study.stuck(trial))
    assert trial.number == 0 and begun == [False] * 5 + [True]


@pytest.mark.filterwarnings("ignore:The value of `grace_period`")
def test_what_a_kill_leaves_of_the_journal_does_not_block(workplace, monkeypatch):
    """A lock, and half a line: the trial under way is taken up with its values."""
    plan = Sweep.of(SWEEP)
    plan.output_dir.mkdir()
    monkeypatch.setattr(sweep_study, "LOCK_SECONDS", 0.05)
    params = Study(plan.arms[0], plan).ask().params
    journal = plan.output_dir / sweep_study.JOURNAL
    assert sweep_study.journal_at(journal)._lock.acquire()
    journal.write_text(journal.read_text() + '{"op_code": 4, "wor')
    again = Study(plan.arms[0], plan)
    trial = again.ask()
    again.finish(trial, 0.5, {})
    assert trial.number == 0 and trial.params == params and len(Study(plan.arms[0], plan).trials()) == 1


def test_whole_numbers_follow_from_the_field():
    space = {"learning_rate": {"low": 0, "high": 1}, "max_steps": {"low": 1, "high": 4, "log": True},
             "objective.beta": {"low": 1, "high": 2}, "train_dataset.preferences.limit": {"low": 1, "high": 3},
             "warmup_steps": {"low": 0, "high": 4, "whole": True}}  # fmt: skip
    found = {parameter.key: parameter for parameter in Sweep.of(changed(SWEEP, {"sweep": space})).arms[0].space}
    assert [key for key, parameter in found.items() if parameter.whole] == [
        "max_steps", "train_dataset.preferences.limit", "warmup_steps"]  # fmt: skip
    assert takes_whole_numbers("stages.0.budget.steps") and not takes_whole_numbers("stages.0.objective.beta")
    assert takes_whole_numbers("stages.1.lora_r") and not takes_whole_numbers("stages.1.learning_rate")


def test_measuring_is_in_the_layout_of_training():
    measure = {"pairs": {"mine": {"path": "pairs.jsonl"}}}
    plan = Sweep.of(changed(SWEEP, {"measure": measure, "max_length": 99, "layout": "padded"}))
    assert (plan.measure.max_length, plan.measure.layout, plan.measure.fused_head) == (99, "padded", True)
    assert plan.measured == measure | {"max_length": 99, "layout": "padded", "fused_head": True}


STAGES = {"stages": [{"objective": "sft", "on": "instructions", "learning_rate": 1e-4},
                     {"objective": "dpo", "on": "preferences", "learning_rate": 1e-5, "max_steps": 1}]}  # fmt: skip


@pytest.mark.parametrize(
    "key, changes, message",
    [
        ("learning_rate", {}, r"every stage sets its own; want stages.0.learning_rate and so on"),
        ("max_steps", {"stages.0.budget": {"steps": 1}}, r"want stages.0.max_steps or stages.0.budget and so on"),
        ("logging_steps", {}, r"it changes no number"),
        ("num_train_epochs", {}, r"max_steps says how long; want one of them"),
        ("lora_r", {}, r"use_peft is off; want use_peft: true"),
        ("train_dataset.preferences.weight", {"stages.1.on": "instructions"}, r"nothing is trained on 'preferences'"),
    ],
)
def test_a_key_without_effect_is_refused(key, changes, message):
    arms = changed({"a": STAGES}, {f"a.{name}": value for name, value in changes.items()})
    recipe = changed(SWEEP, {"objective": None, "arms": arms, "sweep": {key: [1, 2]}})
    with pytest.raises(RecipeError, match=rf"arms.a.sweep.{key}: has no effect in arm 'a', since .*{message}"):
        Sweep.of(recipe)
    Sweep.of(changed(recipe, {"sweep": {"weight_decay": [0.1, 0.2], "use_peft": [True, False], "lora_r": [1, 2]}}))


def test_compare_recipe_wants_data_that_the_search_has_not_seen(tmp_path):
    """It is a comparison once `measure` is there, on seeds that were not searched; what was filled in stays."""
    arms = {"joint": {"objective": "dpo_nll"}, "other": {"objective": {"preset": "dpo_nll", "beta": 0.3}}}
    changes = {"objective": None, "arms": arms, "seeds": [3, 100], "output_dir": str(tmp_path), "import": []}
    plan = Sweep.of(changed(SWEEP, changes))
    best = {name: {"params": {"learning_rate": 1e-4, "objective.beta": 0.5}, "flops": flops}
            for name, flops in (("joint", 2e9), ("other", 3e9))}  # fmt: skip
    write_compare(plan, best)
    text, recipe = (tmp_path / "compare.yaml").read_text(), read_yaml(str(tmp_path / "compare.yaml"))
    assert "measure" not in recipe and recipe["seeds"] == [*range(101, 109)] and recipe["budget"] == "none"
    assert "# measure:\n#   demonstrations:\n#     NAME:\n#       path: FILE" in text and "joint 1e+09, other" in text
    assert "# These differ." in text and "# eval_dataset is what was searched on" in text and recipe["import"] == []
    assert max(map(len, text.splitlines())) <= 120
    comparison = recipe | {"measure": {"pairs": {"fresh": {"path": "fresh.jsonl"}}}}
    assert Comparison.of(comparison).seeds == tuple(range(101, 109)) and Comparison.of(comparison).unit is None
    write(tmp_path, "compare.yaml", comparison)
    write_compare(plan, best)
    assert read_yaml(str(tmp_path / "compare.yaml"))["measure"] == comparison["measure"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sweep": None}, r"sweep is None; want keys with a range or a list"),
        ({"sweep": {"lerning_rate": [1, 2]}}, r"sweep.lerning_rate: unknown key 'lerning_rate'; did you mean"),
        ({"sweep": {"learning_rate": {"low": 1, "high": 0}}}, r"sweep.learning_rate is from 1 to 0; want two numbers"),
        ({"sweep": {"learning_rate": {"low": 0, "high": 1, "log": True}}}, r"learning_rate: log is True and low 0"),
        ({"sweep": {"learning_rate": {"lo": 0}}}, r"sweep.learning_rate is \{'lo': 0\}; want a list of values"),
        ({"sweep": {"learning_rate": [1, 1]}}, r"sweep.learning_rate is \[1, 1\]; want one value or more, each once"),
        ({"sweep": {"objective.bta": [1]}}, r"sweep.objective.bta: objective: .*bta"),
        ({"sweep": {"seed": [1, 2]}}, r"sweep.seed: is nothing that a trial may change"),
        ({"sampler": "grid"}, r"sweep.learning_rate is a range; want a list of values for sampler grid"),
        ({"sampler": "cma"}, r"sampler is 'cma'; want one of tpe, gp, random, grid"),
        ({"pruner": "median"}, r"pruner median looks at evaluations in training; want eval_strategy: steps"),
        ({"eval_dataset": None}, r"metric is 'eval_loss/sft' and there is no eval_dataset"),
        ({"metric": "pairs/margins"}, r"metric is 'pairs/margins' and nothing is measured; want `measure`"),
        ({"trials": 0}, r"trials is 0; want a whole number"),
        ({"seed": 1, "seeds": [2]}, r"seed is 1 and seeds is \[2\]; want seeds alone"),
        ({"sampler": "grid", "sweep": {"learning_rate": [1, 2], "objective.beta": [1, 2]}},
         r"trials is 3 and the grid has 4 combinations; want no `trials`"),
        ({"sweep": {"lora_r": {"low": 0.5, "high": 4}}}, r"sweep.lora_r is from 0.5 to 4; want whole numbers"),
        ({"sweep": {"lora_r": {"low": 1, "high": 4, "whole": False}}}, r"whole is False; want true"),
        ({"objective": None, "arms": {"a": {"objective": "sft", "budget": {"steps": 3}}}},
         r"arms.a.budget: trials are as long as they say"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(RecipeError, match=message):
        Sweep.of(changed(SWEEP, changes))


def test_edges():
    rate = Parameter("learning_rate", None, 1e-6, 1e-4, True)
    assert [rate.at_edge(value) for value in (1.2e-6, 2e-6, 1e-5, 9e-5)] == [True, False, False, True]
    assert [Parameter("b", (0.1, 0.2, 0.5)).at_edge(value) for value in (0.1, 0.2, 0.5)] == [True, False, True]
    assert not Parameter("b", ("dpo", "ipo", "sppo")).at_edge("dpo") and not Parameter("b", (0.1, 0.5)).at_edge(0.5)


def test_values_go_through_the_command_lines_words():
    values = {"learning_rate": 1.5e-05, "objective.beta": 0.1, "lora_target_modules": ["q_proj"], "bf16": False}
    found = override({"objective": "dpo"}, as_words(values))
    stages = override({"stages": [{"objective": "dpo"}]}, as_words({"stages.0.objective.beta": 0.2}))
    assert stages == {"stages": [{"objective": {"preset": "dpo", "beta": 0.2}}]}
    source = override({"train_dataset": {"objective": "a.jsonl"}}, as_words({"train_dataset.objective.weight": 2}))
    assert source == {"train_dataset": {"objective": {"path": "a.jsonl", "weight": 2}}}
    assert found == {"objective": {"preset": "dpo", "beta": 0.1}, "learning_rate": 1.5e-05, "bf16": False,
                     "lora_target_modules": ["q_proj"]}  # fmt: skip


def test_optuna_missing_is_one_sentence(workplace, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in ("uft.comparison.sweep", "uft.comparison.sweep_study"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert uft("sweep", "--config", "sweep.yaml") == 1
    assert capsys.readouterr().err == "uft: uft sweep needs optuna: pip install 'unified-finetuning[sweep]'\n"


def test_margins_are_no_metric_for_a_beta():
    plan = Sweep.of(changed(SWEEP, {"metric": "eval_rewards/margins"}))
    assert own_measure(plan, ["objective.beta"]).startswith("eval_rewards/margins grows with objective.beta")
    assert own_measure(plan, ["learning_rate"]) is None


def test_dry_run_writes_nothing(workplace, capsys):
    assert uft("sweep", "--config", "sweep.yaml", "--metric", "eval_loss", "--dry-run") == 0
    said = capsys.readouterr().out
    assert (
        "learning_rate: 0.0001 to 0.01, logarithmic" in said
        and "3 trials by random, 1 seed each: 3 runs at most" in said
    )
    assert "! eval_loss is that of the objective, and objective.beta may change what it is made of" in said
    assert not (workplace / "out").exists()


@pytest.mark.slow
def test_arms_are_swept_alike_over_a_grid_and_written_as_a_comparison(workplace):
    arms = {
        "sequential": {
            "stages": [{"objective": "sft", "on": "instructions"}, {"objective": "dpo", "on": "preferences"}],
            "sweep": {"stages.1.objective.beta": [0.1, 0.5], "stages.1.learning_rate": [1e-4, 1e-3]},
        },
        "joint": {"objective": "dpo_nll", "sweep": {"objective.beta": [0.1, 0.5], "learning_rate": [1e-4, 1e-3]}},
    }
    measure = {"demonstrations": {"mine": {"path": "demonstrations.jsonl"}}, "pairs": {"mine": {"path": "pairs.jsonl"}}}
    changes = {"objective": None, "eval_dataset": None, "sweep": None, "arms": arms, "measure": measure,
               "sampler": "grid", "metric": "pairs/rewards/margins", "trials": 9}  # fmt: skip
    write(workplace, "sweep.yaml", changed(SWEEP, changes))
    assert uft("sweep", "--config", "sweep.yaml") == 0
    summary = read(workplace / "out/sweep.json")
    assert summary["direction"] == "maximize"
    for name, arm in summary["arms"].items():
        tried = [tuple(trial["params"].values()) for trial in arm["trials"]]
        assert sorted(tried) == sorted(itertools.product([0.1, 0.5], [1e-4, 1e-3]))
        assert arm["best"]["value"] == max(trial["value"] for trial in arm["trials"])
        assert uft("train", "--config", f"out/best-{name}.yaml") == 0
    recipe = read_yaml("out/compare.yaml")
    best = summary["arms"]["sequential"]["best"]["params"]
    assert recipe["arms"]["sequential"]["stages"][1]["objective"]["beta"] == best["stages.1.objective.beta"]
    text = (workplace / "out/compare.yaml").read_text()
    assert "#   demonstrations:\n#     mine:\n#       path: FILE\n" in text and "jsonl" not in text.split("# Wanted")[1]
    filled_in = (
        "--measure.demonstrations.mine.path",
        "demonstrations.jsonl",
        "--measure.pairs.mine.path",
        "pairs.jsonl",
    )
    assert uft("compare", "--config", "out/compare.yaml", "--seeds", 0, *filled_in) == 0


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_samplers_and_pruner(workplace, sampler):
    """A rate far too small falls behind and is ended; a killed sweep would have tried the same."""
    changes = {"sampler": sampler, "trials": 7, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1,
               "pruner": "median", "sweep": {"learning_rate": {"low": 1e-6, "high": 1e-2, "log": True}}}  # fmt: skip
    write(workplace, "sweep.yaml", changed(SWEEP, changes))
    assert uft("sweep", "--config", "sweep.yaml") == 0
    whole = read(workplace / "out/sweep.json")["arms"]["one"]["trials"]
    assert sampler == "gp" or any(trial["state"] == "ended early" for trial in whole)  # the other is never far off
    assert uft("sweep", "--config", "sweep.yaml", "--output_dir", "two", "--trials", 5) == 0
    part = read(workplace / "two/sweep.json")["arms"]["one"]["trials"]
    assert [json.dumps(t["params"]) for t in part] == [json.dumps(t["params"]) for t in whole[:5]]
    assert yaml.safe_load((workplace / "out/best.yaml").read_text())["seed"] == 0
