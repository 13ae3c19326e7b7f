"""The report of some runs, section by section, as Markdown with figures beside it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from uft.reporting import figures
from uft.reporting.answers import answers
from uft.reporting.fairness import warnings
from uft.reporting.finding import Found
from uft.reporting.groups import Group, differing, grouped, of_group, shown
from uft.reporting.page import write_page
from uft.reporting.runs import REWARDS, is_number
from uft.reporting.series import all_logged, knows, plane
from uft.reporting.text import plain, rows_table, table
from uft.reporting.values import (
    Row,
    better,
    evaluated,
    every_fact,
    flops,
    measured,
    measures_of,
    memory,
    number,
    same_samples,
    seconds,
    summary,
    whole,
)
from uft.reporting.words import in_words

ACROSS = 6  # runs, up to which each has a column
SETTINGS, SKIPPED = "Everything that was set", "Not shown"
COSTS = {
    "flops": ("FLOPs, reference passes included", flops),
    "tokens": ("tokens trained on", whole),
    "seconds": ("time", seconds),
    "peak_memory_bytes": ("peak memory", memory),
    "policy_forwards": ("policy forwards", whole),
    "reference_forwards": ("reference forwards", whole),
}
# file, title, what is logged, what stands below it
CURVES = (
    ("losses", "Losses", r"loss(/.+)?", "Losses by step, each term's own mean over the step; less is better."),
    ("rewards", "Rewards", r"rewards/.+|logps/.+", "Implicit rewards β (log π − log π_ref) of chosen and rejected "
     "answers, how often the chosen one's is the higher, and their log-probabilities, in nats."),
    ("reinforcement", "Reinforcement", r"reward|reward/.+|kl_sequence|kl|length|ended|distinct_\d+|value/.+|policy/.+|"
     r"clip.*|entropy|length_reward_correlation|online/.+", "What the policy earns, and what a guard watches."),
    ("optimisation", "Optimisation", r"learning_rate|grad_norm|weight/.+|balance/.+|conflict/.+",
     "Learning rate, gradient norm before clipping, and weights of terms that are not constant."),
    ("sources", "By data source", r".+/(nll|accuracy)", "Of each data source: negative log-likelihood per token of what"
     " is to be imitated, and the share of pairs whose chosen answer has the higher implicit reward."),
)  # fmt: skip
UNSHOWN = re.compile(r"(eval_|train_)?(runtime|samples_per_second|steps_per_second)|epoch|step|num_tokens|max_steps|"
                     r"total_flos|train_loss|planned_steps")  # fmt: skip
OTHERS = 12  # panels of what is in no section


def write_report(found: Found, output: Path, title: str | None = None) -> Path:
    """report.html, report.md and figures in `output`; returns the path of the first."""
    groups = grouped(found.runs)
    output.mkdir(parents=True, exist_ok=True)
    rows = summary(groups)
    names = [group.name for group in groups]
    text = [f"# {plain(title or _title(groups))}", ""]
    for paragraph in in_words(groups, rows):
        text += [paragraph, ""]
    if said := warnings(groups):
        text += [
            "## Before you compare" if len(groups) > 1 else "## Mind",
            "",
            *(f"- {plain_names(w)}" for w in said),
            "",
        ]
    text += ["## Summary", "", rows_table(rows, names, across=ACROSS), "", *_note(rows), ""]
    known = every_fact(groups)
    text += _differences(groups, known) if len(groups) > 1 else []
    text += _curves(groups, output)
    text += _plane(groups, output)
    if figures.bars(output / "compute.png", groups, COSTS):
        below = "What training cost; white lines are the ends of stages." if _staged(groups) else "What training cost."
        text += ["## Compute", "", f"![{below}](compute.png)", ""]
    text += [*_evaluations(groups), *_rewards(groups, output), *_guards(groups), *answers(groups)]
    text += _settings(groups, known)
    if found.skipped:
        text += [f"## {SKIPPED}", "", *(f"- {plain(each)}" for each in found.skipped), ""]
    write_page(output, "\n".join(text), folded=(SETTINGS, SKIPPED))
    return output / "report.html"


def plain_names(sentence: str) -> str:
    """A sentence whose code spans and bold words are meant, and nothing else."""
    parts = re.split(r"(`[^`]*`|\*\*[^*]*\*\*)", sentence)
    return "".join(part if i % 2 else plain_inside(part) for i, part in enumerate(parts))


def plain_inside(part: str) -> str:
    """As `plain`, with the blanks at its ends."""
    head, tail = part[: len(part) - len(part.lstrip())], part[len(part.rstrip()) :]
    return f"{head}{plain(part)}{tail}" if part.strip() else part


def _title(groups: Sequence[Group]) -> str:
    if len(groups) == 1:
        return f"Run {groups[0].name}"
    if len(groups) <= 3:
        return f"Runs {' · '.join(group.name for group in groups)}"
    return f"{sum(len(group.runs) for group in groups)} runs side by side"


def _note(rows: Sequence[Row]) -> list[str]:
    several = any("±" in cell for row in rows for cell in row.cells)
    said = ["Train: mean over the last tenth of logs; eval: the last evaluation in training; measured: by `uft eval`."]
    said += ["Mean ± half the 95 % t-interval over seeds."] if several else []
    if any(row.best for row in rows):
        said.append("Bold: the best of those that can be compared, whether or not chance could explain it.")
    return [" ".join(said)]


def _staged(groups: Sequence[Group]) -> bool:
    return any(run.staged for group in groups for run in group.runs)


# ---- what differs, and everything ----


def _differences(groups: Sequence[Group], known) -> list[str]:
    names = differing(groups, known)
    if not names:
        return ["## What differs", "", "Nothing that was recorded.", ""]
    rows = [Row(name, tuple(of_group(group, name, known) for group in groups)) for name in names]
    said = f"What is not listed here is the same in all; everything stands under “{SETTINGS}”."
    return ["## What differs", "", _facts_table(rows, groups), "", said, ""]


def _facts_table(rows: Sequence[Row], groups: Sequence[Group]) -> str:
    """Settings are rows whatever the number of runs: there are more of them."""
    return table(
        ["", *(plain(group.name) for group in groups)],
        [[plain(row.label), *map(plain, row.cells)] for row in rows],
    )


def _settings(groups: Sequence[Group], known) -> list[str]:
    names = list(dict.fromkeys(name for found in known.values() for name in found))
    if not names:
        return []
    rows = [Row(name, tuple(of_group(group, name, known) for group in groups)) for name in names]
    alike = [row for row in rows if len(set(row.cells)) == 1]
    folders = [[plain(group.name), "<br>".join(plain(str(run.folder)) for run in group.runs)] for group in groups]
    dates = [["", *(", ".join(dict.fromkeys(shown(r.about("date"))[:19] for r in g.runs)) for g in groups)]]
    dates[0][0] = "date"
    text = [f"## {SETTINGS}", "", table(["run", "folder"], folders, prose=True), ""]
    unset = [row.label for row in alike if row.cells[0] == "–"]
    rows, alike = ([row for row in each if row.label not in unset] for each in (rows, alike))
    text += [f"Not set: {', '.join(plain(label.removeprefix('config.')) for label in unset)}.", ""] if unset else []
    if len(groups) > 1:
        text += ["The same in all runs:", ""] if alike else []
        text += [table(["setting", "value"], [[plain(r.label), plain(r.cells[0])] for r in alike], prose=True), ""]
        return [*text, table(["", *(plain(g.name) for g in groups)], dates), ""]
    return [
        *text,
        table(["setting", "value"], [[plain(r.label), plain(r.cells[0])] for r in rows] + dates, prose=True),
        "",
    ]


# ---- figures ----


def _curves(groups: Sequence[Group], output: Path) -> list[str]:
    names = [n.removeprefix("eval_") for n in all_logged(groups) if not UNSHOWN.fullmatch(n)]
    left, text = list(dict.fromkeys(names)), []
    for file, title, pattern, below in CURVES:
        mine = [n for n in left if re.fullmatch(pattern, n)]
        left = [n for n in left if n not in mine]
        mine = sorted((n for n in mine if not _constant_weight(groups, n)), key=_place)
        if not mine or not figures.curves(output / f"{file}.png", groups, mine):
            continue
        text += [f"## {title}", "", f"![{below}]({file}.png)", ""]
        if file == "losses":
            text += _by_compute(groups, mine, output)
    if left and figures.curves(output / "others.png", groups, left[:OTHERS]):
        more = f" {len(left) - OTHERS} more were logged." if len(left) > OTHERS else ""
        text += ["## Other metrics", "", f"![Whatever else was logged.{more}](others.png)", ""]
    return text


def _place(name: str) -> tuple[int, str]:
    """The whole before its parts, how often before how much."""
    first = ("loss", "reward", "learning_rate", "grad_norm", "rewards/accuracies", "rewards/margins")
    return (first.index(name) if name in first else len(first) + name.startswith("logps/")), name


def _constant_weight(groups: Sequence[Group], name: str) -> bool:
    if not name.startswith("weight/"):
        return False
    return len({e[name] for g in groups for r in g.runs for s in r.stages for e in s.logs if name in e}) < 2


def _by_compute(groups: Sequence[Group], names: Sequence[str], output: Path) -> list[str]:
    """The losses over FLOPs, where all trained runs know theirs, or else over tokens."""
    runs = [run for group in groups for run in group.runs if run.stages]
    axis = next((axis for axis in ("flops", "tokens") if runs and all(knows(run, axis) for run in runs)), None)
    if axis is None or not figures.curves(output / f"losses-{axis}.png", groups, names, axis):
        return []
    below = "The same losses by FLOPs, which are taken to be spent as tokens are." if axis == "flops" else (
        "The same losses by tokens trained on.")  # fmt: skip
    return [f"![{below}](losses-{axis}.png)", ""]


def _plane(groups: Sequence[Group], output: Path) -> list[str]:
    """By evaluation, where all runs that have a path have both losses there.  By training otherwise: what is held while
    a stage does not measure it begins with the next stage's first step, and not with its first evaluation."""
    runs = [run for group in groups for run in group.runs if plane(run, evaluated=False)]
    paths = [plane(run, evaluated=True) for run in runs]
    evaluated = bool(paths) and all(len(path) > 1 and all(all(p.measured) for p in path) for path in paths)
    if not figures.losses_plane(output / "plane.png", groups, evaluated=evaluated):
        return []
    where = "evaluation" if evaluated else "training"
    below = (
        f"Losses of likelihood (to the right) and of preference (upward) in {where}, without weights and as means over "
        "stretches, from the dot to the mark; left and down is better. Dotted: one of the two was not measured there, "
        "as where a stage trains on the other alone, and is held."
    )
    return ["## The plane of losses", "", f"![{below}](plane.png)", ""]


