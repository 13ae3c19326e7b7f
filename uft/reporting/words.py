"""The summary in plain words: what was trained, what it cost, where it ended, what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from uft.reporting.groups import Group
from uft.reporting.runs import KINDS, Run
from uft.reporting.series import curve
from uft.reporting.text import plain
from uft.reporting.values import (
    Row,
    evaluated,
    flops,
    memory,
    model_of,
    number,
    objective_of,
    seconds,
    spread,
    state_of,
    whole,
)

LISTED = 6  # groups, up to which each has a line


def in_words(groups: Sequence[Group], rows: Sequence[Row]) -> list[str]:
    """Markdown paragraphs."""
    if len(groups) == 1:
        return _one(groups[0])
    runs = [run for group in groups for run in group.runs]
    said = f"{len(runs)} runs"
    if len(groups) < len(runs):
        said += f" in {len(groups)} groups, each of runs that differ only in seed (mean ± half the 95 % t-interval)"
    spent = sum(run.compute.get("flops", 0) for run in runs)
    time = sum(run.compute.get("seconds", 0) for run in runs)
    said += f"; together {flops(spent)} and {seconds(time)} of training." if spent else "."
    paragraphs = [said]
    if len(groups) <= LISTED:
        paragraphs.append("\n".join(_one_line(group) for group in groups))
    if won := _won(groups, rows):
        paragraphs.append(won)
    return paragraphs


def _one_line(group: Group) -> str:
    run = group.runs[0]
    what = objective_of(run) or KINDS[run.kind]
    seeds = f", {len(group.runs)} seeds" if len(group.runs) > 1 else ""
    state = "" if state_of(run) in ("finished", "") else f", {state_of(run)}"
    lost = _lost(group)
    return f"- `{group.name}`: {plain(what)}{seeds}{state}. {_cost(run)}{' ' + lost if lost else ''}".rstrip()


def _won(groups: Sequence[Group], rows: Sequence[Row]) -> str:
    """Where something can be compared, who is ahead; without an interval it may be chance."""
    marked = [row for row in rows if row.best and row.label.startswith(("eval: ", "measured: "))]
    if not marked:
        return ""
    counts = {group.name: sum(i in row.best for row in marked) for i, group in enumerate(groups)}
    said = ", ".join(f"`{name}` in {count}" for name, count in sorted(counts.items(), key=lambda c: -c[1]) if count)
    of = "the one held-out measure" if len(marked) == 1 else f"{len(marked)} held-out measures"
    return f"Of {of} that can be compared, the best: {said}. What is best by how much stands in the table."


def _one(group: Group) -> list[str]:
    run = group.runs[0]
    if run.kind == "evaluation":
        return [f"An evaluation of {plain(model_of(run))}; no training is recorded beside it.", _lost(group)]
    model, objective = model_of(run), objective_of(run)
    what = f"{plain(model)} trained" if model else "Trained"
    said = [f"{what} by {plain(objective)}" if objective else what]
    if len(run.stages) > 1:
        said.append(f"in {len(run.stages)} stages")
    if len(group.runs) > 1:
        said.append(f"with {len(group.runs)} seeds (mean ± half the 95 % t-interval)")
    state = state_of(run)
    sentence = " ".join(said) + (f"; {state}" if state not in ("finished", "") else "")
    return [part for part in (f"{sentence}. {_cost(run)}", _course(group), _lost(group)) if part]


def _cost(run: Run) -> str:
    compute = run.compute
    said = [f"{whole(run.steps)} steps"] if run.steps else []
    said += [f"{whole(compute['tokens'])} tokens"] if "tokens" in compute else []
    said += [flops(compute["flops"])] if compute.get("flops") else []
    said += [seconds(compute["seconds"])] if "seconds" in compute else []
    said += [f"{memory(compute['peak_memory_bytes'])} at most"] if "peak_memory_bytes" in compute else []
    return f"{', '.join(said)}." if said else ""


def _course(group: Group) -> str:
    """From where to where its losses and rewards went, on held-out data if there are any."""
    run = group.runs[0]
    names = [n for n in run.logged if n.startswith(("eval_loss/", "eval_rewards/acc"))]
    names = names or [n for n in run.logged if n.startswith(("loss/", "rewards/acc"))]
    names = names or [n for n in run.logged if n in ("loss", "reward")]
    said = []
    for name in names[:4]:
        found = curve(run, name)
        if found is None or len(found.x) < 2:
            continue
        of = (lambda each, n=name: each.last(n)) if name.startswith("eval_") else (lambda each, n=name: each.ending(n))
        end = spread(group.mean(of))
        first = f"{number(found.y[0])} at step {whole(found.x[0])}"
        said.append(f"`{name.removeprefix('eval_')}` from {first} to {end} at step {whole(found.x[-1])}")
    where = "On held-out data" if names and names[0].startswith("eval_") else "In training"
    return f"{where}: {'; '.join(said)}." if said else ""


def _lost(group: Group) -> str:
    """Forgetting, where an evaluation was compared with one before."""
    said = []
    names = [n for run in group.runs[:1] for n in (run.evaluation or {}).get("metrics", {})]
    for name in names:
        section, _, what = name.rpartition("/")
        value = group.mean(evaluated(name))
        if what == "F_true" and value is not None:
            said.append(f"of {plain(section)} {100 * value.mean:.1f} % was forgotten beyond chance")
        elif what == "nll_change" and value is not None:
            said.append(f"{plain(section)} changed by {value.mean:+.4f} nats per token")
    return f"Against the evaluation before: {'; '.join(said)}." if said else ""
