"""`uft train --dry-run`: what it says is what training then does."""

import re

import pytest
from cli_workplace import STAGES, record, train, write

from uft.cli import main


def said(capsys, *words):
    assert train("--dry-run", *words) == 0
    return capsys.readouterr().out


def number(text, pattern):
    return float(re.search(pattern, text).group(1).replace(",", ""))


@pytest.mark.parametrize(
    "words", [(), ("--use_peft", "true"), ("--max_steps", "-1", "--num_train_epochs", "2"), ("--objective", "uft_nll")]
)
def test_what_it_says_comes_true(words, workplace, capsys):
    text = said(capsys, *words)
    assert not (workplace / "out").exists()  # nothing is written
    assert train(*words) == 0
    run = record()
    assert number(text, r"([\d,]+) steps of 4 × 1 × 1 rows") == run["steps"]
    assert number(text, r"([\d,]+) weights") == run["model"]["parameters"]
    cost = run["compute"]
    # rows of a source differ in length, and the cost is that of their mean
    assert number(text, r"(\S+) FLOPs") == pytest.approx(cost["flops"], rel=0.15)
    assert number(text, r"about ([\d,]+) tokens") == pytest.approx(cost["tokens"], rel=0.15)
    assert number(text, r"([\d,]+) passes of the reference") == cost.get("reference_forwards", 0)
    for source in ("instructions", "preferences"):
        assert number(text, rf"([\d,]+) of {source}") == pytest.approx(cost[f"examples/{source}"], abs=1)


def test_a_cached_reference_is_paid_for_every_row(workplace, capsys):
    words = ["--reference", "cached", "--max_steps", "1"]
    text = said(capsys, *words)
    assert train(*words) == 0
    cost = record()["compute"]
    assert number(text, r"([\d,]+) passes of the reference") == cost["reference_forwards"] == 12
    assert number(text, r"(\S+) FLOPs") == pytest.approx(cost["flops"], rel=0.15)


def test_rows_are_shown_as_the_model_reads_them(workplace, capsys):
    text = said(capsys, "--train_dataset.preferences.chat", "true")
    assert "response  ⟦ hello world<|im_end|>⟧" in text
    assert "<|im_start|>user⏎say:<|im_end|>⏎<|im_start|>assistant⏎" in text
    assert "rejected  ⟦ mat the on<|im_end|>⟧" in text


def test_stages_and_their_budgets(workplace, capsys):
    budgeted = [STAGES[0], STAGES[1] | {"budget": {"examples": 20}}]
    write(workplace, {"objective": None, "stages": budgeted})
    text = said(capsys)
    sft, dpo = text.split("── stage ")[1:]
    assert sft.startswith("sft") and "on demonstrations+documents (6 rows), loss token_nll" in sft
    assert "3 steps of" in sft and "5 steps of" in dpo and "rate 0.003" in dpo and "beta 0.2" in dpo
    assert "drawn: 20 of preferences" in dpo
    assert train() == 0
    stages = record()["stages"]
    assert [stage["steps"] for stage in stages] == [3, 5]
    flops = sum(stage["compute"]["flops"] for stage in stages)
    assert number(text, r"all stages together: (\S+) FLOPs") == pytest.approx(flops, rel=0.15)


def test_a_budget_of_flops(workplace, capsys):
    stages = [{"name": "only", "objective": "dpo_nll", "budget": {"flops": 4e7}}]
    write(workplace, {"objective": None, "stages": stages})
    text = said(capsys)
    assert train() == 0
    assert number(text, r"([\d,]+) steps of") == pytest.approx(record()["stages"][0]["steps"], abs=1)


def test_what_may_go_wrong_is_said(workplace, capsys):
    assert "! no eval_dataset" in said(capsys)
    assert train() == 0
    assert "! a finished run lies there" in said(capsys)
    assert "! term 'preference' has no rows" in said(capsys, "--train_dataset", "{a: demonstrations.jsonl}")
    assert train("--save_strategy", "steps", "--save_steps", 2) == 0
    assert "want --resume true" in said(capsys) and "training goes on from it" in said(capsys, "--resume", "true")
    huge = {"hidden_size": 65536, "num_hidden_layers": 100, "intermediate_size": 200000, "vocab_size": 500000}
    config = workplace / "tiny" / "config.json"
    for key, value in huge.items():
        config.write_text(re.sub(rf'"{key}": \d+', f'"{key}": {value}', config.read_text()))
    assert "GiB of " in said(capsys)  # more than there is; no weight is made for it


@pytest.mark.parametrize(
    "words, message",
    [
        (("--objective.bta", "1"), "bta"),
        (("--model", "."), "tokenizer of .: found none"),
        (("--train_dataset.preferences.path", "lost.jsonl"), "lost.jsonl"),
        (("--objective", "kto", "--train_dataset", "{a: demonstrations.jsonl}"), "'a' holds examples of kind"),
        (("--max_length", "3"), "max_length"),
        (("--samples", "2"), "samples is 2 and there is no eval_dataset"),
        (("--report_to", "tensorboardd"), "tensorboardd"),
        (("--output_dir", "recipe.yaml/x"), "recipe.yaml is a file; want a folder"),
        (("--learning_rate", "nan"), "learning_rate is nan; want a number from 0 on"),
        (("--max_steps", "-3"), "max_steps is -3; want a number of steps, or -1"),
        (("--max_steps", "-1", "--num_train_epochs", "0"), "num_train_epochs is 0.0; want more than 0"),
    ],
)
def test_errors_are_those_of_training(words, message, workplace, capsys):
    assert train("--dry-run", *words) == 1
    dry = capsys.readouterr().err
    assert train(*words) == 1
    wet = capsys.readouterr().err
    assert message in dry and len(dry.strip().splitlines()) == 1
    assert dry.splitlines()[-1] == wet.splitlines()[-1]


def test_answers_in_training_are_not_estimated(workplace, capsys):
    rewards = ["--online.sources", "preferences", "--online.rewards"]
    text = said(capsys, "--objective", "online_una", *rewards, "exact")
    assert "online: sources preferences, rewards exact" in text and "FLOPs" not in text
    assert train("--dry-run", "--objective", "online_una", *rewards, "exact", "--online.smples", "3") == 1
    assert "smples" in capsys.readouterr().err


def test_help_says_so(capsys):
    assert main(["train", "--help"]) == 0
    assert "--dry-run" in capsys.readouterr().out
