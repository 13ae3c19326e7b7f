"""Which pairs should be labelled next?

Rules     random, margin, disagreement of three rewards, expected change, coverage of embeddings (uft/data/selection.py)
Pools     768 unlabelled pairs of the lab: even, where prompts are drawn as the test's are, and skewed, where some of
          what the test asks is rare (experiments/lab/active.py)
Rounds    16 random labels, the same for every rule; then each rule chooses up to 32, 64 and 128 in three rounds,
          and a reward model is trained afresh from the base on all labels so far
Equal     base weights, pool, first labels, steps, learning rate; the rewards of `disagreement` cost three times as much
Measured  share of 512 held-out pairs that the reward model judges as the hidden utility does; paired by seed against
          random, at each budget and as the mean over the budgets that rules differ in
Run       python -m experiments.active_selection [--quick] [--results]        10 runs, half an hour
Writes    runs/active_selection/{report.md, summary.json, active_selection.png}
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uft.comparison.statistics import holm, interval, paired_difference, sign_flip
from uft.data.selection import RULES
from uft.record import environment, write_json
from uft.reporting.page import keep

from .jobs import Job, run_jobs
from .lab.active import learning_curves

RESULTS = Path(__file__).parent / "results" / "active_selection"
BUDGETS, SIZE, MEMBERS, STEPS = [16, 32, 64, 128], 768, 3, 40
POOLS = ("even", "skewed")
SEEDS = list(range(5))
QUESTION = "Which pairs should be labelled next?"

Runs = Sequence[Mapping[str, Any]]


def at_budget(runs: Runs, rule: str, k: int) -> dict[int, float]:
    return {run["seed"]: run["accuracy"][rule][k] for run in runs}


def over_budgets(runs: Runs, rule: str) -> dict[int, float]:
    """The mean over all budgets but the first, at which all rules are the same."""
    return {run["seed"]: float(np.mean(run["accuracy"][rule][1:])) for run in runs}


def compared(runs: Runs) -> dict[str, dict[str, Any]]:
    """Rule -> its difference from random over budgets, with p-values (sign flips) adjusted over the rules (Holm)."""
    base, found, p = over_budgets(runs, "random"), {}, {}
    for rule in runs[0]["accuracy"]:
        if rule == "random":
            continue
        own = over_budgets(runs, rule)
        found[rule] = {"difference": paired_difference(own, base)._asdict()}
        p[rule] = sign_flip([own[seed] - base[seed] for seed in own])
    adjusted = holm(p)
    return {rule: of | {"p": p[rule], "p_holm": adjusted[rule]} for rule, of in found.items()}


def verdict(pool: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Which rules differ from random after correction, and, said apart, which by their uncorrected interval alone.

    Better and worse are held to the same: p < 0.05 after Holm's correction over the rules of a pool.
    """
    sure = [rule for rule, of in found.items() if of["p_holm"] < 0.05]
    alone = [rule for rule in found if rule not in sure and _excludes_zero(found[rule]["difference"])]
    if sure:
        said = f"distinguishable from random after Holm's correction over the rules: {_both_ways(sure, found)}."
    else:
        said = "after Holm's correction over the rules, none is distinguishable from random."
    if alone:
        said += f" By the uncorrected 95 % interval alone, which proves nothing here: {_both_ways(alone, found)}."
    return f"**{pool} pool:** {said}"


def _excludes_zero(difference: Mapping[str, float]) -> bool:
    return difference["low"] > 0 or difference["high"] < 0


