"""`uft train`: one objective, or stages one after the other, as a recipe says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from uft.command_line import check_output, recipe_of, recipe_parser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from uft.recipe import Recipe
    from uft.trainer import UnifiedTrainer


SPLITS = {"train": "training data", "eval": "held-out data"}


def parser(fields: bool = False) -> argparse.ArgumentParser:
    from uft.config import UnifiedConfig

    return recipe_parser(
        "uft train",
        "Trains what the recipe says: one joint objective, or stages one after the other. The command line beats the "
        "file, and keys may be nested.",
        """
  uft train --config first.yaml --dry-run                    # what would happen, and nothing else
  uft train --config first.yaml --learning_rate 1e-5
  uft train --config first.yaml --objective.beta 0.2 --train_dataset.preferences.weight 2
  uft train --config first.yaml --resume true                # the first start and every later one""",
        fields=UnifiedConfig if fields else None,
    )


def main(words: Sequence[str]) -> int:
    from uft.loading import load_tokenizer
    from uft.recipe import parse

    given = recipe_of(words)
    recipe = given.recipe
    online = recipe.pop("online", None)
    plan = parse(recipe)
    tokenizer = load_tokenizer(plan.tokenizer, plan.args.trust_remote_code)
    check_output(plan.args.output_dir)
    if given.dry_run:
        from uft.cli.dry_run import describe

        print(describe(plan, tokenizer, online))
        return 0
    if online is not None:
        from uft.rlhf.online_recipe import online_trainer

        _train(online_trainer(plan, online, tokenizer), plan)
    else:
        (_train_stages if plan.stages else _train_once)(plan, tokenizer)
    print(f"model, README.md and run.json in {plan.args.output_dir}")
    return 0


def _train_once(plan: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    from uft.trainer import UnifiedTrainer

    trainer = UnifiedTrainer(
        model=plan.model,
        objective=plan.objective,
        args=plan.args,
        train_dataset=plan.train_dataset,
        eval_dataset=plan.eval_dataset,
        processing_class=tokenizer,
    )
    _train(trainer, plan)


def _train(trainer: UnifiedTrainer, plan: Recipe) -> None:
    from uft.checkpoint import last_checkpoint

    for split, report in trainer.reports.items():
        print(f"{SPLITS.get(split, split)}\n{report}")
    # with `resume: true` the first start and every later one are the same command
    newest = last_checkpoint(plan.args.output_dir) if plan.resume else None
    if plan.resume and newest is None:
        print(f"no whole checkpoint in {plan.args.output_dir}: starting from the beginning")
    _say_what_is_lost(plan)
    trainer.train(resume_from_checkpoint=newest or plan.args.resume_from_checkpoint)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", _last_evaluation(trainer) or trainer.evaluate())
    trainer.write_record()
    trainer.save_model()
    trainer.create_model_card()


def _last_evaluation(trainer: UnifiedTrainer) -> dict[str, float]:
    """What was measured of the model as it is now; nothing where that is not the one of the last step."""
    if trainer.args.load_best_model_at_end:
        return {}
    logs = (log for log in trainer.state.log_history if log.get("step") == trainer.state.global_step)
    return {name: value for log in logs for name, value in log.items() if name.startswith("eval_")}


def _say_what_is_lost(plan: Recipe) -> None:
    from uft.checkpoint import RECORD

    if not plan.resume and plan.args.process_index == 0 and (Path(plan.args.output_dir) / RECORD).exists():
        print(f"{plan.args.output_dir} holds a finished run, which is written over")


def _train_stages(plan: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    from uft.data.mixture import load_feedback
    from uft.model_card import write_model_card
    from uft.sharing import Shared
    from uft.stages import run_stages, save_after_stages

    shared = Shared.of(plan.args)  # first: whoever may not push learns it before the training
    _say_what_is_lost(plan)
    data = []
    for sources in (plan.train_dataset, plan.eval_dataset):
        if sources is None:
            data.append(None)
            continue
        feedback, report = load_feedback(
            sources, tokenizer, plan.args.max_length, on_bad_row=plan.args.on_bad_row, cache=plan.args.data_cache
        )
        print(f"{SPLITS['train' if not data else 'eval']}\n{report}")
        data.append(feedback)
    model, records = run_stages(
        plan.model, plan.stages, data[0], plan.args, tokenizer, eval_data=data[1], resume=plan.resume
    )
    if plan.args.process_index == 0:
        save_after_stages(model, plan.stages, plan.args.output_dir)
        tokenizer.save_pretrained(plan.args.output_dir)
        write_model_card(plan.args.output_dir, records, shared and shared.name)
        if shared is not None:
            shared.push()
