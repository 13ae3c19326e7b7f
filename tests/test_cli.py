"""`uft train` and `uft data check` from end to end, and what they say to those who err."""

import json
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from uft.cli import main
from uft.recipe import RecipeError, override, parse, read_yaml
from uft.stages import run_stages

PROMPTS = ["say:", "say a b c:", "hello:", "the cat on the mat:", "1 + 2 =", "good:"]
GOOD = [" hello world", " the cat sat on the mat", " c", " good bye", " 3", " bye bye bye"]
BAD = [" mat the on", " b", " a b c d e f g 1 2 3", " hello", " the cat sat", " g"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(base, tmp_path, monkeypatch):
    """A folder with the model, data files and `recipe.yaml`; it is where the commands run."""
    shutil.copytree(base, tmp_path / "tiny")
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in zip(PROMPTS, GOOD)]
    (tmp_path / "demonstrations.jsonl").write_text("\n".join(lines))
    pairs = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
    pyarrow.parquet.write_table(pyarrow.table(pairs), tmp_path / "pairs.parquet")
    write(tmp_path, {})
    monkeypatch.chdir(tmp_path)
    return tmp_path


RECIPE = {
    "model": "tiny",
    "objective": "dpo_nll",
    "train_dataset": {
        "instructions": {"path": "demonstrations.jsonl"},
        "preferences": {"path": "pairs.parquet", "weight": 2.0},
    },
    "output_dir": "out",
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
STAGES = [
    {"name": "sft", "objective": "sft", "on": "instructions"},
    {"name": "dpo", "objective": {"preset": "dpo", "beta": 0.2}, "on": ["preferences"], "learning_rate": 3e-3},
]


def write(folder, changes, name="recipe.yaml"):
    recipe = {key: value for key, value in (RECIPE | changes).items() if value is not None}
    (folder / name).write_text(yaml.safe_dump(recipe))


def train(*words):
    return main(["train", "--config", "recipe.yaml", *map(str, words)])


def record(folder="out"):
    with open(f"{folder}/run.json") as file:
        return json.load(file)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


# ---- uft train ----


def test_train_writes_a_model_that_others_load(workplace, capsys):
    assert train() == 0
    printed = capsys.readouterr().out
    assert "model, README.md and run.json in out" in printed
    assert "instructions  demonstration" in printed and "preferences   pair" in printed  # the report of the data

    model = AutoModelForCausalLM.from_pretrained("out")
    before = AutoModelForCausalLM.from_pretrained("tiny")
    assert (logits(model) - logits(before)).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained("out").chat_template == tiny_tokenizer().chat_template
    weights = {path.name for path in (workplace / "out").iterdir() if path.suffix in (".safetensors", ".bin", ".pt")}
    assert weights == {"model.safetensors", "training_args.bin"}  # the latter are no weights

    run = record()
    assert run["steps"] == 3 and run["objective"]["name"] == "dpo_nll"
    assert run["data"]["train"]["sizes"] == {"instructions": 6, "preferences": 6}
    assert run["config"]["learning_rate"] == 1e-3
    assert {"tokens", "flops", "seconds", "peak_memory_bytes"} <= run["compute"].keys()
    assert len([entry for entry in run["metrics"] if "loss/preference" in entry]) == 3


def test_train_with_lora(workplace):
    assert train("--use_peft", "--lora_r", 4, "--learning_rate", 0.05, "--lora_target_modules", "all-linear") == 0
    model = AutoPeftModelForCausalLM.from_pretrained("out")
    onto_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tiny"), "out")
    assert torch.equal(logits(model), logits(onto_base))
    assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained("tiny"))).abs().max() > 1e-3
    assert (workplace / "out" / "adapter_model.safetensors").is_file()
    assert not (workplace / "out" / "model.safetensors").exists()


def test_the_command_line_beats_the_file(workplace):
    words = ["--learning_rate", "5e-4", "--train_dataset.preferences.weight", "1", "--objective.beta=0.3"]
    assert train(*words, "--max_steps", 2, "--train_dataset.instructions", "demonstrations.jsonl") == 0
    run = record()
    assert run["steps"] == 2 and run["config"]["learning_rate"] == 5e-4
    assert run["objective"]["terms"][1]["beta"] == 0.3
    # four rows of each of two steps, half of them pairs since the weights are equal now
    assert run["compute"]["examples/preferences"] == run["compute"]["examples/instructions"] == 4


def test_weights_from_the_command_line_change_the_mixture(workplace):
    assert train("--train_dataset.preferences.weight", 3, "--num_train_epochs", 1, "--max_steps", "-1") == 0
    assert record()["compute"]["examples/preferences"] == 3 * record()["compute"]["examples/instructions"] == 18


def test_several_files(workplace):
    write(workplace, {"max_steps": 1, "output_dir": "other"}, "more.yaml")
    assert train("--config=more.yaml") == 0
    assert record("other")["steps"] == 1


