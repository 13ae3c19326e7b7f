"""The published tables with ours beneath them, as `report.md`, `summary.json` and a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uft.comparison.statistics import Interval, interval, paired_difference
from uft.record import environment, write_json

from ..figures import COLOURS, plt
from ..report import markdown_table
from .arms import ARMS, UNSTATED
from .published import AVERAGES, CLAIMED, CLAIMS, NEW, OLD, TABLES, Table, published
from .tasks import Task

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""arm -> one record per seed, see `experiments.paper.running.finished`"""

PUBLISHED_MODEL = "mistralai/Mistral-7B-v0.1"
NONE = "–"


def by_seed(records: Sequence[Mapping[str, Any]], column: str) -> dict[int, float]:
    """A score, or an average over the tasks of a board where all of them are there.  In percent."""
    found = {}
    for record in records:
        names = AVERAGES.get(column, (column,))
        if all(name in record["scores"] for name in names):
            found[record["seed"]] = float(np.mean([record["scores"][name]["score"] for name in names]))
    return found


def ours(records: Sequence[Mapping[str, Any]], column: str) -> Interval | None:
    values = by_seed(records, column)
    return interval(list(values.values())) if values else None


def shown(found: Interval | None) -> str:
    if found is None:
        return NONE
    half = "" if found.n < 2 else f" ± {(found.high - found.low) / 2:.2f}"
    return f"{found.mean:.2f}{half}"


def signed(found: Interval | None) -> str:
    if found is None:
        return NONE
    span = "" if found.n < 2 else f" [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{found.mean:+.2f}{span}"


def write_report(
    folder: Path, found: Records, tasks: Sequence[Task], *, model: str, seeds: Sequence[int], limit: float | None,
    chat: bool, words: Sequence[str], dry: bool,
) -> None:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    title = "DRY RUN of the paper's tables, on a toy: no number of ours means anything" if dry else "The paper's tables"
    text = [f"# {title}", "", *_setting(found, model, seeds, limit, chat, words), ""]
    if figure(folder / "paper_uft.png", found, dry):
        text += ["![averages, published and ours](paper_uft.png)", ""]
    for table in TABLES:
        if any(_evaluated(found.get(arm, ())) for arm in table.rows):
            text += [f"## {table.number}: {table.title}", "", *_table(table, found), ""]
    if others := [arm for arm in found if published(arm, "avg new") is None and _evaluated(found[arm])]:
        text += ["## Not in the papers", "", *_table(Table("", "", (*NEW, *OLD, *AVERAGES), {}), found, others), ""]
    text += ["## What the paper concludes", "", *_claims(found), ""]
    text += ["## Free answers", "", *_answers(found), "", "## Compute", "", *_compute(found), ""]
    text += ["## Tasks", "", *_tasks(tasks, found), "", "## What the paper does not state, and what was done here", ""]
    text += [f"- {what}: {choice}." for what, choice in UNSTATED.items()]
    if absent := missing(found, tasks):
        text += ["", "## Missing", "", *(f"- {line}" for line in absent)]
    (folder / "report.md").write_text("\n".join(text) + "\n")
    setting = {"dry_run": dry, "model": model, "seeds": list(seeds), "limit": limit, "chat_template": chat,
               "changes": list(words)}  # fmt: skip
    write_json(folder / "summary.json", {**setting, **_summary(found, tasks), **environment()})


def _evaluated(records: Sequence[Mapping[str, Any]]) -> bool:
    return any(record["scores"] for record in records)


def _setting(found: Records, model: str, seeds, limit, chat, words) -> list[str]:
    scores = [score for runs in found.values() for run in runs for score in run["scores"].values()]
    versions, commits = (sorted({str(score[key]) for score in scores}) for key in ("lm_eval", "commit"))
    mine = "ours are means over seeds ± half the 95 % t-interval" if len(seeds) > 1 else "ours are single runs, too"
    lines = [
        f"Model {model}, seeds {', '.join(map(str, seeds))}, lm-eval {', '.join(versions)}, commit "
        f"{', '.join(commits)}{', changed: ' + ' '.join(words) if words else ''}. Published numbers are single runs on "
        f"{PUBLISHED_MODEL}; {mine}. Scores are percentages."
    ]
    if model != PUBLISHED_MODEL:
        lines.append("**Ours is another model: compare differences between arms, not numbers.**")
    if limit is not None:
        lines.append(f"**Only the first documents of each task were asked (limit {limit:g}).**")
    if len(commits) > 1:
        lines.append("**Results of several commits stand side by side.**")
    if chat:
        lines.append("The chat template was applied to the prompts of the evaluation.")
    return ["\n\n".join(lines)]


