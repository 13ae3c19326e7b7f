"""The command `uft`.

uft train --config recipe.yaml [--key value ...]
uft eval --config eval.yaml [--key value ...]
uft reward train --config reward.yaml | evaluate --model FOLDER FILE...
uft rl --config rl.yaml
uft data check FILE... [--max_length N --tokenizer NAME]
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from uft.recipe import Recipe
    from uft.trainer import UnifiedTrainer

USAGE = """usage: uft COMMAND ...

  uft train --config recipe.yaml [--key value ...]
      Trains what the recipe says. The command line beats the file; keys may be nested:
      uft train --config recipe.yaml --learning_rate 1e-5 --train_dataset.preferences.weight 2
      With a key `online` the policy also answers prompts in training: experiments/recipes/online.yaml.

  uft eval --config eval.yaml [--before runs/x/evaluation.json]
      Measures a model as the file says: held-out likelihood, pairs, divergence from a reference, answers. Prints a
      table; evaluation.json and evaluation.md in output_dir. With --before also what was forgotten since then.

  uft reward train --config reward.yaml [--key value ...]
  uft reward evaluate --model FOLDER FILE...
      Trains a reward model on pairs, labels and scores; measures its accuracy, calibration and biases.

  uft rl --config rl.yaml [--key value ...]
      Trains a policy against a reward model or a function by PPO, RLOO or GRPO, with guards against reward hacking.

  uft data check FILE... [--eval FILE...] [--report FOLDER] [--tokenizer NAME] [--max_length N] [--quick]
      Validates data files, one line per bad row, exit code 1 if there are any. Then a report on their quality:
      duplicates, evaluation prompts, length bias, contradictions, agreement, scores, terms; --quick leaves it out.

  uft data filter --config filter.yaml [--key value ...]
      Curated data sets by the rules of a recipe, with a card; every dropped row is counted by reason and listed.

  uft data noise FILE --model NAME --output FOLDER [--by reward|implicit] [--threshold NATS|bayes]
      Trains K rewards on parts of the pairs, and says which labels they contradict elsewhere, and how many are wrong.

  uft data select FILE --rule RULE --count N --output queue.jsonl [--model NAME] [--reward_model FOLDER...]
      Chooses pairs to be labelled next: random, margin, disagreement, change or coverage.

  uft data queue import FILE... --queue queue.jsonl --output pairs.jsonl
      Checks what annotators filled in, takes the majority and writes pairs.

UFT_TRACEBACK=1 shows where an error came from.
"""


def train(words: Sequence[str]) -> int:
    from transformers import AutoTokenizer

    from uft.recipe import parse

    recipe = _recipe(words)
    online = recipe.pop("online", None)
    plan = parse(recipe)
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer, trust_remote_code=plan.args.trust_remote_code)
    if online is not None:
        from uft.rlhf.online_recipe import online_trainer

        _train(online_trainer(plan, online, tokenizer), plan)
    else:
        (_train_stages if plan.stages else _train_once)(plan, tokenizer)
    print(f"model, README.md and run.json in {plan.args.output_dir}")
    return 0


def _recipe(words: Sequence[str]) -> dict:
    from uft.recipe import RecipeError, override, read_yaml

    recipe: dict = {}
    rest, words = [], list(words)
    while words:
        word = words.pop(0)
        if word == "--config" and not words:
            raise RecipeError("--config needs a file")
        if word == "--config" or word.startswith("--config="):
            recipe |= read_yaml(words.pop(0) if word == "--config" else word.partition("=")[2])
        else:
            rest.append(word)
    return override(recipe, rest)


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

    for report in trainer.reports.values():
        print(report)
    # with `resume: true` the first start and every later one are the same command
    newest = last_checkpoint(plan.args.output_dir) if plan.resume else None
    if plan.resume and newest is None:
        print(f"no whole checkpoint in {plan.args.output_dir}: starting from the beginning")
    trainer.train(resume_from_checkpoint=newest or plan.args.resume_from_checkpoint)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.write_record()
    trainer.save_model()
    trainer.create_model_card()


def _train_stages(plan: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    from uft.data.mixture import load_feedback
    from uft.model_card import write_model_card
    from uft.stages import run_stages, save_after_stages

    data = []
    for sources in (plan.train_dataset, plan.eval_dataset):
        if sources is None:
            data.append(None)
            continue
        feedback, report = load_feedback(
            sources, tokenizer, plan.args.max_length, on_bad_row=plan.args.on_bad_row, cache=plan.args.data_cache
        )
        print(report)
        data.append(feedback)
    model, records = run_stages(
        plan.model, plan.stages, data[0], plan.args, tokenizer, eval_data=data[1], resume=plan.resume
    )
    if plan.args.process_index == 0:
        save_after_stages(model, plan.stages, plan.args.output_dir)
        tokenizer.save_pretrained(plan.args.output_dir)
        write_model_card(plan.args.output_dir, records)


def evaluate(words: Sequence[str]) -> int:
    from uft.evaluation.command import run

    report, path = run(_recipe(words))
    print(report)
    print(f"{path.name} and {path.with_suffix('.md').name} in {path.parent}")
    return 0


def reward(words: Sequence[str]) -> int:
    from uft.rlhf.command import main as run

    return run(words)


DATA_COMMANDS = {
    "check": "uft.data.check_command",
    "filter": "uft.data.filter",
    "noise": "uft.data.noise",
    "select": "uft.data.selection",
    "queue": "uft.data.queue",
}


def data(words: Sequence[str]) -> int:
    if not words or words[0] not in DATA_COMMANDS:
        print(USAGE, file=sys.stderr)
        return 2
    return importlib.import_module(DATA_COMMANDS[words[0]]).main(words[1:])


def rl(words: Sequence[str]) -> int:
    from uft.rlhf.rl_command import main as run

    return run(words)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    commands = {"train": train, "eval": evaluate, "data": data, "reward": reward, "rl": rl}
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] not in commands:
        print(f"uft: unknown command {words[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    if "-h" in words or "--help" in words:
        print(USAGE)
        return 0
    try:
        return commands[words[0]](words[1:])
    except KeyboardInterrupt as error:
        print(f"uft: {_how_to_go_on(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except SystemExit as error:
        if not str(error).startswith("stopped by"):
            raise
        print(f"uft: {_how_to_go_on(error)}", file=sys.stderr)
        return error.code
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("UFT_TRACEBACK"):
            raise
        print(f"uft: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _how_to_go_on(stopped: BaseException) -> str:
    return f"{stopped}: the same command with --resume true" if str(stopped) else ""


if __name__ == "__main__":
    sys.exit(main())