# ---- what was measured ----


def _evaluations(groups: Sequence[Group]) -> list[str]:
    names = measures_of(groups)
    if not names:
        return []
    having = [group for group in groups if any(run.evaluation for run in group.runs)]
    signed = same_samples(having)
    rows = [measured(n, having, evaluated(n), sign=better(n) if signed else 0) for n in names]
    text = ["## Evaluation", "", rows_table([r for r in rows if r], [g.name for g in having], across=ACROSS), ""]
    before = [run for group in having for run in group.runs if run.evaluation.get("before")] if having else []
    if before:
        text += ["### Before and after", ""]
        text += [part for run in before[:ACROSS] for part in _changes(run)]
    return text


def _changes(run) -> list[str]:
    """What changed since the evaluation it was compared with."""
    then, now = run.evaluation["before"], run.evaluation["metrics"]
    rows = [
        [plain(name), number(then[name]), number(now[name]), f"{now[name] - then[name]:+.4f}"]
        for name in now
        if is_number(then.get(name)) and is_number(now[name])
    ]
    against = run.evaluation.get("info", {}).get("compared_with", "an earlier evaluation")
    return [
        f"`{run.name}` against {plain(str(against))}:",
        "",
        table(["", "before", "now", "change"], rows),
        "",
    ] * bool(rows)


