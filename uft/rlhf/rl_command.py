"""`uft rl`: PPO, RLOO or GRPO against reward models or a function, as a recipe says.

uft rl --config rl.yaml [--key value ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from uft.checkpoint import last_checkpoint
from uft.command_line import recipe_of, recipe_parser
from uft.data.mixture import load_feedback
from uft.data.rows import is_number
from uft.recipe import RecipeError, _known, _sources, parse_config
from uft.rlhf.config import RLConfig
from uft.rlhf.guards import HackingGuard, Limits
from uft.rlhf.ppo import RLTrainer
from uft.rlhf.reward import RewardEnsemble, RewardModel
from uft.rlhf.rollouts import Critic
from uft.rlhf.sampling import Rewards

_OWN = ("model", "tokenizer", "prompts", "reward", "conservative", "guard", "resume")
_FIELDS = tuple(f.name for f in dataclasses.fields(RLConfig) if f.init)
_LIMITS = tuple(f.name for f in dataclasses.fields(Limits))


def parser(fields: bool = False) -> argparse.ArgumentParser:
    return recipe_parser(
        "uft rl",
        "Trains a policy against a reward model or a function: PPO (advantage: gae), RLOO or GRPO. The model, run.json "
        "and guard.json lie in output_dir.",
        """
  uft recipe rl > rl.yaml
  uft rl --config rl.yaml --max_steps 200""",
        fields=RLConfig if fields else None,
    )


def main(words: Sequence[str]) -> int:
    recipe, dry_run = recipe_of(words)
    there = Path(recipe.get("output_dir", "runs/rl")).exists()
    trainer = trainer_of(recipe)
    if dry_run:
        if not there and Path(trainer.args.output_dir).is_dir():
            Path(trainer.args.output_dir).rmdir()  # which transformers' trainer makes
        print(f"{planned(trainer)}\nNothing was trained or written: --dry-run.")
        return 0
    newest = last_checkpoint(trainer.args.output_dir) if recipe.get("resume") else None
    trainer.train(resume_from_checkpoint=newest or trainer.args.resume_from_checkpoint)
    trainer.save_model()
    for guard in (c for c in trainer.callback_handler.callbacks if isinstance(c, HackingGuard)):
        if guard.stopped:
            print(f"stopped by its guard: {guard.stopped}")
    print(f"model, run.json in {trainer.args.output_dir}")
    return 0


def planned(trainer: RLTrainer) -> str:
    """What training would do.  Policy, rewards and prompts are there already, so that they fit together."""
    args, prompts = trainer.args, trainer.train_dataset
    return (
        f"{args.advantage}: {args.max_steps:,} steps over {len(prompts.prompts):,} prompts; a rollout asks "
        f"{prompts.size} of them for {args.samples} responses of at most {args.max_new_tokens} tokens each, and trains "
        f"{args.updates} step(s); in {args.output_dir}"
    )


def trainer_of(recipe: Mapping[str, Any]) -> RLTrainer:
    """Raises RecipeError for a recipe that cannot be used."""
    for key in recipe:
        _known(key, (*_OWN, *_FIELDS), "")
    for key in ("model", "prompts", "reward"):
        if not recipe.get(key):
            raise RecipeError(f"key {key!r} is missing")
    values = {"output_dir": "runs/rl"} | {key: value for key, value in recipe.items() if key in _FIELDS}
    args = parse_config(values, of=RLConfig)
    tokenizer = AutoTokenizer.from_pretrained(recipe.get("tokenizer") or recipe["model"])
    rewards, members, spread = _rewards(recipe, tokenizer, args.device)
    if args.advantage == "gae" and not members:
        raise RecipeError("advantage is 'gae' and reward a function; want a reward model, whose copy is the critic")
    sources = _sources(recipe["prompts"], "prompts")
    for source in sources.values():
        if source.weight != 1.0:
            raise RecipeError(f"prompts.{source.name}: weight is {source.weight}; prompts are all drawn equally often")
    if recipe.get("guard"):
        guard = _guard(recipe["guard"])
        if guard.limits.spread and spread is None:
            raise RecipeError("guard: spread is of an ensemble; want several reward models")
        if guard.limits.kl and args.kl_in == "none":
            raise RecipeError("guard: kl wants a reference; kl_in is 'none'")
    data, report = load_feedback(sources, tokenizer, args.max_length, on_bad_row=args.on_bad_row)
    print(report)
    if "document" in set().union(*data.kinds().values()):
        raise RecipeError("prompts: found documents; want rows with a prompt")
    return RLTrainer(
        recipe["model"], rewards, list(data), args, tokenizer,
        critic=Critic.of(members[0]) if args.advantage == "gae" else None, spread=spread,
        callbacks=[guard] if recipe.get("guard") else None,
        name=f"{recipe['reward']} conservative {recipe.get('conservative') or 0}, of {recipe['model']}",
    )  # fmt: skip


def _rewards(
    recipe: Mapping[str, Any], tokenizer: Any, device: torch.device
) -> tuple[Rewards, list[RewardModel], Rewards | None]:
    given, conservative = recipe["reward"], recipe.get("conservative") or 0.0
    if not is_number(conservative) or conservative < 0:
        raise RecipeError(f"conservative is {conservative!r}; want a number >= 0")
    names = given if isinstance(given, list) else [given]
    if not all(isinstance(name, str) for name in names):
        raise RecipeError(f"reward is {given!r}; want a folder or hub id, a list of them, or module:function")
    if len(names) == 1 and not Path(names[0]).exists() and ":" in names[0]:
        if conservative:
            raise RecipeError("conservative is of an ensemble; found a function for reward")
        return _function(names[0]), [], None
    members = [RewardModel.load(name, device=device) for name in names]
    for name, member in zip(names, members):
        if member.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise RecipeError(f"reward {name}: its tokenizer is not the policy's; want one with the same tokens")
    if len(members) == 1:
        if conservative:
            raise RecipeError("conservative is of an ensemble; found one reward model")
        return members[0], members, None
    ensemble = RewardEnsemble(members)
    return ensemble.conservative(conservative) if conservative else ensemble, members, ensemble.spread


def _function(name: str) -> Rewards:
    """`module:function`, the module found in the working directory or installed."""
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"reward {name!r}: {error}; want a folder, or module:function") from None
    if not callable(found):
        raise RecipeError(f"reward {name!r}: found {type(found).__name__}; want a function")
    return found


def _guard(options: Any) -> HackingGuard:
    if not isinstance(options, Mapping):
        raise RecipeError(f"guard is {options!r}; want a mapping such as {{kl: 10.0, distinct: 0.5}}")
    for key in options:
        _known(key, (*_LIMITS, "action", "patience"), "guard: ")
    try:
        limits = Limits(**{key: value for key, value in options.items() if key in _LIMITS})
        return HackingGuard(limits, **{key: value for key, value in options.items() if key not in _LIMITS})
    except ValueError as error:
        raise RecipeError(f"guard: {error}") from None
