"""What `uft` says to those who err: one line, no traceback."""

import json

import pytest
from cli_workplace import STAGES, train, write

from uft.cli import main
from uft.recipe import RecipeError

WRONG = {  # what is done, and what the line must say
    "unknown key": (["--lerning_rate", "1"], {}, ["unknown key 'lerning_rate'", "'learning_rate'"]),
    "unknown key in the file": ([], {"max_step": 3}, ["unknown key 'max_step'", "'max_steps'"]),
    "key that is no word": ([], {3: 4}, ["unknown key 3"]),
    "value of wrong type": (["--max_steps", "many"], {}, ["max_steps", "int", "'many'"]),
    "value out of range": (["--padding_side", "top"], {}, ["padding_side", "'top'", "right or left"]),
    "word without key": (["learning_rate", "1"], {}, ["'learning_rate'", "--key value"]),
    "broken value": (["--objective", "{a"], {}, ["--objective", "{a"]),
    "no file behind --config": (["--config"], {}, ["--config needs a file"]),
    "no such recipe": (["--config", "missing.yaml"], {}, ["missing.yaml", "no such file"]),
    "no model": ([], {"model": None}, ["'model' is missing"]),
    "model not there": (["--model", "./nowhere"], {}, ["nowhere"]),
    "model of wrong type": ([], {"model": {"a": 1}}, ["model is {'a': 1}"]),
    "no objective": ([], {"objective": None}, ["'objective'", "'stages'"]),
    "unknown objective": (["--objective", "ppo"], {}, ["'ppo'", "dpo_nll"]),
    "unknown option of the objective": (["--objective.betta", "1"], {}, ["betta"]),
    "objective of wrong type": (["--objective.beta", "big"], {}, ["objective"]),
    "beta below 0": (["--objective.beta", "-1"], {}, ["beta", "-1", "> 0"]),
    "unknown option of a source": (
        ["--train_dataset.preferences.wieght", "2"], {},
        ["preferences", "wieght", "'weight'"],
    ),
    "misspelt source": (
        ["--train_dataset.preference.weight", "2"], {},
        ["train_dataset.preference", "train_dataset.preferences"],
    ),
    "weight of wrong type": (
        ["--train_dataset.preferences.weight", "much"], {},
        ["train_dataset.preferences", "weight"],
    ),
    "columns of wrong type": (
        ["--train_dataset.preferences.columns", "{prompt: [a]}"], {},
        ["train_dataset.preferences", "columns is {'prompt': ['a']}", "mapping from our column names"],
    ),
    "score of wrong type": (
        ["--train_dataset.preferences.score", "{a: '1'}"], {},
        ["train_dataset.preferences", "score is {'a': '1'}", "positive weights"],
    ),
    "limit that no number is": (["--train_dataset.preferences.limit", "true"], {}, ["preferences", "limit is True"]),
    "path of wrong type": (["--train_dataset.preferences.path", "5"], {}, ["preferences", "path is 5"]),
    "split of wrong type": (["--train_dataset.preferences.split", "5"], {}, ["preferences", "split is 5"]),
    "weight below 0": (["--train_dataset.preferences.weight", "-2"], {}, ["preferences", "weight", "-2"]),
    "no such data file": (
        ["--train_dataset.preferences.path", "missing.parquet"], {},
        ["missing.parquet", "no such file"],
    ),
    "data that the objective does not use": (["--objective", "sft"], {}, ["'preferences'", "pair", "demonstration"]),
    "sources of wrong type": (["--train_dataset", "3"], {}, ["train_dataset is 3"]),
    "key below a number": (["--max_steps.a", "3"], {}, ["max_steps is 3"]),
    "stages and an objective": ([], {"stages": STAGES}, ["'objective'", "'stages'"]),
    "stages that are no list": ([], {"objective": None, "stages": "sft"}, ["stages is 'sft'", "list"]),
    "stage without objective": ([], {"objective": None, "stages": [{"name": "a"}]}, ["stages.0", "'objective'"]),
    "unknown key of a stage": (
        [], {"objective": None, "stages": [{"objective": "sft", "onn": "a"}]},
        ["stages.0", "'onn'", "'on'"],
    ),
    "stage on unknown data": (
        [], {"objective": None, "stages": [{"objective": "sft", "on": "instruction"}]},
        ["stages.0.on", "'instructions'"],
    ),
    "unknown budget": (
        [], {"objective": None, "stages": [{"objective": "sft", "budget": {"step": 1}}]},
        ["stages.0.budget", "'steps'"],
    ),
    "two budgets": (
        [], {"objective": None, "stages": [{"objective": "sft", "budget": {"steps": 1, "flops": 2}}]},
        ["stages.0", "budget"],
    ),
    "stages of one name": ([], {"objective": None, "stages": [STAGES[0], STAGES[0]]}, ["'sft'"]),
    "stage that is not there": (["--stages.7.name", "a"], {"objective": None, "stages": STAGES}, ["stages.7"]),
    "stage on a number": ([], {"objective": None, "stages": [{"objective": "sft", "on": 5}]}, ["stages.0", "on is 5"]),
    "budget that is a number": (
        [],
        {"objective": None, "stages": [{"objective": "sft", "budget": 5}]},
        ["stages.0", "budget is 5", "{steps: 100}"],
    ),
    "budget of wrong type": (
        ["--stages.0.budget.steps", "many"],
        {"objective": None, "stages": STAGES},
        ["stages.0.budget", "steps is 'many'"],
    ),
    "stage named like a way out": (
        ["--stages.0.name", "../elsewhere"],
        {"objective": None, "stages": STAGES},
        ["stages.0", "'../elsewhere'"],
    ),
    "value of wrong type in a stage": (
        ["--stages.1.learning_rate", "high"],
        {"objective": None, "stages": STAGES},
        ["stages.1", "learning_rate", "'high'"],
    ),
    "what all stages share": (
        ["--stages.1.max_length", "9"],
        {"objective": None, "stages": STAGES},
        ["stages.1", "'max_length'", "all stages"],
    ),
    "term that is no mapping": (["--objective", "{sft: nll}"], {}, ["objective.sft is 'nll'", "{loss: dpo"]),
    "weight of a term of wrong type": (["--objective.sft_weight", "null"], {}, ["weight of term 'sft' is None"]),
    "dtype": (["--dtype", "flot32"], {}, ["dtype is 'flot32'", "float32"]),
    "resume of wrong type": (["--resume", "maybe"], {}, ["resume is 'maybe'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_clear_line(case, workplace, capfd):
    words, changes, wanted = WRONG[case]
    write(workplace, changes)
    assert train(*words) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("uft: ")]
    assert len(lines) == 1
    for word in wanted:
        assert word in lines[0], lines[0]
    assert not (workplace / "out" / "model.safetensors").exists()


BROKEN_YAML = {
    "model: [tiny": ["recipe.yaml, line", "not valid YAML"],
    "model: tiny\nmodel: other": ["line 2", "'model' stands twice"],
    "- a\n- b": ["holds ['a', 'b'] (list)", "keys and values"],
    "": ["holds nothing"],
}


@pytest.mark.parametrize("text", BROKEN_YAML)
def test_broken_recipes(text, workplace, capfd):
    (workplace / "recipe.yaml").write_text(text)
    assert train() == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert all(word in line for word in BROKEN_YAML[text]), line
    (workplace / "recipe.yaml").write_bytes(b"model: \xff\xfe")
    assert train() == 1


def test_a_bad_row_stops_training_with_its_place(workplace, capfd):
    with open("demonstrations.jsonl", "a") as file:
        file.write("\n" + json.dumps({"prompt": "say:", "completion": ""}))
    assert train() == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("uft: ")]
    assert line.startswith("uft: demonstrations.jsonl, row 6 (line 7), column 'completion': empty response")
    assert train("--on_bad_row", "drop") == 0
    assert "instructions: 1 dropped: empty response" in capfd.readouterr().out


def test_special_tokens_in_a_text_stop_training_unless_they_are_meant(workplace, capfd):
    with open("demonstrations.jsonl", "a") as file:
        file.write("\n" + json.dumps({"prompt": "say:", "completion": " hi<|im_end|> bye"}))
    assert train() == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("uft: ")]
    assert "row 6 (line 7), column 'completion': special token in text: found '<|im_end|>' in " in line
    assert train("--train_dataset.instructions.special_tokens", "true", "--max_steps", 1) == 0
    assert main(["data", "check", "demonstrations.jsonl", "--tokenizer", "tiny"]) == 1
    assert main(["data", "check", "demonstrations.jsonl", "--tokenizer", "tiny", "--special_tokens"]) == 0


def test_errors_show_where_they_came_from_if_asked(workplace, monkeypatch):
    monkeypatch.setenv("UFT_TRACEBACK", "1")
    with pytest.raises(RecipeError, match="lerning_rate"):
        train("--lerning_rate", 1)


def test_help_and_unknown_commands(capsys):
    assert main(["--help"]) == 0 and main(["train", "--help"]) == 0
    assert "data check" in capsys.readouterr().out
    assert main([]) == 2 and main(["trian"]) == 2 and main(["data"]) == 2 and main(["data", "chekc"]) == 2
    assert "'trian'" in capsys.readouterr().err
