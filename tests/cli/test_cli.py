"""`uft train` and `uft data check` from end to end."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_workplace import STAGES, logits, record, train, write
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from uft import checkpoint
from uft.cli import main
from uft.losses import tables
from uft.stages import run_stages
from uft.trainer import UnifiedTrainer

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
    measured = [log for log in record()["metrics"] if "eval_loss" in log]
    assert measured[-1]["eval_loss"] == results["eval_loss"]
    assert [log["step"] for log in measured] == sorted({log["step"] for log in measured})  # the last model but once


def test_resume(workplace):
    """A run stopped after 2 of 4 steps and resumed is the run that was not stopped."""
    saving = ["--save_strategy", "steps", "--save_steps", 2, "--max_steps", 4, "--lr_scheduler_type", "constant"]
    assert train(*saving, "--output_dir", "whole", "--resume") == 0  # the first start is the same command
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


@pytest.mark.parametrize("stages", [False, True], ids=["once", "stages"])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal(number, status, stages, workplace, monkeypatch, capsys):
    """The status is the usual one, the words say where the checkpoint is, and the same command goes on."""
    if stages:
        write(workplace, {"objective": None, "stages": STAGES})
    words = ["--save_strategy", "steps", "--save_steps", 50]
    assert train(*words, "--output_dir", "whole") == 0
    seen, step = [], UnifiedTrainer.training_step

    def stopping(*args, **kwargs):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), number)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(UnifiedTrainer, "training_step", stopping)
        assert train(*words) == status
    said = capsys.readouterr().err.splitlines()[-1]
    folder = "out/sft" if stages else "out"
    name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    assert said == (
        f"uft: stopped by {name} after step 2 of 3; checkpoint in {folder}/checkpoint-2, resuming goes on from there: "
        "the same command with --resume true"
    )
    assert not Path("out/model.safetensors").exists()  # nothing behind training was done
    assert train(*words, "--resume", "true") == 0
    ours, theirs = (logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in ("out", "whole"))
    assert torch.equal(ours, theirs)


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


LOSS = """
from uft import losses

@losses.register
def wide_gap(chosen_reward, rejected_reward, *, gap=1.0):
    return (chosen_reward - rejected_reward - gap).square()
"""


def test_a_recipe_imports_a_loss_of_ones_own(workplace, capsys):
    (workplace / "mine.py").write_text(LOSS)
    words = ["--objective", "{preset: dpo_nll, loss: wide_gap, gap: 0.5}"]
    assert train(*words) == 1 and "wide_gap" in capsys.readouterr().err
    try:
        assert train(*words, "--import", "mine.py") == 0
        assert record()["objective"]["terms"][1] | {"loss": "wide_gap", "gap": 0.5} == record()["objective"]["terms"][1]
        assert train(*words, "--import", "mine.py", "--dry-run") == 0  # once more in the same process
    finally:
        tables.PAIRWISE.pop("wide_gap", None)


@pytest.mark.parametrize(
    "text, message", [(None, "mine.py: FileNotFoundError"), ("1 / 0", "mine.py: ZeroDivisionError")]
)
def test_an_import_that_fails_is_named(text, message, workplace, capsys):
    if text:
        (workplace / "mine.py").write_text(text)
    assert train("--import", "mine.py") == 1
    assert message in capsys.readouterr().err
    assert train("--import", "nowhere.at_all") == 1
    assert "import nowhere.at_all: ModuleNotFoundError" in capsys.readouterr().err


def test_stages_are_set_by_name(workplace):
    write(workplace, {"objective": None, "stages": STAGES})
    assert train("--stages.dpo.objective.beta", "0.5", "--stages.0.learning_rate", "2e-3") == 0
    sft, dpo = record()["stages"]
    assert dpo["objective"]["terms"][0]["beta"] == 0.5 and sft["config"]["learning_rate"] == 2e-3


def test_a_finished_run_is_not_written_over_without_a_word(workplace, capsys):
    assert train("--max_steps", 1) == 0
    assert "written over" not in capsys.readouterr().out
    assert train("--max_steps", 1) == 0
    assert "out holds a finished run, which is written over" in capsys.readouterr().out


def test_another_number_of_steps_is_warned_of(workplace):
    saving = ["--save_strategy", "steps", "--save_steps", 2]
    assert train(*saving, "--max_steps", 3) == 0
    shutil.rmtree("out/checkpoint-3", ignore_errors=True)
    (workplace / "out" / "run.json").unlink()
    seen = []
    logger = checkpoint.logger
    handler = type("Handler", (logging.Handler,), {"emit": lambda self, record: seen.append(record.getMessage())})()
    logger.addHandler(handler)
    try:
        assert train(*saving, "--max_steps", 5, "--resume") == 0
    finally:
        logger.removeHandler(handler)
    assert any("is of a run of 3 steps and this one has 5" in line for line in seen)


def test_a_folder_with_checkpoints_alone_is_named(workplace, capsys):
    assert train("--save_strategy", "steps", "--save_steps", 2) == 0
    for path in Path("out").iterdir():
        if path.is_file():
            path.unlink()
    assert main(["generate", "--model", "out", "--prompt", "say:"]) == 1
    assert "out: found no model, but a checkpoint; want out/checkpoint-" in capsys.readouterr().err
