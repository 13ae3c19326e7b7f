"""`uft eval` from end to end: files, table, comparison, adapters, and one sentence for each mistake."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from evaluation_data import write_files
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer

from uft.cli import main
from uft.evaluation.command import EvaluationRecipe
from uft.recipe import read_yaml

RECIPE = Path(__file__).parents[2] / "experiments" / "recipes" / "evaluate.yaml"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer()
    for seed, name in enumerate(("tiny", "other")):
        tiny_model(tokenizer, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    policy = get_peft_model(
        tiny_model(tokenizer, 0), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    policy.peft_config["default"].base_model_name_or_path = "tiny"
    policy.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def workplace(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    recipe = write_files(tmp_path) | {"model": "tiny", "reference": "other", "device": "cpu"}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def uft_eval(*words):
    return main(["eval", "--config", "eval.yaml", *map(str, words)])


def result(folder):
    return json.loads(Path(folder, "evaluation.json").read_text())


def test_eval_writes_and_prints(workplace, capsys):
    assert uft_eval() == 0
    printed = capsys.readouterr().out
    found = result("tiny")  # the model's own folder
    assert "evaluation.json and evaluation.md in tiny" in printed
    assert f"{found['metrics']['demonstrations/nll']:.4g}" in printed
    assert found["info"]["model"] == "tiny" and found["info"]["reference"] == "other"
    assert "# Evaluation of tiny" in Path("tiny/evaluation.md").read_text()

    assert uft_eval("--model", "other", "--reference", "tiny", "--before", "tiny/evaluation.json") == 0
    printed = capsys.readouterr().out
    metrics = result("other")["metrics"]
    assert "change" in printed and "pairs/F_true" in printed
    assert metrics["pairs/F"] > 0 or metrics["pairs/BT"] > 0
    assert "Compared with tiny" in Path("other/evaluation.md").read_text()


def test_eval_of_an_adapter(workplace):
    few = ["--verifiable", "null", "--refusals", "null", "--prompts", "null"]
    assert uft_eval("--model", "adapter", "--reference", "adapter", "--output_dir", "a", *few) == 0
    assert uft_eval("--model", "adapter", "--reference", "null", "--output_dir", "b", *few) == 0
    assert uft_eval("--model", "adapter", "--reference", "tiny", "--output_dir", "c", *few) == 0
    found = [result(folder)["metrics"] for folder in "abc"]
    assert found[0] == found[1] == pytest.approx(found[2], rel=1e-3, abs=1e-4)
    assert found[0]["pairs/drift/chosen"] != 0 and found[0]["divergence/prior/policy/kl"] > 1e-3


WRONG = {
    "unknown key": (["--modle", "x"], ["unknown key 'modle'", "'model'"]),
    "unknown option": (["--pairs.preferences.wieght", "2"], ["pairs.preferences", "'wieght'", "'weight'"]),
    "unknown source": (["--pairs.preference.limit", "2"], ["pairs.preference: path is None"]),
    "no such file": (["--pairs.preferences.path", "missing.jsonl"], ["missing.jsonl", "no such file"]),
    "no model": (["--model", "null"], ["'model' is missing"]),
    "model not there": (["--model", "./nowhere"], ["nowhere"]),
    "no adapter": (["--reference", "adapter"], ["reference is 'adapter'", "has none"]),
    "no reference": (["--reference", "null"], ["divergence needs a reference"]),
    "no before": (["--before", "nowhere.json"], ["nowhere.json: no such file"]),
    "before of other rows": (["--before", "before.json"], ["pairs", "the earlier evaluation has 'preferences/9#0'"]),
    "dtype": (["--dtype", "flot"], ["dtype is 'flot'"]),
    "device": (["--device", "gpu"], ["device is 'gpu'"]),
    "wrong type": (["--output_dir", "3"], ["output_dir is 3"]),
    "generation": (["--generation.max_new_tokens", "0"], ["generation: max_new_tokens is 0"]),
    "another vocabulary": (["--reference", "wide"], ["found a vocabulary of 500 and 298 in the model", "same tokens"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_clear_line(case, workplace, capfd):
    words, wanted = WRONG[case]
    if case == "before of other rows":
        sections = ("demonstrations", "pairs", "verifiable", "refusals", "prompts")
        samples = {section: {"id": []} for section in sections} | {"pairs": {"id": ["preferences/9#0"]}}
        Path("before.json").write_text(json.dumps({"metrics": {}, "samples": samples}))
    if case == "another vocabulary":
        model = tiny_model(tiny_tokenizer(), 0)
        model.resize_token_embeddings(500)
        model.save_pretrained("wide")
    assert uft_eval(*words) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("uft: ")]
    assert len(lines) == 1
    for word in wanted:
        assert word in lines[0], lines[0]
    assert not list(workplace.glob("*/evaluation.json"))


def test_the_recipe_parses():
    recipe = EvaluationRecipe.of(read_yaml(str(RECIPE)))
    assert recipe.config.verifiable["choices"].options == 4
    assert recipe.config.divergence["prior"].along == ("policy", "reference")
    assert recipe.config.refusals["harmful"].should_refuse and recipe.folder == Path("runs/first")
    assert recipe.config.verifiable["arithmetic"].source.chat


def test_a_dry_run_reads_all_data_and_measures_nothing(workplace, capsys):
    assert uft_eval("--output_dir", "dry", "--dry-run") == 0
    out = capsys.readouterr().out
    assert uft_eval("--output_dir", "wet") == 0
    for section, columns in result("wet")["samples"].items():
        assert section == "divergence" or f"{section}: {len(columns['id']):,} rows" in out
    assert "divergence: prompts of" in out and not Path("dry").exists()
    assert uft_eval("--dry-run", "--pairs.pairs", "lost.jsonl") == 1
    assert "lost.jsonl" in capsys.readouterr().err