def _both_ways(rules: Sequence[str], found: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name, sign in (("better", 1), ("worse", -1)):
        its = [rule for rule in rules if sign * found[rule]["difference"]["mean"] > 0]
        numbers = (f"{rule} ({_mean_and_interval(found[rule]['difference'])})" for rule in its)
        parts += [f"{name} {', '.join(numbers)}"] if its else []
    return "; ".join(parts)


def _mean_and_interval(d: Mapping[str, float]) -> str:
    return f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"


def tables(runs: Runs, found: Mapping[str, Mapping[str, Any]]) -> list[tuple[list[str], list[list[str]]]]:
    budgets, rules = runs[0]["budgets"], list(runs[0]["accuracy"])
    accuracy = [
        [rule, *(str(interval(list(at_budget(runs, rule, k).values()))) for k in range(len(budgets)))] for rule in rules
    ]
    differences = []
    for rule, of in found.items():
        d = of["difference"]
        per_budget = [paired_difference(at_budget(runs, rule, k), at_budget(runs, "random", k))
                      for k in range(1, len(budgets))]  # fmt: skip
        differences.append(
            [rule, *map(_signed, per_budget), _mean_and_interval(d), f"{of['p']:.3f}", f"{of['p_holm']:.3f}"]
        )  # fmt: skip
    names = ("distance", "nearest", "vendi", "radius")
    spread = [
        [rule, *(f"{np.mean([run['diversity'][rule][name] for run in runs]):.3g}" for name in names)] for rule in rules
    ]
    return [
        (["accuracy at labels", *map(str, budgets)], accuracy),
        (["minus random at labels", *map(str, budgets[1:]), "mean of these", "p", "p, Holm"], differences),
        (["diversity of the labelled", "mean distance", "nearest", "Vendi score", "radius"], spread),
    ]


def _signed(d: Any) -> str:
    return f"{d.mean:+.3f}" + (f" ± {(d.high - d.low) / 2:.3f}" if d.n > 1 else "")


def draw(path: Path, by_pool: Mapping[str, Runs]) -> None:
    """Curves with bands of the 95 % t-interval, and below what each rule gains over random, paired by seed."""
    from .figures import LINES, MARKERS, plt, save

    figure, axes = plt.subplots(2, len(by_pool), figsize=(4.8 * len(by_pool), 6.4), sharex=True, squeeze=False,
                                sharey="row", height_ratios=(3, 2))  # fmt: skip
    for column, (pool, runs) in enumerate(by_pool.items()):
        budgets, top, below = runs[0]["budgets"], axes[0, column], axes[1, column]
        for rule, colour, marker in zip(runs[0]["accuracy"], ("#333333", *LINES), MARKERS):
            bands = [interval(list(at_budget(runs, rule, k).values())) for k in range(len(budgets))]
            _banded(top, budgets, bands, colour, marker, rule)
            if rule != "random":
                bands = [
                    paired_difference(at_budget(runs, rule, k), at_budget(runs, "random", k))
                    for k in range(len(budgets))
                ]
                _banded(below, budgets, bands, colour, marker, rule)
        top.set_title(f"{pool} pool", loc="left")
        top.set_ylim(0.45, 1.01)
        below.axhline(0, color="black", lw=0.8)
        below.set_xlabel("labels")
        below.set_xticks(budgets)
        for axis in (top, below):
            axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("accuracy on held-out pairs")
    axes[1, 0].set_ylabel("minus random, paired by seed")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    save(figure, path)


def _banded(axis: Any, x: Sequence[int], bands: Sequence[Any], colour: str, marker: str, label: str) -> None:
    axis.plot(x, [band.mean for band in bands], color=colour, marker=marker, markersize=5, label=label)
    axis.fill_between(x, [band.low for band in bands], [band.high for band in bands], color=colour, alpha=0.08, lw=0)


def write(folder: Path, by_pool: Mapping[str, Runs], settings: Mapping[str, Any]) -> str:
    """Writes everything into `folder` and returns the tables for the terminal."""
    from .report import markdown_table, terminal_table, write_page

    folder.mkdir(parents=True, exist_ok=True)
    seeds = [run["seed"] for run in next(iter(by_pool.values()))]
    found = {pool: compared(runs) for pool, runs in by_pool.items()}
    draw(folder / "active_selection.png", by_pool)
    text = [f"# {QUESTION}", "", *(line for pool, each in found.items() for line in (verdict(pool, each), ""))]
    text += [
        f"Lab, pairs of a hedged best over the worst and of the best over the hedged; {settings['size']} in the pool, "
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), each with a base model of its own. Mean ± half the 95 % "
        "t-interval. Accuracy is that of a reward model trained on the labels chosen so far, on 512 held-out pairs "
        f"drawn evenly. With {len(seeds)} seeds a p-value of sign flips cannot be below {2.0 ** (1 - len(seeds)):.3g}.",
        "", f"![{QUESTION}](active_selection.png)", "",
    ]  # fmt: skip
    shown = []
    for pool, runs in by_pool.items():
        text += [f"## {pool[0].upper()}{pool[1:]} pool", ""]
        for header, rows in tables(runs, found[pool]):
            text += [markdown_table(header, rows), ""]
        shown += [f"{pool} pool", terminal_table(*tables(runs, found[pool])[1]), ""]
    text += [
        "Diversity is of embeddings of the base model at the last budget; radius is the largest distance of a pair of "
        "the pool to the labelled ones, which coverage makes small. What limits this: labels without noise, one kind "
        "of model and world, learning rate and steps chosen once on random labels and kept."
    ]
    summary = {
        "question": QUESTION, "seeds": seeds, "settings": dict(settings), "compared": found,
        "runs": [run for runs in by_pool.values() for run in runs], **environment(),
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    write_page(folder, "\n".join(text))
    return "\n".join(shown)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size: shows that everything runs, nothing else")
    parser.add_argument("--results", action="store_true", help="also copy what is written into experiments/results")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default {' '.join(map(str, SEEDS))}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/active_selection"))
    parser.add_argument("--cache", type=Path, default=Path("runs/lab/cache"))
    given = parser.parse_args(words)
    if given.quick and given.results:
        parser.error("--quick is a toy: it does not go with --results")
    start, seeds = time.monotonic(), given.seeds or ([0, 1] if given.quick else SEEDS)
    settings = {"rules": list(RULES), "budgets": BUDGETS, "size": SIZE, "members": MEMBERS, "steps": STEPS}
    if given.quick:
        settings |= {"budgets": [4, 8], "size": 32, "members": 2, "steps": 2, "tested": 16}
    jobs = [
        Job(f"{pool} pool, seed {seed}", learning_curves, {"pool": pool, "seed": seed, **settings})
        for pool in POOLS for seed in seeds
    ]  # fmt: skip
    results = iter(run_jobs(jobs, given.cache, workers=given.workers, title="active_selection"))
    print(write(given.output, {pool: [next(results) for _ in seeds] for pool in POOLS}, settings))
    if given.results:
        keep(given.output, RESULTS)
    print(f"{given.output}/report.md, summary.json, figure; {(time.monotonic() - start) / 60:.1f} min", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