def _rewards(groups: Sequence[Group], output: Path) -> list[str]:
    runs = [run for group in groups for run in group.runs if run.rewards]
    if not runs:
        return []
    own = [Group(run.name, (run,)) for run in runs]
    names = list(dict.fromkeys(name for run in runs for name in run.rewards["metrics"]))

    def of(name: str):
        return lambda run: v if is_number(v := run.rewards["metrics"].get(name)) else None

    rows = [row for n in names if (row := measured(n, own, of(n)))]
    text = ["## Reward models", "", rows_table(rows, [run.name for run in runs], across=ACROSS), ""]
    for position, run in enumerate(runs):
        drawn = (run.folder / REWARDS).with_suffix(".png")
        if drawn.is_file():
            name = f"rewards-{position}.png"
            shutil.copy(drawn, output / name)
            text += [
                f"![Rewards of {plain(run.name)}: reliability, accuracy by length, reward against length.]({name})",
                "",
            ]
    return text


def _guards(groups: Sequence[Group]) -> list[str]:
    runs = [run for group in groups for run in group.runs if run.guard]
    if not runs:
        return []
    rows = []
    for run in runs:
        limits = ", ".join(f"{name} {shown(v)}" for name, v in (run.guard.get("limits") or {}).items() if v is not None)
        alarms = run.guard.get("alarms") or []
        first = f"{len(alarms)}, first at step {alarms[0].get('step')}: {alarms[0].get('name')}" if alarms else "none"
        rows.append([plain(run.name), plain(limits), plain(first), plain(str(run.guard.get("stopped") or "no"))])
    return ["## Guards", "", table(["run", "limits", "alarms", "stopped"], rows, prose=True), ""]
