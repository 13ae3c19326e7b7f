"""The page of `uft watch`: a table of all runs, and one of them closely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from uft.watching import text
from uft.watching.path import boundaries, thinned
from uft.watching.runs import Run

# what is shown where nobody says what to show, in this order
METRICS = (
    "loss", "loss/*", "reward", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected",
    "online/*", "kl*", "entropy", "weight/*", "conflict/*/cosine", "grad_norm", "learning_rate", "length", "ended",
    "tokens_per_second", "peak_memory_gib",
)  # fmt: skip
STYLES = {"running": "green", "finished": "cyan", "stopped": "yellow", "ended early": "yellow", "died": "red"}
WIDE = 120  # columns from which metrics and plane stand side by side
ANSWER = 300  # characters of an answer that are shown


def page(runs: Sequence[Run], now: float, width: int, metrics: Sequence[str] = (), rows: int | None = None) -> Group:
    """Everything; `rows` is how many runs the table holds at most."""
    parts: list[RenderableType] = []
    if len(runs) > 1:
        parts += [_table(runs[:rows], now)]
        if rows is not None and len(runs) > rows:
            parts.append(Text(f"and {len(runs) - rows} that logged earlier", style="dim"))
    if problem := unmatched(runs, metrics):
        parts.append(Text(problem, style="red"))
    return Group(*parts, _closely(runs[0], now, width, metrics))


# ---- all runs ----


def _table(runs: Sequence[Run], now: float) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("run", "state", "step", "left", "loss", "terms", "held out", "accuracy", "tokens/s"):
        table.add_column(name, justify="left" if name in ("run", "state", "terms") else "right", overflow="fold")
    for run in runs:
        last = {name: values[-1][1] for name, values in run.now.series.items() if values}
        terms = [f"{n.removeprefix('loss/')} {text.short(v)}" for n, v in last.items() if n.startswith("loss/")]
        accuracy = last.get("eval_rewards/accuracies", last.get("rewards/accuracies"))
        left = text.duration(_left(run, now)[0]) if _goes_on(run, now) else ""
        table.add_row(
            run.name, _state(run, now), _steps(run), left, text.short(last.get("loss")), ", ".join(terms),
            text.short(last.get("eval_loss")), text.short(accuracy), text.short(last.get("tokens_per_second")),
        )  # fmt: skip
    return table


def _goes_on(run: Run, now: float) -> bool:
    return run.state(now).startswith(("running", "quiet"))


def _left(run: Run, now: float) -> tuple[float | None, str]:
    """Seconds, and until when."""
    here, whole = run.now.left(now)
    if run.more_to_come:
        return (whole, "of all stages") if whole is not None else (here, "of this stage")
    return here, ""


def _state(run: Run, now: float) -> Text:
    state = run.state(now)
    return Text(state, style=STYLES.get(state, "red"))


def _steps(run: Run) -> str:
    total = f"/{run.now.total:,}" if run.now.total > 0 else ""
    return f"{f'{run.stage} ' if run.stage else ''}{run.now.step:,}{total}"


# ---- one run ----


def _closely(run: Run, now: float, width: int, metrics: Sequence[str]) -> Panel:
    inside = width - 4
    line = Table.grid(padding=(0, 2))
    line.add_row(_state(run, now), ProgressBar(max(run.now.total, 1), run.now.step, width=24), *_about(run, now))
    numbers, picture = _numbers(run, metrics), _plane(run, min(48, inside - 12))
    if picture is None:
        body: RenderableType = numbers
    elif width >= WIDE:
        body = Table.grid(padding=(0, 4))
        body.add_row(numbers, picture)
    else:
        body = Group(numbers, Text(), picture)
    return Panel(Group(line, Text(), body, *_samples(run)), title=Text(run.name), title_align="left")


def _about(run: Run, now: float) -> list[str]:
    said = [f"step {_steps(run)}"]
    if run.stages:
        said[0] += f", stage {run.position + 1} of {len(run.stages)}"
    if _goes_on(run, now):
        seconds, until = _left(run, now)
        said.append(f"{text.duration(seconds)} left{f' {until}' if until else ''}")
    if objective := run.now.begun.get("objective"):
        said.append(f"objective {objective}")
    return said


def _numbers(run: Run, metrics: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name, right in (("", False), ("last", True), ("training", False), ("last", True), ("held out", False)):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for name in chosen(run, metrics):
        cells = []
        for key in (name, f"eval_{name}"):
            values = [value for _, value in run.now.series.get(key, [])]
            cells += [text.short(values[-1]) if values else "", text.sparkline(values) if len(values) > 1 else ""]
        bad = any(not math.isfinite(v) for key in (name, f"eval_{name}") for _, v in run.now.series.get(key, [])[-1:])
        table.add_row(name, *cells, style="red" if bad else None)
    return table


def chosen(run: Run, patterns: Sequence[str] = ()) -> list[str]:
    """The metrics to show, as they are named in training; of weights, by default only those that change."""
    series = run.now.series
    names = dict.fromkeys(name.removeprefix("eval_") for name in series)
    found = [name for pattern in patterns or METRICS for name in names if fnmatchcase(name, pattern)]
    if not patterns:
        found = [n for n in found if not n.startswith("weight/") or len({v for _, v in series.get(n, [])}) > 1]
    return list(dict.fromkeys(found))


def unmatched(runs: Sequence[Run], patterns: Sequence[str]) -> str | None:
    """A sentence on the first pattern that no metric of any run matches; None where runs have logged nothing yet."""
    logged = (name.removeprefix("eval_") for run in runs for part in run.parts for name in part.series)
    names = list(dict.fromkeys(logged))
    for pattern in patterns if names else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            return f"no metric matches {pattern!r}; there are {', '.join(names)}"
    return None


def _plane(run: Run, width: int) -> RenderableType | None:
    points = thinned(run.path(), 200)
    picture = text.plane([(p.x, p.y) for p in points], boundaries(points), max(width, 16))
    if not picture:
        return None
    x, y = (" + ".join(names) for names in run.axes)
    marks = "o begin, ● now" + (", + a stage begins" if run.stages else "")
    return Text("\n".join([f"↑ {y}   → {x}", *picture, marks]), no_wrap=True)


def _samples(run: Run) -> list[RenderableType]:
    answers = run.samples()
    if not answers:
        return []
    parts: list[RenderableType] = [Text(), Text(f"answers at step {answers[0]['step']:,}", style="bold")]
    for entry in list({entry.get("source"): entry for entry in reversed(answers)}.values())[-2:]:  # of two sources
        for name, style in (("prompt", "dim"), ("answer", ""), ("reference", "dim")):
            if isinstance(value := entry.get(name), str):
                parts.append(Text(f"{name:>9}  {_printable(value)}", style=style))
    return parts


def _printable(value: str) -> str:
    """On one line, and without characters that would move the cursor."""
    value = value if len(value) <= ANSWER else f"{value[:ANSWER]}…"
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in value.strip())
