"""Which judgements were turned round, and how many: found by rewards that were trained on the other judgements?

Pairs     the lab's hedged pairs (a hedged best over the worst, the best over the hedged), 0 to 40 % of them turned
          round on purpose; which ones is known, and only used to judge
Judges    a reward model on 400 pairs, the same on 150, and the implicit reward of DPO on 400; each from the base
          model, once per fold, on the other two thirds
Equal     base weights, seeds, prompts, learning rate and epochs per judge, which were not tuned to the noise
Measured  of flags at margin 0 and at Bayes' threshold: precision, recall; of the margins: AUROC; the three estimates of
          `uft.data.noise` against the share that was turned round
Run       python -m experiments.label_noise [--quick] [--results]        45 runs, minutes
Writes    runs/label_noise/{report.md, summary.json, label_noise.png}
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uft.comparison.statistics import interval, paired_difference
from uft.record import environment, write_json
from uft.reporting.page import keep

from .jobs import Job, run_jobs
from .lab.noise import FOLDS, VARIANT, measured

RESULTS = Path(__file__).parent / "results" / "label_noise"
FLIPPED = (0.0, 0.1, 0.2, 0.3, 0.4)
ESTIMATES = ("disagreement", "confident", "likelihood")


@dataclass(frozen=True)
class Judge:
    """What judges: how it is trained, on how many pairs in all, and with what."""

    label: str
    by: str
    pairs: int
    options: Mapping[str, float]


REWARD = {"learning_rate": 1e-3, "num_train_epochs": 3}
JUDGES = {
    "reward": Judge("reward model, 400 pairs", "reward", 400, REWARD),
    "reward_few": Judge("reward model, 150 pairs", "reward", 150, REWARD),
    "implicit": Judge("implicit reward of DPO, 400 pairs", "implicit", 400,
                      {"learning_rate": 3e-4, "num_train_epochs": 2, "beta": 1.0}),
}  # fmt: skip


# ---- report ----


def mean(runs: Sequence[Mapping[str, Any]], *path: str) -> Any:
    values = []
    for run in runs:
        for key in path:
            run = run[key]
        values.append(run)
    known = [value for value in values if value is not None and np.isfinite(value)]
    return interval(known) if known else None


def table(found: Mapping[tuple[str, float], Sequence[Mapping[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    columns = {
        "turned round": ("true",), "by likelihood": ("estimated", "likelihood"),
        "by confident learning": ("estimated", "confident"), "disagree": ("estimated", "disagreement"),
        "AUROC": ("zero", "auroc"), "precision at 0": ("zero", "precision"), "recall at 0": ("zero", "recall"),
        "precision, Bayes": ("bayes", "precision"), "recall, Bayes": ("bayes", "recall"),
        "judge right": ("gold_accuracy",),
    }  # fmt: skip
    rows = [
        [JUDGES[judge].label, f"{100 * flip:g} %", *(_shown(mean(runs, *path)) for path in columns.values())]
        for (judge, flip), runs in found.items()
    ]
    return ["judge", "asked for", *columns], rows


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)


def errors(found: Mapping[tuple[str, float], Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Mean absolute error of each estimate, by judge: over the shares up to 30 % that were asked for and seeds."""
    return {
        judge: {
            name: float(np.mean([
                abs(run["estimated"][name] - run["true"])
                for (its, flip), runs in found.items() if its == judge and flip <= 0.3 for run in runs
                if run["estimated"][name] is not None and np.isfinite(run["estimated"][name])
            ]))
            for name in ESTIMATES
        }
        for judge in dict.fromkeys(judge for judge, _ in found)
    }  # fmt: skip


def errors_by_seed(found: Mapping[tuple[str, float], Sequence[Mapping[str, Any]]]) -> dict[str, dict[int, float]]:
    """Estimate -> seed -> its mean absolute error over judges, each over the shares up to 30 %; see `errors`."""
    runs = [(key, run) for key, each in found.items() for run in each]
    return {
        name: {
            seed: float(np.mean([
                of[name] for of in errors(
                    {key: [run] for key, run in runs if run["seed"] == seed}
                ).values() if np.isfinite(of[name])
            ]))
            for seed in dict.fromkeys(run["seed"] for _, run in runs)
        }
        for name in ESTIMATES
    }  # fmt: skip


def headline(found: Mapping[tuple[str, float], Sequence[Mapping[str, Any]]]) -> list[str]:
    """What was found, a line per judge and one on the estimates, with intervals."""
    lines = []
    for judge in dict.fromkeys(judge for judge, _ in found):
        parts = []
        for (its, flip), runs in found.items():
            if its == judge and flip > 0:
                numbers = (_shown(mean(runs, "zero", name)) for name in ("auroc", "recall", "precision"))
                parts.append(f"{100 * flip:g} %: {', '.join(numbers)}")
        lines.append(f"- **{JUDGES[judge].label}**, AUROC, recall and precision at margin 0: {'; '.join(parts)}.")
    by_seed = errors_by_seed(found)
    means = {name: interval(list(each.values())) for name, each in by_seed.items()}
    best = min(means, key=lambda name: means[name].mean)
    said = ", ".join(f"{name} {each}" for name, each in means.items())
    fewer = ", ".join(f"{name} {paired_difference(by_seed[name], by_seed[best])}" for name in ESTIMATES if name != best)
    return [
        *lines,
        f"- The share of wrong labels is estimated with the smallest mean error by **{best}** ({said}); the others' "
        f"errors minus its own, paired by seed: {fewer}.",
        "- An interval that reaches beyond 0 or 1 says that so few seeds do not fix the number.",
    ]