def _table(table: Table, found: Records, arms: Sequence[str] | None = None) -> list[str]:
    rows = []
    for arm in arms or table.rows:
        records = found.get(arm, ())
        if not _evaluated(records):
            continue
        mine = {column: ours(records, column) for column in table.columns}
        lines: list[tuple[str, Callable[[str], str]]] = [("ours", lambda c, mine=mine: shown(mine[c]))]
        if arm in table.rows:
            theirs = {column: table.value(arm, column) for column in table.columns}
            lines = [
                ("published", lambda c, theirs=theirs: f"{theirs[c]:.0f}" if c == "length" else f"{theirs[c]:.2f}"),
                *lines,
                ("difference", lambda c, t=theirs, m=mine: NONE if m[c] is None else f"{m[c].mean - t[c]:+.2f}"),
            ]
            if not any(mine.values()):
                lines = lines[:1]
        rows += [
            [ARMS[arm].label if k == 0 else "", name, *map(cell, table.columns)] for k, (name, cell) in enumerate(lines)
        ]
    return [markdown_table(["arm", "", *table.columns], rows)]


def _claims(found: Records) -> list[str]:
    rows = []
    for better, worse, claim in CLAIMS:
        if better not in found or worse not in found:
            continue
        theirs = {c: published(better, c) - published(worse, c) for c in CLAIMED}
        mine = {c: _difference(found, better, worse, c) for c in CLAIMED}
        pair = f"{ARMS[better].label} − {ARMS[worse].label}"
        rows.append([f"{claim}: {pair}", "published", *(f"{theirs[c]:+.2f}" for c in CLAIMED)])
        rows.append(["", "ours", *(signed(mine[c]) for c in CLAIMED)])
    if not rows:
        return ["No two arms that it compares were run."]
    note = "Ours is paired by seed, with 95 % t-intervals that are not corrected for their number."
    return [markdown_table(["claim", "", *CLAIMED], rows), "", note]


def _difference(found: Records, a: str, b: str, column: str) -> Interval | None:
    first, second = by_seed(found[a], column), by_seed(found[b], column)
    return paired_difference(first, second) if set(first) & set(second) else None


def _answers(found: Records) -> list[str]:
    rows = []
    for arm, runs in found.items():
        lengths = [run["scores"]["ifeval"]["answers"] for run in runs if "ifeval" in run["scores"]]
        if lengths:
            cells = [shown(interval([length[unit] for length in lengths])) for unit in ("characters", "tokens")]
            theirs = published(arm, "length")
            rows.append([ARMS[arm].label, NONE if theirs is None else f"{theirs:.0f}", *cells])
    note = (
        "Ours are answers to ifeval's prompts, of at most 1,280 tokens: only the order of arms can be compared. "
        "MT-Bench and AlpacaEval need a judge and are not run."
    )
    header = ["arm", "published: AlpacaEval, characters", "ours: ifeval, characters", "ours: ifeval, tokens"]
    return [markdown_table(header, rows), "", note]


def _compute(found: Records) -> list[str]:
    rows = []
    for arm, runs in found.items():
        trained = [run for run in runs if run["compute"]]
        if not trained:
            continue
        mean = lambda name, trained=trained: np.mean([run["compute"][name] for run in trained])
        sizes = [
            f"{stage['stage']}: " + ", ".join(f"{n:,} {name}" for name, n in stage["data"]["train"]["sizes"].items())
            for stage in trained[0]["stages"]
        ]
        evaluated = np.mean([sum(score["seconds"] for score in run["scores"].values()) for run in runs])
        rows.append([
            ARMS[arm].label, "; ".join(sizes), f"{mean('steps'):,.0f}", f"{mean('tokens') / 1e6:,.3f}",
            f"{mean('flops') / 1e15:,.3f}", f"{mean('seconds') / 3600:,.3f}", f"{evaluated / 3600:,.3f}",
            f"{mean('peak_memory_bytes') / 2**30:,.1f}",
        ])  # fmt: skip
    header = ["arm", "rows used", "optimiser steps", "M tokens", "PFLOPs", "hours of training", "hours of evaluation",
              "peak GiB"]  # fmt: skip
    note = "Means over seeds; a stage that arms share counts for each of them, though it was trained once."
    return [markdown_table(header, rows), "", note]


