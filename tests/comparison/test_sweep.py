"""A whole sweep with a tiny model: the best is the best, and its recipe trains to the same number."""

import itertools
import json
import sys

import pytest
import yaml
from comparison_workplace import SWEEP, changed, read, uft, write

from uft.comparison import runs
from uft.comparison.sweep_recipe import Parameter, Sweep, as_words
from uft.recipe import RecipeError, override, read_yaml


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
    monkeypatch.setattr(runs.Run, "_measures", lambda *a: (_ for _ in ()).throw(OSError("killed")))
    assert uft("sweep", "--config", "sweep.yaml", "--trials", 4) == 1
    asked = read(swept / "out/trials/004/seed0/identity.json")["decided_by"]["recipe"]
    monkeypatch.undo()
    monkeypatch.chdir(swept)
    assert uft("sweep", "--config", "sweep.yaml", "--trials", 4) == 0
    trials = read(swept / "out/sweep.json")["arms"]["one"]["trials"]
    assert len(trials) == 4 and trials[3]["params"]["learning_rate"] == asked["learning_rate"]
    assert len(began) == 1
    capsys.readouterr()
    assert uft("sweep", "--config", "sweep.yaml", "--sampler", "tpe") == 1
    assert "holds another sweep, with other sampler; want another output_dir" in capsys.readouterr().err


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
    monkeypatch.delitem(sys.modules, "uft.comparison.sweep", raising=False)
    assert uft("sweep", "--config", "sweep.yaml") == 1
    assert capsys.readouterr().err == "uft: uft sweep needs optuna: pip install 'unified-finetuning[sweep]'\n"


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
    assert uft("compare", "--config", "out/compare.yaml", "--seeds", 0) == 0


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
    assert [json.dumps(t["params"]) for t in part[:2]] == [json.dumps(t["params"]) for t in whole[:2]]
    assert yaml.safe_load((workplace / "out/best.yaml").read_text())["seed"] == 0