def test_evaluation(workplace):
    write(workplace, {"eval_dataset": {"held_out": {"path": "pairs.parquet", "limit": 3}}, "eval_strategy": "epoch"})
    assert train() == 0
    results = json.loads((workplace / "out" / "eval_results.json").read_text())
    assert results["eval_loss"] > 0 and "eval_rewards/margins" in results
    assert record()["metrics"][-1]["eval_loss"] == results["eval_loss"]


def test_resume(workplace):
    """A run stopped after 2 of 4 steps and resumed is the run that was not stopped."""
    saving = ["--save_strategy", "steps", "--save_steps", 2, "--max_steps", 4, "--lr_scheduler_type", "constant"]
    assert train(*saving, "--output_dir", "whole") == 0
    shutil.copytree("whole/checkpoint-2", "out/checkpoint-2")
    assert train(*saving, "--resume") == 0
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained("out")), logits(AutoModelForCausalLM.from_pretrained("whole"))
    )
    assert record()["compute"]["tokens"] == record("whole")["compute"]["tokens"]
    (workplace / "out" / "run.json").unlink()  # killed after the last checkpoint and before the end
    assert train(*saving, "--resume") == 0
    assert record()["steps"] == 4
    for words in (["--resume_from_checkpoint", "true"], ["--resume_from_checkpoint", "whole/checkpoint-2"]):
        shutil.rmtree("out/checkpoint-4", ignore_errors=True)
        assert train(*saving, *words) == 0
        assert record()["steps"] == 4 and record()["compute"]["tokens"] == record("whole")["compute"]["tokens"]


