"""`uft compare`: the lab's comparison, or ways of training on the user's own model and data."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uft.command_line import DRY_RUN, goes_on, recipe_of, recipe_parser

LAB = "uft_experiments.sequential_vs_unified"
KEEPS_RESULTS = ("--full", "--search", "--results", "--add")  # of the lab: these write into experiments/results


def parser(fields: bool = False) -> argparse.ArgumentParser:
    from uft.config import UnifiedConfig

    found = recipe_parser(
        "uft compare",
        "Compares ways of training. With --config: arms of a recipe, on your own model and data, at equal FLOPs, on "
        "several seeds, measured after every stage, with paired statistics; finished runs are not run again. Without: "
        "sequential beside unified training in the lab's small world, where forgetting is known exactly.",
        """
  uft compare --quick                                   # the lab: shows that everything runs, in minutes
  uft compare --seeds 0 1 2                             # the lab: ten arms; writes runs/compare

  uft compare --config compare.yaml --dry-run           # your own: every arm, its steps, cost and memory
  uft compare --config compare.yaml
  uft compare --config compare.yaml --seeds 0 1 2 3 4 5 6    # goes on: only the new seeds are run
  uft compare --config compare.yaml --budget.flops joint     # another arm decides how long all train

A recipe to begin with: uft recipe compare. What it writes and means: docs/comparing.md.""",
        fields=UnifiedConfig if fields else None,
    )
    found.usage = "uft compare --config FILE [--KEY VALUE ...] [--dry-run]\n       uft compare [--quick | --full] [...]"
    lab = found.add_argument_group("without --config: the lab")
    lab.add_argument("--quick", action="store_true", help="toy size: shows that everything runs, nothing else")
    lab.add_argument("--full", action="store_true", help="every arm, ten seeds for the contrasts, the search; hours")
    lab.add_argument("--seeds", metavar="N", nargs="+", help="default: 0 1 2")
    lab.add_argument("--arms", metavar="ARM", nargs="+", help="names in experiments/arms.py")
    lab.add_argument("--variants", metavar="FORM", nargs="+", help="forms of preferences")
    lab.add_argument("--tables", metavar="TABLE", nargs="+", help="flops, examples")
    lab.add_argument("--workers", metavar="N", help="runs side by side")
    lab.add_argument("--output", metavar="FOLDER", help="default: runs/compare")
    return found


def main(words: Sequence[str]) -> int:
    if any(word == "--config" or word.startswith("--config=") for word in words):
        return _own(words)
    return _lab(words)


# ---- the lab ----


def _lab(words: Sequence[str]) -> int:
    asked = [word for word in words if word in DRY_RUN]
    if asked:
        raise ValueError(f"{asked[0]} is for recipes; want --config FILE beside it")
    try:
        lab = importlib.import_module(LAB)
    except ModuleNotFoundError as error:
        if not LAB.startswith(str(error.name)):
            raise
        raise ImportError(f"{LAB} is not installed; want the whole package: pip install unified-finetuning") from None
    keeps = [word for word in words if word in KEEPS_RESULTS]
    if keeps and not checkout_of(lab):
        raise ValueError(
            f"{keeps[0]} writes into experiments/results of a checkout, and {lab.RESULTS.parent} is none; want "
            "`git clone` and `make compare-full`, or a run without it"
        )
    return lab.main(list(words))


def checkout_of(lab: Any) -> bool:
    """Whether the lab stands in a checkout, where its results are committed."""
    return (Path(lab.__file__).resolve().parents[1] / ".git").exists()


# ---- the user's own ----


def _own(words: Sequence[str]) -> int:
    from uft.comparison.compare import Prepared, run
    from uft.comparison.planning import described, expected_of_all
    from uft.comparison.recipe import Comparison
    from uft.comparison.report import terminal, write
    from uft.comparison.runs import free_memory
    from uft.comparison.summary import summary_of
    from uft.record import write_json

    given = recipe_of(words, keep_import=True)
    plan = Comparison.of(given.recipe)
    if any(arm.plan.args.world_size > 1 for arm in plan.arms):
        raise ValueError("uft compare was started on several ranks; want one process, and `uft train` for each arm")
    prepared = Prepared.of(plan)
    if given.dry_run:
        print(described(prepared))
        return 0
    expected_of_all(prepared)  # refuses an arm that would have nothing left, before anything is trained
    plan.output_dir.mkdir(parents=True, exist_ok=True)
    with goes_on():
        base = prepared.base()
        free_memory()
        runs = run(prepared)
    summary = summary_of(plan, base.metrics, runs)
    write_json(plan.output_dir / "summary.json", summary)
    write(summary, plan.output_dir)
    print()
    print(terminal(summary))
    print(f"\ncomparison.html, comparison.md, summary.json and figures in {plan.output_dir}")
    return 0
