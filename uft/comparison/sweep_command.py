"""`uft sweep`: search rates, weights, betas and any other key of a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from uft.command_line import goes_on, recipe_of, recipe_parser


def parser(fields: bool = False) -> argparse.ArgumentParser:
    from uft.config import UnifiedConfig

    return recipe_parser(
        "uft sweep",
        "Searches keys of a recipe: `sweep` names them with a range or a list, `metric` is what decides. With `arms` "
        "every arm gets as many trials (of a grid, all of it). What was killed goes on with the same command. Writes "
        "best.yaml, which `uft train` runs, sweep.json, sweep.html and a folder per trial. Needs the extra `sweep` "
        "(optuna).",
        """
  uft sweep --config sweep.yaml --dry-run          # every range checked, and what a trial would cost
  uft sweep --config sweep.yaml
  uft sweep --config sweep.yaml --trials 40        # goes on where 20 ended
  uft train --config runs/sweep/best.yaml""",
        fields=UnifiedConfig if fields else None,
    )


def main(words: Sequence[str]) -> int:
    from uft.comparison.sweep_recipe import Sweep

    given = recipe_of(words, keep_import=True)
    plan = Sweep.of(given.recipe)
    from uft.comparison.sweep import SweepRun  # which says how to install optuna

    sweep = SweepRun(plan)
    if given.dry_run:
        print(_described(sweep))
        return 0
    from uft.comparison.sweep_report import has_compare, terminal, write
    from uft.comparison.sweep_tuned import to_fill_in

    plan.output_dir.mkdir(parents=True, exist_ok=True)
    with goes_on():
        results = sweep.run()
    summary = write(plan, results)
    print(terminal(plan, summary))
    best = [f"best-{arm.name}.yaml" for arm in plan.arms] if plan.has_arms else ["best.yaml"]
    print(f"\n{', '.join(best)}, sweep.json, sweep.html and figures in {plan.output_dir}")
    if has_compare(plan, summary["arms"]):
        print(to_fill_in(plan))
    return 0


def _described(sweep) -> str:
    from uft.cli.dry_run import describe
    from uft.comparison.sweep_report import own_measure

    plan, lines = sweep.plan, []
    for arm in plan.arms:
        if plan.has_arms:
            lines += [f"══ arm {arm.name} " + "═" * max(0, 71 - len(arm.name)), ""]
        lines += [describe(sweep.first(arm).plan, sweep.tokenizer), ""]
        lines += ["searched, above at the first value of each:", *(f"  {parameter}" for parameter in arm.space), ""]
        moving = own_measure(plan, [parameter.key for parameter in arm.space])
        lines += [f"! {moving}", ""] if moving else []
    trials = {arm.name: plan.wanted(arm) for arm in plan.arms}
    runs = sum(trials.values()) * len(plan.seeds)
    several = len(set(trials.values())) > 1
    each = " and ".join(f"{n} of {name}" for name, n in trials.items()) if several else f"{max(trials.values())}"
    return "\n".join(
        [
            *lines,
            f"{each} trials{' of each arm' if plan.has_arms and not several else ''} by {plan.sampler}, "
            f"{len(plan.seeds)} seed{'s' if len(plan.seeds) > 1 else ''} each: {runs} runs at most",
            f"best is what has {plan.metric} {plan.direction}d; output: {plan.output_dir}",
            "Nothing was trained or written: --dry-run.",
        ]
    )
