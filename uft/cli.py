"""The command `uft`.

uft train --config recipe.yaml [--key value ...]
uft data check FILE... [--max_length N --tokenizer NAME]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

USAGE = """usage: uft COMMAND ...

  uft train --config recipe.yaml [--key value ...]
      Trains what the recipe says. The command line beats the file; keys may be nested:
      uft train --config recipe.yaml --learning_rate 1e-5 --train_dataset.preferences.weight 2

  uft data check FILE... [--tokenizer NAME] [--max_length N]
      Validates data files and prints counts; one line per bad row, exit code 1 if there are any.

UFT_TRACEBACK=1 shows where an error came from.
"""


def train(words: Sequence[str]) -> int:
    from transformers import AutoTokenizer

    from uft.recipe import RecipeError, override, parse, read_yaml
    from uft.stages import run_stages
    from uft.trainer import UnifiedTrainer

    words = list(words)
    recipe: dict = {}
    while "--config" in words:
        at = words.index("--config")
        if at + 1 >= len(words):
            raise RecipeError("--config needs a file")
        recipe |= read_yaml(words[at + 1])
        del words[at : at + 2]
    plan = parse(override(recipe, words))
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer, trust_remote_code=plan.args.trust_remote_code)
    if len(plan.stages) > 1:
        model, records = run_stages(
            plan.model, plan.stages, plan.train_dataset, plan.args, tokenizer,
            eval_data=plan.eval_dataset, resume=plan.resume,
        )  # fmt: skip
        model.save_pretrained(plan.args.output_dir)
        tokenizer.save_pretrained(plan.args.output_dir)
        print(f"{len(records)} stages; model and run.json in {plan.args.output_dir}")
        return 0
    stage = plan.stages[0]
    trainer = UnifiedTrainer(
        model=plan.model,
        objective=stage.objective,
        args=plan.args,
        train_dataset=plan.train_dataset,
        eval_dataset=plan.eval_dataset,
        processing_class=tokenizer,
    )
    for report in trainer.reports.values():
        print(report)
    trainer.train(resume_from_checkpoint=plan.resume or plan.args.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card()
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    print(f"model, README.md and run.json in {plan.args.output_dir}")
    return 0


def data(words: Sequence[str]) -> int:
    from uft.data.check import main as check

    if not words or words[0] != "check":
        print(USAGE, file=sys.stderr)
        return 2
    return check(words[1:])


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    commands = {"train": train, "data": data}
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
    except KeyboardInterrupt:
        print("uft: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("UFT_TRACEBACK"):
            raise
        print(f"uft: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
