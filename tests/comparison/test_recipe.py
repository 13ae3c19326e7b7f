"""A comparison is refused by the name of the key before anything is read, and arms are what they say."""

import pytest
from comparison_workplace import COMPARISON, changed, uft, write

from uft.comparison.recipe import Comparison, train_recipe
from uft.recipe import RecipeError


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arms.joint.lerning_rate": 1}, r"arms.joint.lerning_rate is no key that is known; did you mean 'learning_"),
        ({"arms.joint.objective": "dpo_nil"}, r"arms.joint.objective: objective 'dpo_nil' is unknown"),
        ({"arms.joint.on": "instructionz"}, r"arms.joint.on: unknown key 'instructionz'; did you mean 'instructions'"),
        ({"arms.sequential.stages.1.objektive": 1}, r"arms.sequential.stages.1: unknown key 'objektive'"),
        ({"arms.joint.max_steps": "many"}, r"arms.joint.max_steps"),
        ({"arms.joint.seed": 3}, r"arms.joint.seed: is the same for all arms"),
        ({"arms.joint.model": "other"}, r"arms.joint.model: is the same for all arms"),
        ({"arms.joint.budget": {"flop": 1}}, r"arms.joint.budget is \{'flop': 1\}; want one of flops, examples, steps"),
        ({"arms.joint.objective": None}, r"arms.joint: want either 'objective' \(one stage\) or 'stages'"),
        ({"arms.joint": 3}, r"arms.joint is 3; want a mapping"),
        ({"arms.sequential": None}, r"arms has 'joint' alone; want two or more"),
        ({"arms.sequential.stages.1.budget": {"steps": 3}, "budget": {"flops": "joint"}},
         r"arms.sequential.stages.1.budget: the last stage gets what the comparison's budget leaves"),
        ({"arms.joint.objective": {"preset": "dpo_nll", "balance": "alright"}},
         r"arms.joint: weights of 'dpo_nll' decide in training what a step costs"),
        ({"arms.joint.import": "mine.py"}, r"arms.joint.import: is the same for all arms"),
        ({"arms.base": {"objective": "sft"}}, r"arms: name is 'base'"),
        ({"arms": {"summary.json": {"objective": "sft"}}}, r"arms: name is 'summary.json'; want letters from a to z"),
        ({"seed": 3}, r"^seed is 3; want seeds, a list such as \[0, 1, 2\]"),
        ({"lerning_rate": 1}, r"^lerning_rate is no key that is known; did you mean 'learning_rate'"),
        ({"train_dataset": None}, r"key 'train_dataset' is missing"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; want each once"),
        ({"seeds": [0.5]}, r"seeds is \[0.5\]; want whole numbers"),
        ({"budget": {"flops": "jiont"}}, r"budget.flops is 'jiont'; want equal, a number, or one of sequential, joint"),
        ({"measure": None}, r"measure is None; want what `uft eval` takes"),
        ({"measure.pears": {}}, r"measure: unknown key 'pears'"),
        ({"kept": "accuracy"}, r"kept is 'accuracy'; want a metric of what is measured"),
        ({"contrasts": [["joint", "sft"]]}, r"contrasts.0: there is no arm 'sft'; want some of sequential, joint"),
        ({"contrasts": [["joint", "sequential"], ["joint", "sequential"]]},
         r"contrasts.1 is \['joint', 'sequential'\], which contrasts.0 tests already"),
        ({"contrasts": [["joint", "sequential"], ["sequential", "joint"]]},
         r"contrasts.1 is \['sequential', 'joint'\], which contrasts.0 tests already"),
        ({"contrasts": [["joint"]]}, r"contrasts.0 is \['joint'\]; want two arms"),
        ({"workers": 0}, r"workers is 0; want a whole number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(RecipeError, match=message):
        Comparison.of(changed(COMPARISON, changes))


def test_nothing_is_trained_before_all_arms_are_known_to_be_right(workplace, capsys):
    write(workplace, "compare.yaml", changed(COMPARISON, {"arms.joint.objective": "dpo"}))  # without the demonstrations
    assert uft("compare", "--config", "compare.yaml") == 1
    assert "arms.joint: data set 'instructions' holds examples of kind demonstration" in capsys.readouterr().err
    write(workplace, "compare.yaml", changed(COMPARISON, {"kept": "demonstrations/nil"}))
    assert uft("compare", "--config", "compare.yaml") == 1
    assert (
        "kept is 'demonstrations/nil', which is not measured; want one of demonstrations/nll" in capsys.readouterr().err
    )
    write(workplace, "compare.yaml", changed(COMPARISON, {"budget": {"steps": 2}}))
    assert uft("compare", "--config", "compare.yaml") == 1
    assert "arms.sequential: stage 'sft' would leave nothing of the 2 steps" in capsys.readouterr().err
    assert not list(workplace.glob("out/[!b]*"))  # but for the base


def test_data_errors_name_their_arm(workplace, capsys):
    own = {"preferences": {"path": "missing.jsonl"}}
    write(workplace, "compare.yaml", changed(COMPARISON, {"arms.joint.train_dataset": own}))
    assert uft("compare", "--config", "compare.yaml", "--dry-run") == 1
    said = capsys.readouterr().err
    assert said.startswith("uft: arms.joint: ") and "missing.jsonl" in said


def test_what_is_imported_is_kept_for_the_workers_and_unknown_to_arms():
    plan = Comparison.of(COMPARISON | {"import": ["json"]})
    assert plan.values["import"] == ["json"] and all(arm.values["import"] == ["json"] for arm in plan.arms)
    assert plan.arm("joint").plan.objective.name == "dpo_nll"  # parsed without it


def test_defaults():
    plan = Comparison.of(changed(COMPARISON, {"arms.third": {"objective": "sft_chosen"}, "seeds": None}))
    assert plan.contrasts == (("joint", "sequential"), ("third", "sequential"))
    assert (plan.unit, plan.decider, plan.total) == ("flops", "sequential", None)
    assert (plan.kept, plan.gained, plan.seeds) == ("demonstrations/nll", "pairs/rewards/accuracies", (0, 1, 2))
    assert plan.measured["max_length"] == plan.arms[0].plan.args.max_length
    assert Comparison.of(changed(COMPARISON, {"budget": "none"})).unit is None
    assert Comparison.of(changed(COMPARISON, {"budget": {"flops": "joint"}})).order[0].name == "joint"


def test_an_arm_is_its_keys_over_the_common_ones():
    common = {
        "objective": "dpo",
        "max_steps": 3,
        "train_dataset": {"a": "a.jsonl", "b": {"path": "b.jsonl", "limit": 2}},
    }
    own = {"on": "a", "objective": "sft", "train_dataset": {"a": {"weight": 2}, "c": {"path": "c.jsonl"}}}
    assert train_recipe(common, own, "arms.x") == {
        "max_steps": 3,
        "train_dataset": {"a": {"path": "a.jsonl", "weight": 2}, "b": {"path": "b.jsonl", "limit": 2},
                          "c": {"path": "c.jsonl"}},
        "stages": [{"name": "train", "objective": "sft", "on": "a"}],
    }  # fmt: skip
    assert "stages" not in train_recipe({"stages": [1]}, {"objective": "sft"}, "arms.x")
    assert "objective" not in train_recipe({"objective": "sft"}, {"stages": [{"objective": "dpo"}]}, "arms.x")