def draw(path: Path, found: Mapping[tuple[str, float], Sequence[Mapping[str, Any]]]) -> None:
    from .figures import LINES, MARKERS, plt, save

    judges = list(dict.fromkeys(judge for judge, _ in found))
    panels = {"AUROC of the margins": ("zero", "auroc"), "flags at margin 0: precision (solid), recall (dashed)": None,
              "estimated by likelihood (share)": ("estimated", "likelihood")}  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(11.0, 3.7))
    for axis, (title, of) in zip(axes, panels.items()):
        for judge, colour, marker in zip(judges, LINES, MARKERS):
            for values, dash in [(of, "-")] if of else [(("zero", "precision"), "-"), (("zero", "recall"), "--")]:
                points = [
                    (100 * np.mean([run["true"] for run in runs]), mean(runs, *values), runs)
                    for (its, _), runs in found.items() if its == judge
                ]  # fmt: skip
                # without a wrong row precision is 0 or unknown, and says nothing of the judge
                points = [(x, m, runs) for x, m, runs in points if m is not None and (of or x > 0)]
                label = JUDGES[judge].label if dash == "-" else None
                axis.plot([x for x, _, _ in points], [m.mean for _, m, _ in points], dash, color=colour, marker=marker,
                          markersize=5, label=label)  # fmt: skip
                for x, _, runs in points:
                    ys = [y for run in runs if (y := mean([run], *values)) is not None]
                    axis.plot([x] * len(ys), [y.mean for y in ys], marker, color=colour, alpha=0.3, markersize=3, mew=0)
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlabel("judgements turned round (%)")
        axis.grid(alpha=0.25)
    axes[2].plot([0, 42], [0, 0.42], color="black", lw=0.8, ls=":")
    axes[2].set_ylim(-0.02, 0.52)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    save(figure, path)


def write(folder: Path, found: Mapping[tuple[str, float], Sequence[Mapping[str, Any]]]) -> str:
    """Writes everything into `folder` and returns the table for the terminal."""
    from .report import markdown_table, terminal_table, write_page

    folder.mkdir(parents=True, exist_ok=True)
    header, rows = table(found)
    wrong, seeds = errors(found), [run["seed"] for run in next(iter(found.values()))]
    question = "Are judgements that were turned round found by rewards trained on the others?"
    error_rows = [[JUDGES[judge].label, *(f"{each[name]:.3f}" for name in ESTIMATES)] for judge, each in wrong.items()]
    draw(folder / "label_noise.png", found)
    text = [
        f"# {question}", "", *headline(found), "",
        f"Lab, `{VARIANT}`, {FOLDS} folds by prompt, {len(seeds)} seeds ({', '.join(map(str, seeds))}); mean ± half "
        "the 95 % t-interval over seeds. Flags: the margin against the label is beyond 0, or beyond where a label is "
        "more likely wrong than right under the estimated noise (Bayes). `judge right`: share of pairs whose better "
        "answer, as it is before any is turned round, the judge prefers.", "",
        markdown_table(header, rows), "",
        "Mean absolute error of the estimated share, over 0 to 30 % and seeds:", "",
        markdown_table(["judge", "disagreement", "confident learning", "likelihood"], error_rows), "",
        f"![{question}](label_noise.png)", "",
        "What limits this: the lab's pairs are told apart without doubt, so that every disagreement is an error of "
        "the label or of the judge; people's pairs have some that are close. Noise is drawn independently of the "
        "pair; what annotators get wrong together looks right to a reward that learnt from them. Judges were not "
        "tuned.",
    ]  # fmt: skip
    summary = {
        "question": question, "variant": VARIANT, "folds": FOLDS, "seeds": seeds, "estimate_errors": wrong,
        "judges": {name: asdict(judge) for name, judge in JUDGES.items()},
        "runs": [{"judge": judge, **run} for (judge, _), runs in found.items() for run in runs], **environment(),
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    write_page(folder, "\n".join(text))
    return terminal_table(header, rows)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size: shows that everything runs, nothing else")
    parser.add_argument("--results", action="store_true", help="also copy what is written into experiments/results")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/label_noise"))
    parser.add_argument("--cache", type=Path, default=Path("runs/lab/cache"))
    given = parser.parse_args(words)
    if given.quick and given.results:
        parser.error("--quick is a toy: it does not go with --results")
    start, seeds = time.monotonic(), given.seeds or ([0] if given.quick else [0, 1, 2])
    points = [(judge, flip) for judge in JUDGES for flip in (FLIPPED[:3:2] if given.quick else FLIPPED)]
    jobs = []
    for judge, flip in points:
        of, options = JUDGES[judge], dict(JUDGES[judge].options)
        if given.quick:
            options["num_train_epochs"] = 1
        pairs = 40 if given.quick else of.pairs
        jobs += [
            Job(f"{of.label}, {100 * flip:g} %, seed {seed}", measured,
                {"seed": seed, "flip": flip, "by": of.by, "pairs": pairs, "options": options})
            for seed in seeds
        ]  # fmt: skip
    results = iter(run_jobs(jobs, given.cache, workers=given.workers, title="label_noise"))
    print(write(given.output, {point: [next(results) for _ in seeds] for point in points}))
    if given.results:
        keep(given.output, RESULTS)
    print(f"{given.output}/report.md, summary.json, figure; {(time.monotonic() - start) / 60:.1f} min", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
