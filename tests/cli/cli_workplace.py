"""What is in the folder where the commands run, and how they are run there."""

import json

import torch
import yaml

from uft.cli import main

PROMPTS = ["say:", "say a b c:", "hello:", "the cat on the mat:", "1 + 2 =", "good:"]
GOOD = [" hello world", " the cat sat on the mat", " c", " good bye", " 3", " bye bye bye"]
BAD = [" mat the on", " b", " a b c d e f g 1 2 3", " hello", " the cat sat", " g"]

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
