"""`uft eval`: measures a model as a recipe says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from uft.command_line import recipe_of, recipe_parser


def parser(fields: bool = False) -> argparse.ArgumentParser:
    from uft.evaluation.config import EvaluationConfig

    return recipe_parser(
        "uft eval",
        "Measures a model: held-out likelihood, pairs, divergence from a reference, answers. Prints a table; "
        "evaluation.json and evaluation.md in output_dir. With --before also what was forgotten since then.",
        """
  uft eval --config evaluate.yaml --model BASE --output_dir runs/base
  uft eval --config evaluate.yaml --model runs/first --before runs/base/evaluation.json""",
        fields=EvaluationConfig if fields else None,
    )


def main(words: Sequence[str]) -> int:
    from uft.evaluation.command import looked_over, run

    given = recipe_of(words)
    if given.dry_run:
        print(looked_over(given.recipe))
        return 0
    report, path = run(given.recipe)
    print(report)
    print(f"{path.name} and {path.with_suffix('.md').name} in {path.parent}")
    return 0
