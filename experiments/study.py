"""A study in the lab: settings as data, trained on paired seeds, with a table, figures and all numbers.

A study file says what is asked and lists its points; everything else (command line, jobs and their cache, statistics,
report) is here.  A point is one setting: a line it belongs to, a place on the x axis, and the plan of each seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uft.comparison.statistics import effect_size, interquartile_mean, paired_difference
from uft.record import environment, write_json
from uft.reporting.page import keep

from . import study_figures
from .arms import ARMS
from .lab.training import LabStage, Plan, Scale
from .lab.world import VALIDATION
from .report import COLUMNS, by_seed, markdown_table, mean_of, terminal_table, write_page
from .runs import SFT_STAGE, Runner, run_sharing
from .sequential_vs_unified import NORMAL, SEARCH, TOY, VARIANTS, runner

RESULTS = Path(__file__).parent / "results"
SHOWN = ("retention", "alignment", "skill_covered", "skill_uncovered", "fact_recall", "skill_nll", "kl_base")


@dataclass(frozen=True)
class Point:
    """One setting.

    line   what it is compared within: an arm's name, drawn as one line
    x      its place there: a number, or a word
    """

    line: str
    x: float | str
    plan: Callable[[int], Plan]

    @property
    def name(self) -> str:
        return f"{self.line}, {self.x:g}" if isinstance(self.x, (int, float)) else f"{self.line}, {self.x}"


def at(line: str, x: float | str, stages: tuple[LabStage, ...], scale: Scale, variant: str = VARIANTS[0]) -> Point:
    """The point at which these stages are trained, on each seed."""
    return Point(line, x, lambda seed: Plan(stages, seed, variant, scale))


@dataclass(frozen=True)
class Study:
    """What is asked, and the points that answer it.

    points     (settings, scale) -> points; settings are those that the search of the main comparison chose
    axis       what x is, with its unit
    kind       of figure: "lines" (x is a number), "dots" (x is a word) or "heat" (x is "row|column")
    logarithmic, equal, note   of the x axis; what is equal between points; what else a reader must know
    baseline   (line, x) of the point that all differences are taken from, or None
    tune       (settings, scale, runner of trials) -> more settings, searched for this study
    more       (points, records) -> more lines of the report, and what goes into the summary under `more`
    """

    name: str
    question: str
    points: Callable[[Mapping[str, Any], Scale], Sequence[Point]]
    axis: str
    kind: str = "lines"
    logarithmic: bool = False
    equal: str = "base weights, seeds, data, FLOPs within 2 % (reference passes counted)"
    note: str = ""
    baseline: tuple[str, float | str] | None = None
    tune: Callable[[Mapping[str, Any], Scale, Runner], Mapping[str, Any]] | None = None
    more: Callable[[Sequence[Point], Sequence[Sequence[Mapping[str, Any]]]], tuple[list[str], Any]] | None = None


def chosen_settings(variant: str = VARIANTS[0]) -> dict[str, Any]:
    """Arm -> learning rate and beta, as the search of `sequential_vs_unified` found them."""
    return json.loads(SEARCH.read_text())[variant]


def supervised(chosen: Mapping[str, Any], share: float = 1.0) -> LabStage:
    """The supervised stage that sequential arms begin with."""
    return LabStage("sft", "sft", chosen[SFT_STAGE]["learning_rate"], share)


def last_stage(arm: str, chosen: Mapping[str, Any], **changes: Any) -> LabStage:
    """The tuned stage of an arm of the main comparison, with some of its fields changed."""
    return replace(ARMS[arm].stages(chosen[arm], "flops")[-1], **changes)


def stages_of(arm: str, chosen: Mapping[str, Any], **changes: Any) -> tuple[LabStage, ...]:
    """All stages of an arm of the main comparison; `changes` are of the last one."""
    first = (supervised(chosen),) if ARMS[arm].after_sft else ()
    return (*first, last_stage(arm, chosen, **changes))


def main(
    study: Study, words: Sequence[str] | None = None, description: str | None = None, *, several: bool = False
) -> int:
    """`several`: other studies are given the same words, so that --output is the folder of their folders."""
    parser = argparse.ArgumentParser(
        description=description or study.question, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy size: shows that everything runs, nothing else")
    parser.add_argument("--results", action="store_true", help="also copy what is written into experiments/results")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, help=f"default runs/{study.name}")
    parser.add_argument("--cache", type=Path, default=Path("runs/lab/cache"), help="of runs, shared by all studies")
    arguments = parser.parse_args(words)
    if arguments.quick and arguments.results:
        parser.error("--quick is a toy: it does not go with --results")
    start, output = time.monotonic(), arguments.output or Path("runs") / study.name
    if several and arguments.output:
        output /= study.name
    seeds = arguments.seeds or ([0] if arguments.quick else [0, 1, 2])
    scale = TOY if arguments.quick else NORMAL
    settings, tuned = chosen_settings(), {}
    if study.tune is not None:
        trials = runner(arguments.cache, arguments.workers, part=VALIDATION, curves=False)
        tuned = study.tune(settings, scale, trials)
    points = list(study.points({**settings, **tuned}, scale))
    plans = [(f"{point.name}, seed {seed}", point.plan(seed)) for point in points for seed in seeds]
    run = runner(arguments.cache, arguments.workers, curves=False)
    found = iter(run_sharing(plans, run, study.name))
    records = [[next(found) for _ in seeds] for _ in points]
    print(write_study(output, study, points, records, scale, tuned))
    if arguments.results:
        keep(output, RESULTS / study.name)
    print(f"{output}/report.md, summary.json and figures; {(time.monotonic() - start) / 60:.1f} min", file=sys.stderr)
    return 0


def write_study(
    folder: Path,
    study: Study,
    points: Sequence[Point],
    records: Sequence[Sequence[Mapping[str, Any]]],
    scale: Scale,
    tuned: Mapping[str, Any] | None = None,
) -> str:
    """Writes everything into `folder` and returns the table for the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [record["seed"] for record in records[0]]
    header = ["line", study.axis, *(COLUMNS[c] for c in SHOWN), "TFLOPs", "steps"]
    rows = [[point.line, _shown(point.x), *(str(mean_of(runs, c)) for c in SHOWN), *_cost(runs)]
            for point, runs in zip(points, records)]  # fmt: skip
    text = [f"# {study.question}", "", f"Equal: {study.equal}. {study.note}".strip(), ""]
    text += [f"{len(seeds)} seeds ({', '.join(map(str, seeds))}); mean ± half the 95 % t-interval.", ""]
    text += [markdown_table(header, rows), ""]
    if study.baseline is not None:
        text += _differences(study, points, records)
    lines, kept = study.more(points, records) if study.more is not None else ([], None)
    text += lines
    figure = study_figures.draw(folder, study, points, records)
    text += [line for name in figure for line in (f"![{study.question}]({name})", "")]
    write_page(folder, "\n".join(text))
    summary = {
        "study": study.name, "question": study.question, "equal": study.equal, "seeds": seeds, "scale": vars(scale),
        "points": [
            {
                "line": point.line, "x": point.x,
                "measures": {c: mean_of(runs, c)._asdict() for c in (*COLUMNS, "score")},
                "interquartile_mean": {c: interquartile_mean(list(by_seed(runs, c).values())) for c in SHOWN},
                "per_seed": {c: by_seed(runs, c) for c in (*COLUMNS, "score", *KL)},
                "compute": [run["compute"] for run in runs],
                "objectives": [stage.get("objective") for stage in runs[0]["stages"]],
                "learning_rates": [stage.get("learning_rate") for stage in runs[0]["stages"]],
            }
            for point, runs in zip(points, records)
        ],
        "search": dict(tuned or {}), "more": kept,
        **environment(),
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    return terminal_table(header, rows)


KL = ("kl_base", "kl_from_base", "kl_base_prior", "kl_from_base_prior")


def _shown(x: float | str) -> str:
    return f"{x:g}" if isinstance(x, (int, float)) else x


def _cost(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    flops = sum(run["compute"].get("flops", 0) for run in runs) / len(runs)
    steps = sum(stage.get("steps", 0) for run in runs for stage in run["stages"]) / len(runs)
    return f"{flops / 1e12:.3f}", f"{steps:,.0f}"


def _differences(study: Study, points: Sequence[Point], records: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Intervals and effect sizes, without claims of significance: nothing of this was named beforehand."""
    at = {(point.line, point.x): runs for point, runs in zip(points, records)}
    base = at[study.baseline]
    rows = []
    for (line, x), runs in at.items():
        if (line, x) == study.baseline:
            continue
        row = [line, _shown(x)]
        for name in ("score", "retention", "alignment", "fact_recall"):
            a, b = by_seed(runs, name), by_seed(base, name)
            found = paired_difference(a, b)
            d = effect_size([a[seed] - b[seed] for seed in sorted(set(a) & set(b))])
            low_high = f" [{found.low:+.3f}, {found.high:+.3f}], d {d:+.1f}" if found.n > 1 else ""
            row.append(f"{found.mean:+.3f}{low_high}")
        rows.append(row)
    name = f"{study.baseline[0]}, {_shown(study.baseline[1])}"
    header = ["line", study.axis, "score", "retention", "alignment", "facts"]
    return [f"Differences from {name}, paired by seed [95 % t-interval], d in standard deviations:", "",
            markdown_table(header, rows), ""]  # fmt: skip
