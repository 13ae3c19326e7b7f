"""`uft reward`: training reward models as a recipe says, and measuring them on held-out feedback.

uft reward train --config reward.yaml [--key value ...]
uft reward evaluate --model FOLDER [--model FOLDER ...] FILE...
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from uft.command_line import recipe_of, recipe_parser
from uft.data.mixture import FeedbackDataset, load_feedback
from uft.data.sources import Source
from uft.loading import load_tokenizer
from uft.recipe import RecipeError, _known, _sources, parse_config
from uft.record import peak_memory_bytes, reset_peak_memory
from uft.rlhf.reward import RewardConfig, RewardEnsemble, RewardModel, train_reward_model
from uft.rlhf.reward_report import RewardReport, reward_report

_OWN = ("model", "tokenizer", "train_dataset", "eval_dataset", "members", "calibrate", "dtype")
_FIELDS = tuple(f.name for f in dataclasses.fields(RewardConfig) if f.init)
_TYPES = {"model": str, "tokenizer": str, "dtype": str, "members": int, "calibrate": bool}


def train_parser(fields: bool = False) -> argparse.ArgumentParser:
    return recipe_parser(
        "uft reward train",
        "Trains a reward model, or with `members: N` an ensemble, on pairs, labels and scores. It lies in "
        "<output_dir>/reward_model, or member0, member1, ..., which plain transformers loads.",
        """
  uft recipe reward > reward.yaml
  uft reward train --config reward.yaml --members 4""",
        fields=RewardConfig if fields else None,
    )


def train_main(words: Sequence[str]) -> int:
    given = recipe_of(words)
    if given.dry_run:
        print(f"{planned(given.recipe)}\nNothing was trained or written: --dry-run.")
        return 0
    for folder, report in trained(given.recipe):
        if report is not None:
            print(report)
        print(f"reward model in {folder}")
    return 0


class Plan(NamedTuple):
    """What a recipe says, with its data read."""

    own: Mapping[str, Any]
    args: RewardConfig
    members: int
    dtype: str
    tokenizer: Any
    data: FeedbackDataset
    eval_data: FeedbackDataset | None

    def __str__(self) -> str:
        steps = (
            f"{self.args.max_steps:,} steps" if self.args.max_steps > 0 else f"{self.args.num_train_epochs:g} epochs"
        )
        models = "a reward model" if self.members == 1 else f"{self.members} reward models"
        return f"{models} from {self.own['model']}, {steps} of {len(self.data):,} rows; in {self.args.output_dir}"


def trained(recipe: Mapping[str, Any]) -> list[tuple[Path, RewardReport | None]]:
    """Trains what the recipe says; where each member lies, and what it is worth on eval_dataset.

    Members differ in the seed, and so in head and order of the data.  Raises RecipeError for a recipe that cannot be
    used.
    """
    plan = planned(recipe)
    return [_member(plan, i if plan.members > 1 else None) for i in range(plan.members)]


def planned(recipe: Mapping[str, Any]) -> Plan:
    """Checks the recipe and reads its data.  Raises RecipeError and DataError."""
    for key in recipe:
        _known(key, (*_OWN, *_FIELDS), "")
    own = {key: recipe[key] for key in _OWN if recipe.get(key) is not None}
    for key in ("model", "train_dataset"):
        if not own.get(key):
            raise RecipeError(f"key {key!r} is missing")
    for key, kind in _TYPES.items():
        if key in own and (not isinstance(own[key], kind) or (kind is int and isinstance(own[key], bool))):
            raise RecipeError(f"{key} is {own[key]!r}; want a value of type {kind.__name__}")
    members, dtype = own.get("members", 1), own.get("dtype", "float32")
    if members < 1:
        raise RecipeError(f"members is {members}; want at least 1")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise RecipeError(f"dtype is {dtype!r}; want auto, float32, bfloat16 or float16")
    if members > 1 and recipe.get("resume_from_checkpoint"):
        raise RecipeError("resume_from_checkpoint is of one run; found several members")
    values = {"output_dir": "runs/reward"} | {key: value for key, value in recipe.items() if key in _FIELDS}
    args = parse_config(values, of=RewardConfig)
    tokenizer = load_tokenizer(own.get("tokenizer", own["model"]))
    data = [
        load_feedback(_sources(own[key], key), tokenizer, args.max_length) if own.get(key) else None
        for key in ("train_dataset", "eval_dataset")
    ]
    for _, report in filter(None, data):
        print(report)
    return Plan(own, args, members, dtype, tokenizer, *(None if each is None else each[0] for each in data))


def _member(plan: Plan, number: int | None) -> tuple[Path, RewardReport | None]:
    own, args, _, dtype, tokenizer, data, eval_data = plan
    folder = Path(args.output_dir) / ("reward_model" if number is None else f"member{number}")
    if number is not None:
        seed = args.seed + number
        args = dataclasses.replace(args, seed=seed, data_seed=seed, output_dir=f"{folder}-checkpoints")
    reset_peak_memory()
    model = train_reward_model(
        RewardModel.of(own["model"], tokenizer, seed=args.seed, dtype=dtype), data, args, eval_data,
        resume_from_checkpoint=args.resume_from_checkpoint,
    )  # fmt: skip
    model.training_record["peak_memory_bytes"] = peak_memory_bytes()
    if own.get("calibrate", True):
        model = model.calibrated(list(data if eval_data is None else eval_data))
    if args.process_index:
        return folder, None
    model.save(folder)
    if eval_data is None:
        return folder, None
    report = reward_report(model, list(eval_data), tokenizer, info={"model": str(folder)})
    report.write(folder)
    return folder, report


def evaluate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "uft reward evaluate",
        description="Measures reward models on held-out feedback: accuracy, calibration and what else the rewards "
        "follow (length, lists, ...), as a table; rewards.json, rewards.md and rewards.png in output_dir.",
        epilog="example: uft reward evaluate --model runs/reward/reward_model held_out.jsonl",
    )
    parser.add_argument("data", nargs="+", metavar="FILE", help="pairs, labels or scores: a file or a hub id")
    parser.add_argument("--model", action="append", required=True, help="folder or hub id; several are an ensemble")
    parser.add_argument("--output_dir", help="where the report goes; by default the (first) model's folder")
    parser.add_argument("--max_length", type=int, help="longest prompt + response; by default as in training")
    parser.add_argument("--batch_size", type=int, default=64, help="responses of a pass")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    return parser


def evaluate_main(words: Sequence[str]) -> int:
    given = evaluate_parser().parse_args(list(words))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    models = [RewardModel.load(name, dtype=given.dtype, device=device) for name in given.model]
    tokenizer = models[0].tokenizer
    for name, model in zip(given.model[1:], models[1:]):
        if model.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"{name}: its tokenizer is not that of {given.model[0]}; want members with the same one")
    length = given.max_length or models[0].training_record.get("config", {}).get("max_length", 1024)
    data, report = load_feedback([Source(name=path, path=path) for path in given.data], tokenizer, length)
    print(report)
    rewards = models[0] if len(models) == 1 else RewardEnsemble(models)
    found = reward_report(rewards, list(data), tokenizer, info={"model": " + ".join(given.model), "data": given.data})
    folder = given.output_dir or (given.model[0] if Path(given.model[0]).is_dir() else "runs/reward")
    path = found.write(folder)
    print(found)
    print(f"{path.name}, {path.with_suffix('.md').name} and {path.with_suffix('.png').name} in {path.parent}")
    return 0