def _tasks(tasks: Sequence[Task], found: Records) -> list[str]:
    scores = {column: score for runs in found.values() for run in runs for column, score in run["scores"].items()}
    rows = []
    for task in tasks:
        score = scores.get(task.column)
        documents = f"{sum(score['documents'].values()):,}" if score else NONE
        version = ", ".join(sorted({str(v) for v in score["versions"].values()})) if score else NONE
        rows.append([task.column, task.board, task.name, str(task.shots), ", ".join(task.metrics), documents, version])
    return [markdown_table(["column", "board", "task of lm-eval", "shots", "metric", "documents", "version"], rows)]


def missing(found: Records, tasks: Sequence[Task]) -> list[str]:
    lines = []
    for arm, runs in found.items():
        for run in runs:
            absent = [task.column for task in tasks if task.column not in run["scores"]]
            if absent:
                lines.append(f"{ARMS[arm].label}, seed {run['seed']}: {', '.join(absent)}")
    return lines


def _summary(found: Records, tasks: Sequence[Task]) -> dict[str, Any]:
    columns = (*NEW, *OLD, *AVERAGES)
    arms = {}
    for arm, runs in found.items():
        scores = {}
        for column in columns:
            mine = ours(runs, column)
            scores[column] = {
                "published": published(arm, column),
                "ours": mine._asdict() if mine else None,
                "per_seed": by_seed(runs, column),
            }
        arms[arm] = {
            "label": ARMS[arm].label,
            "scores": scores,
            "metrics": [{c: score["metrics"] for c, score in run["scores"].items()} for run in runs],
            "answers": [run["scores"].get("ifeval", {}).get("answers") for run in runs],
            "compute": [run["compute"] for run in runs],
            "stages": [
                [
                    {key: stage[key] for key in ("stage", "recipe", "steps", "compute", "commit")}
                    for stage in run["stages"]
                ]
                for run in runs
            ],
        }
    claims = [
        {
            "claim": claim, "arms": [a, b],
            "published": {c: published(a, c) - published(b, c) for c in CLAIMED},
            "ours": {c: d._asdict() if (d := _difference(found, a, b, c)) else None for c in CLAIMED},
        }
        for a, b, claim in CLAIMS
        if a in found and b in found
    ]  # fmt: skip
    return {"arms": arms, "claims": claims, "tasks": [vars(task) for task in tasks], "missing": missing(found, tasks)}


def figure(path: Path, found: Records, dry: bool) -> bool:
    """Both averages, a line per arm: published hollow, ours filled with its interval.  False where there is none."""
    arms = [arm for arm in found if any(by_seed(found[arm], column) for column in AVERAGES)]
    if not arms:
        return False
    drawn, panels = plt.subplots(1, 2, figsize=(8.4, 1.3 + 0.27 * len(arms)), sharey=True)
    places = range(len(arms) - 1, -1, -1)
    for panel, (column, title) in zip(panels, {"avg new": "new leaderboard", "avg old": "old leaderboard"}.items()):
        for place, arm in zip(places, arms):
            colour, theirs, mine = COLOURS[ARMS[arm].family], published(arm, column), ours(found[arm], column)
            panel.axhline(place, color="#eeeeee", lw=0.8, zorder=0)
            if theirs is not None:
                panel.plot(theirs, place, "D", mfc="white", mec="#333333", ms=5, zorder=3, label="published, one run")
            if mine is not None:
                seeds = list(by_seed(found[arm], column).values())
                panel.plot(seeds, [place] * len(seeds), "|", color=colour, ms=7, alpha=0.5)
                if mine.n > 1:
                    panel.plot([mine.low, mine.high], [place, place], color=colour, lw=1.5)
                panel.plot(mine.mean, place, "o", color=colour, ms=6, zorder=4, label=f"ours, {_seeds(found)}")
        panel.set_title(f"{'DRY RUN: ' if dry else ''}{title}", loc="left")
        panel.set_xlabel("average of six tasks, %")
    panels[0].set_yticks(list(places), [ARMS[arm].label for arm in arms])
    for label, arm in zip(panels[0].get_yticklabels(), arms):
        label.set_color(COLOURS[ARMS[arm].family])
    names: dict[str, Any] = {}
    for panel in panels:
        panel.tick_params(axis="y", length=0)
        for handle, name in zip(*panel.get_legend_handles_labels()):
            names.setdefault(name, handle)
    drawn.tight_layout(rect=(0, 0, 1, 1 - 0.3 / drawn.get_figheight()))
    drawn.legend(names.values(), names, loc="upper right", ncols=len(names), frameon=False)
    drawn.savefig(path, bbox_inches="tight")
    plt.close(drawn)
    return True


def _seeds(found: Records) -> str:
    n = max(len(runs) for runs in found.values())
    return "one seed" if n == 1 else f"mean of {n} seeds and 95 % interval"
