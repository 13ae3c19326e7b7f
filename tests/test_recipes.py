"""Every recipe parses, reads data of the schema that its data sets have, and trains a tiny model."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from uft.cli import main
from uft.recipe import parse, read_yaml

# those of other commands than `uft train` are tried where these are tested
RECIPES = sorted((Path(__file__).parent.parent / "experiments" / "recipes").glob("*.yaml"))
RECIPES = [path for path in RECIPES if path.stem not in ("evaluate", "reward", "rl", "data_filter", "compare", "sweep")]
HERE = {"bf16": False, "use_cpu": True}  # where there may be no GPU
SENTENCES = ["the cat sat on the mat", "hello world", "good bye", "a b c d e f g", "1 2 3", "the mat"]


def texts(n, shift=0):
    return [SENTENCES[(i * 5 + shift) % len(SENTENCES)] + f" {i}" for i in range(n)]


# the columns that the data sets on the hub have, and how they are asked for
HUB = {
    ("HuggingFaceH4/ultrachat_200k", None, "train_sft"): Dataset.from_dict(
        {
            "prompt": texts(6),
            "prompt_id": [f"{i:032x}" for i in range(6)],
            "messages": [
                [
                    {"content": text, "role": "user"},
                    {"content": "hello world", "role": "assistant"},
                    {"content": "good bye", "role": "user"},
                    {"content": "a b c", "role": "assistant"},
                ]
                for text in texts(6)
            ],
        }
    ),
    ("nvidia/HelpSteer2", None, "train"): Dataset.from_dict(
        {
            "prompt": [text for text in texts(3) for _ in range(2)],
            "response": texts(6, shift=1),
            "helpfulness": [4, 2, 3, 0, 4, 4],
            "correctness": [4, 2, 3, 0, 4, 3],
            "coherence": [4, 4, 4, 0, 4, 4],
            "complexity": [2, 1, 2, 2, 0, 2],
            "verbosity": [2, 1, 2, 0, 4, 2],
        }
    ),
    ("Atsunori/HelpSteer2-DPO", None, "train"): Dataset.from_dict(
        {"prompt": texts(6), "chosen_response": texts(6, shift=1), "rejected_response": texts(6, shift=2)}
    ),
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a tiny model and the local files that recipes name; the hub gives what is above."""
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, seed=0).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    rows = HUB["Atsunori/HelpSteer2-DPO", None, "train"]
    rows.rename_columns({"chosen_response": "chosen", "rejected_response": "rejected"}).to_parquet(
        tmp_path / "pairs.parquet"
    )
    HUB["nvidia/HelpSteer2", None, "train"].select_columns(["prompt", "response"]).rename_column(
        "response", "completion"
    ).to_json(tmp_path / "demonstrations.jsonl")
    monkeypatch.setattr("datasets.load_dataset", lambda path, subset=None, split=None: HUB[path, subset, split])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def takes_part_here(path):
    """Recipes of other programs live in the folder too; these are for `uft train`."""
    return "train_dataset" in yaml.safe_load(path.read_text())


RECIPES = [path for path in RECIPES if takes_part_here(path)]


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert {"first", "paper_unified", *(f"paper_sequential_{stage}" for stage in ("dpo", "kto", "una"))} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(path, workplace):
    recipe = read_yaml(str(path))
    words = [
        "train", "--config", str(path), "--model", "tiny", "--max_steps", "2", "--output_dir", "out", "--use_cpu",
        "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "3", "--logging_steps", "1",
        "--disable_tqdm", "--bf16", "false", "--max_length", "128", "--save_strategy", "no",
    ]  # fmt: skip
    assert main(words) == 0
    record = json.loads((workplace / "out" / "run.json").read_text())
    stages = record.get("stages", [record])
    assert len(stages) == len(recipe.get("stages", [0]))
    for stage in stages:
        assert stage["steps"] == 2
        assert all(entry["loss"] > 0 for entry in stage["metrics"] if "loss" in entry)
        assert set(stage["data"]["train"]["sizes"].values()) == {6}
    assert (workplace / "out" / "README.md").is_file()
    if recipe.get("use_peft") and len(stages) == 1:
        assert (workplace / "out" / "adapter_model.safetensors").is_file()
    else:
        AutoModelForCausalLM.from_pretrained(workplace / "out")


def test_the_papers_numbers():
    """What Wang et al. (arXiv:2410.21438) state of their set-up."""
    for path in RECIPES:
        if not path.stem.startswith("paper_"):
            continue
        plan = parse(read_yaml(str(path)) | HERE)
        assert plan.model == "mistralai/Mistral-7B-v0.1"
        assert plan.args.use_peft and plan.args.lora_r == 16
        assert plan.train_dataset["ultrachat"].limit == 20_000
        if plan.stages:
            first, second = plan.stages
            assert first.args["learning_rate"] == 1e-4
            assert second.reference == "previous" and second.on == ("helpsteer2",)
            assert second.objective.name == path.stem.removeprefix("paper_sequential_")
        else:
            assert plan.args.learning_rate == 3e-5
            (term,) = plan.objective.terms
            assert (plan.objective.name, term.beta) == ("uft", 0.01)


def test_the_papers_score(workplace):
    """(0.65 helpfulness + 0.8 correctness + 0.45 coherence) / (1.9 * 4)."""
    from uft.data import load_feedback

    plan = parse(read_yaml(str(RECIPES[0].with_name("paper_unified.yaml"))) | HERE)
    data, _ = load_feedback({"helpsteer2": plan.train_dataset["helpsteer2"]}, tiny_tokenizer(), max_length=128)
    rows = HUB["nvidia/HelpSteer2", None, "train"]
    expected = [(0.65 * r["helpfulness"] + 0.8 * r["correctness"] + 0.45 * r["coherence"]) / (1.9 * 4) for r in rows]
    assert [example.responses[0].target for example in data] == pytest.approx(expected)
    assert (
        tiny_tokenizer().decode(data[0].prompt)
        == f"<|im_start|>user\n{rows[0]['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    )