@pytest.mark.slow
def test_two_processes(workplace):
    """Both end, the counters are those of both, and the weights those of one process with batches of twice the size."""
    assert train("--output_dir", "one", "--per_device_train_batch_size", 6) == 0
    words = ["-m", "uft.cli", "train", "--config", "recipe.yaml", "--per_device_train_batch_size", "3"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    subprocess.run([*launcher, *words], check=True, timeout=300, capture_output=True)
    assert record()["compute"]["tokens"] == record("one")["compute"]["tokens"]
    assert record()["compute"]["examples/preferences"] == 12
    ours, theirs = (logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in ("out", "one"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ---- stages ----


def test_stages(workplace, capsys):
    write(workplace, {"objective": None, "stages": STAGES})
    assert train("--stages.1.budget.steps", 2) == 0
    run = record()
    assert [stage["stage"] for stage in run["stages"]] == ["sft", "dpo"]
    assert [stage["steps"] for stage in run["stages"]] == [3, 2]
    assert [stage["config"]["learning_rate"] for stage in run["stages"]] == [1e-3, 3e-3]
    assert [list(stage["data"]["train"]["sizes"]) for stage in run["stages"]] == [["instructions"], ["preferences"]]
    card = (workplace / "out" / "README.md").read_text()
    assert "2 stages" in card and "Stage 1: sft" in card and "Stage 2: dpo" in card
    assert "preferences   pair" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained("out")
    AutoTokenizer.from_pretrained("out")


@pytest.mark.parametrize("boundary", ["merge", "keep"])
def test_what_stages_save_is_the_model_they_end_with(boundary, workplace, monkeypatch):
    """An adapter alone would lose the stage that was merged beneath it."""
    ended = {}

    def spy(*args, **options):
        model, records = run_stages(*args, **options)
        ended["logits"] = logits(model)
        return model, records

    monkeypatch.setattr("uft.stages.run_stages", spy)
    write(workplace, {"objective": None, "stages": [STAGES[0], STAGES[1] | {"boundary": boundary}], "use_peft": True})
    assert train("--learning_rate", 0.05, "--stages.1.learning_rate", 0.05) == 0
    loader = AutoModelForCausalLM if boundary == "merge" else AutoPeftModelForCausalLM
    torch.testing.assert_close(logits(loader.from_pretrained("out")), ended["logits"], rtol=1e-4, atol=1e-4)
    assert not (workplace / "out" / "reference").exists()
    base = logits(AutoModelForCausalLM.from_pretrained("tiny"))
    assert (base - ended["logits"]).abs().max() > 0.1


def test_one_stage_is_a_stage(workplace):
    """Its data sets, budget and arguments count, as with two."""
    write(workplace, {"objective": None, "stages": [STAGES[1] | {"budget": {"steps": 1}}]})
    assert train() == 0
    (stage,) = record()["stages"]
    assert (stage["steps"], stage["config"]["learning_rate"]) == (1, 3e-3)
    assert list(stage["data"]["train"]["sizes"]) == ["preferences"]


def test_each_stage_evaluates_on_its_own_kind_of_data(workplace):
    held_out = {"preferences": {"path": "pairs.parquet", "limit": 2}}
    write(workplace, {"objective": None, "stages": STAGES, "eval_dataset": held_out, "eval_strategy": "epoch"})
    assert train() == 0
    evaluated = [[e for e in stage["metrics"] if "eval_loss" in e] for stage in record()["stages"]]
    assert not evaluated[0] and evaluated[1]


def test_stages_resume(workplace):
    write(workplace, {"objective": None, "stages": STAGES, "save_strategy": "steps", "save_steps": 2})
    assert train("--output_dir", "whole") == 0
    shutil.copytree("whole/sft", "out/sft")
    assert train("--resume") == 0
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained("out")), logits(AutoModelForCausalLM.from_pretrained("whole"))
    )


# ---- errors: one line, no traceback ----

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
    "no checkpoint": (["--resume"], {}, ["no whole checkpoint", "out"]),
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


def test_errors_show_where_they_came_from_if_asked(workplace, monkeypatch):
    monkeypatch.setenv("UFT_TRACEBACK", "1")
    with pytest.raises(RecipeError, match="lerning_rate"):
        train("--lerning_rate", 1)


def test_help_and_unknown_commands(capsys):
    assert main(["--help"]) == 0 and main(["train", "--help"]) == 0
    assert "uft data check" in capsys.readouterr().out
    assert main([]) == 2 and main(["trian"]) == 2 and main(["data"]) == 2 and main(["data", "chekc"]) == 2
    assert "'trian'" in capsys.readouterr().err


# ---- YAML ----


def test_yaml_is_read_as_it_looks(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "on: pairs\nrate: 1e-5\nsmall: 5E-7\nyes: no\nflag: true\ndate: 2024-01-02\ncount: 1_000\n"
        "nothing:\nversion: '3'\nhalf: .5\nnegative: -3\ntime: 12:30\nall: &a {x: 1}\nmerged: {<<: *a, y: 2}\n"
    )
    assert read_yaml(str(path)) == {
        "on": "pairs", "rate": 1e-5, "small": 5e-7, "yes": "no", "flag": True, "date": "2024-01-02", "count": 1000,
        "nothing": None, "version": "3", "half": 0.5, "negative": -3, "time": "12:30", "all": {"x": 1},
        "merged": {"x": 1, "y": 2},
    }  # fmt: skip


def test_override_leaves_the_recipe_alone():
    recipe = {"objective": "dpo", "train_dataset": {"a": "a.jsonl"}, "stages": [{"name": "x"}]}
    changed = override(
        recipe, ["--objective.beta", "1e-2", "--train_dataset.a.weight=2", "--stages.0.name", "y", "--bf16"]
    )
    assert changed == {
        "objective": {"preset": "dpo", "beta": 0.01}, "train_dataset": {"a": {"path": "a.jsonl", "weight": 2}},
        "stages": [{"name": "y"}], "bf16": True,
    }  # fmt: skip
    assert recipe == {"objective": "dpo", "train_dataset": {"a": "a.jsonl"}, "stages": [{"name": "x"}]}


def test_terms_and_lists(tmp_path):
    """An objective of terms, with `on` in it, and a field that is a list."""
    (tmp_path / "a.yaml").write_text(
        "model: tiny\ntrain_dataset: {a: a.jsonl}\noutput_dir: out\nlora_target_modules: [q_proj, v_proj]\n"
        "objective:\n  sft: {loss: nll, on: demonstrations, weight: 0.5}\n  preference: {loss: dpo, beta: 1e-1}\n"
    )
    plan = parse(read_yaml(str(tmp_path / "a.yaml")))
    assert [(term.name, term.on, term.weight) for term in plan.objective.terms] == [
        ("sft", "demonstrations", 0.5),
        ("preference", "pairs", 1.0),
    ]
    assert plan.args.lora_target_modules == ["q_proj", "v_proj"]


# ---- uft data check ----


def test_data_check(workplace, capsys):
    files = ["demonstrations.jsonl", "pairs.parquet"]
    assert main(["data", "check", *files]) == 0
    assert main(["data", "check", *files, "--tokenizer", "tiny", "--max_length", "64"]) == 0
    assert "demonstrations.jsonl  demonstration" in capsys.readouterr().out
    rows = [{"prompt": "a", "completion": ""}, {"prompt": "a", "completion": 3}, {"prompt": "a"}]
    with open("bad.jsonl", "w") as file:
        file.write("\n".join(["{broken", *map(json.dumps, rows)]))
    assert main(["data", "check", "bad.jsonl", *files]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad.jsonl, row")]
    assert [line.split(":")[0] for line in lines] == [
        "bad.jsonl, row 0 (line 1)",
        "bad.jsonl, row 1 (line 2), column 'completion'",
        "bad.jsonl, row 2 (line 3), column 'completion'",
        "bad.jsonl, row 3 (line 4), column 'completion'",
    ]
    assert main(["data", "check", "missing.jsonl"]) == 1
    assert "missing.jsonl" in capsys.readouterr().out
    assert main(["data", "check", "pairs.parquet", "--tokenizer", "./nowhere"]) == 1
