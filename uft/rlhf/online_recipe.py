"""The key `online` of a recipe: which data sets are prompts, and what scores the answers.

online:
  sources: prompts                   # names of data sets, one or a list
  rewards: number                    # or exact: against the row's own answer; a reward model's folder; module:function
  samples: 4                         # and the other fields of `uft.rlhf.online.Online`
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uft.data.mixture import FeedbackDataset, load_feedback
from uft.evaluation.verifiable import verify
from uft.recipe import Recipe, RecipeError, _known
from uft.rlhf.online import Online, OnlineTrainer
from uft.rlhf.reward import RewardModel
from uft.rlhf.sampling import Rewards
from uft.rlhf.targets import verified

VERIFIERS = ("number", "exact")
_FIELDS = tuple(f.name for f in dataclasses.fields(Online) if f.name not in ("spread", "name"))


def online_trainer(plan: Recipe, options: Any, tokenizer: Any) -> OnlineTrainer:
    """Raises RecipeError for options that cannot be used."""
    if plan.stages:
        raise RecipeError("online: found beside stages; want it beside 'objective'")
    args, own = plan.args, dict(checked(options))
    data, report = load_feedback(
        plan.train_dataset, tokenizer, args.max_length, on_bad_row=args.on_bad_row, cache=args.data_cache
    )
    name = own.pop("rewards")
    rewards = _rewards(name, tokenizer, data, args.device)
    try:
        online = Online(rewards, **own, name=name)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"online: {str(error).removeprefix('online: ')}") from None
    trainer = OnlineTrainer(
        plan.model, plan.objective, args, data, plan.eval_dataset, tokenizer, online=online
    )  # fmt: skip
    trainer.reports = {"train": report} | trainer.reports
    return trainer


def checked(options: Any) -> Mapping[str, Any]:
    """The options, whose keys are known.  Raises RecipeError."""
    if not isinstance(options, Mapping) or not isinstance(options.get("rewards"), str):
        raise RecipeError(f"online is {options!r}; want a mapping with rewards, such as {{rewards: number}}")
    for key in options:
        _known(key, _FIELDS, "online: ")
    return options


def _rewards(name: str, tokenizer: Any, data: FeedbackDataset, device: Any) -> Rewards:
    if name in VERIFIERS:
        return verified(functools.partial(_right, name), tokenizer, data)
    if Path(name).exists() or ":" not in name:
        model = RewardModel.load(name, device=device)
        if model.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise RecipeError(f"online: rewards {name}: its tokenizer is not the policy's; want the same tokens")
        return model
    from uft.rlhf.rl_command import _function

    return _function(name)


def _right(kind: str, text: str, answer: str) -> float:
    return float(verify(kind, text, answer))
