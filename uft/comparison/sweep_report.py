"""What a sweep found: sweep.json, best.yaml, a table, a page and figures."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from uft.comparison.sweep_recipe import OWN, Sweep, Swept, as_words
from uft.comparison.tables import markdown_table, terminal_table
from uft.recipe import override
from uft.record import environment, write_json

IN_TERMINAL = 12  # trials

Trials = Sequence[Mapping[str, Any]]


def best_of(plan: Sweep, trials: Trials) -> Mapping[str, Any] | None:
    """The finished trial of the best value; the first of several."""
    found = None
    for trial in trials:
        if trial["state"] == "finished" and (found is None or plan.better(trial["value"], found["value"])):
            found = trial
    return found


def edges(arm: Swept, best: Mapping[str, Any]) -> list[str]:
    """The parameters whose best value lies at an end of what was tried."""
    return [p.key for p in arm.space if p.at_edge(best["params"][p.key])]


def write(plan: Sweep, found: Mapping[str, Trials]) -> dict[str, Any]:
    """Everything into the sweep's folder; returns what sweep.json holds."""
    folder, arms = plan.output_dir, {}
    for arm in plan.arms:
        best = best_of(plan, found[arm.name])
        arms[arm.name] = {
            "space": [str(parameter) for parameter in arm.space],
            "best": best,
            "at_edge": [] if best is None else edges(arm, best),
            "trials": list(found[arm.name]),
        }
        if best is not None:
            name = f"best{_ending(plan, arm)}"
            values = arm.with_values(best["params"]).values
            seed = {} if "seed" in values else {"seed": plan.seeds[0]}  # that of the trial
            write_yaml(
                folder / f"{name}.yaml", f"The best of {len(found[arm.name])} trials: uft train --config {name}.yaml",
                {**values, **seed, "output_dir": str(folder / name)},
            )  # fmt: skip
    if plan.has_arms and all(arms[arm.name]["best"] for arm in plan.arms):
        write_yaml(
            folder / "compare.yaml", "Every arm at its best: uft compare --config compare.yaml", tuned(plan, arms)
        )
    about = {key: getattr(plan, key) for key in ("metric", "direction", "sampler", "pruner", "seeds")}
    summary = {**about, "arms": arms, "recipe": dict(plan.values), **environment()}
    write_json(folder / "sweep.json", summary)
    _page(plan, summary)
    return summary


def tuned(plan: Sweep, arms: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of `uft compare` for the arms at their best."""
    common = {key: value for key, value in plan.values.items() if key not in OWN}
    changed = {}
    for arm in plan.arms:
        own = copy.deepcopy(dict(arm.changes or {}))
        for key, value in arms[arm.name]["best"]["params"].items():
            first = key.partition(".")[0]
            if first not in own and first in common and "." in key:
                own[first] = copy.deepcopy(common[first])
            own = override(own, as_words({key: value}))
        changed[arm.name] = own
    measured = {} if plan.measured is None else {"measure": dict(plan.measured)}
    return {**common, "output_dir": str(plan.output_dir / "compare"), "arms": changed, **measured}


def write_yaml(path: Path, comment: str, values: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)
    path.write_text(f"# {comment}\n{text}", encoding="utf-8")


def _ending(plan: Sweep, arm: Swept) -> str:
    return f"-{arm.name}" if plan.has_arms else ""


# ---- as text ----


def rows(plan: Sweep, arm: Swept, trials: Trials) -> tuple[list[str], list[list[str]]]:
    """Trials, the best first; those without a value last."""
    sign = 1 if plan.direction == "minimize" else -1

    def place(trial: Mapping[str, Any]) -> tuple[bool, float, int]:
        value = trial["value"]
        return value is None, 0.0 if value is None else sign * value, trial["number"]

    lines = [
        [
            str(trial["number"]),
            *(_shown(trial["params"][p.key]) for p in arm.space),
            "–" if trial["value"] is None else f"{trial['value']:.5g}",
            _what(trial),
        ]
        for trial in sorted(trials, key=place)
    ]
    return ["trial", *(p.key for p in arm.space), plan.metric, ""], lines


def _what(trial: Mapping[str, Any]) -> str:
    if "as_trial" in trial:
        return f"as trial {trial['as_trial']}"
    return "" if trial["state"] == "finished" else trial["state"]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def said(plan: Sweep, name: str, found: Mapping[str, Any]) -> list[str]:
    """What was best, whether the range was wide enough, what failed."""
    best, whose = found["best"], f"{name}: " if plan.has_arms else ""
    failed = [trial for trial in found["trials"] if trial["state"] == "failed"]
    lines = [f"{whose}{len(failed)} of {len(found['trials'])} trials failed: {failed[0]['reason']}"] if failed else []
    if best is None:
        return [*lines, f"{whose}no trial was finished, so that there is no best one."]
    values = ", ".join(f"{key} {_shown(value)}" for key, value in best["params"].items())
    lines.insert(0, f"{whose}best is trial {best['number']}: {plan.metric} {best['value']:.5g} at {values}.")
    moving = own_measure(plan, found["best"]["params"])
    if moving:
        lines.append(f"{whose}{moving}")
    if found["at_edge"]:
        lines.append(
            f"{whose}the best lies at the edge of what was tried for {', '.join(found['at_edge'])}; want a wider range "
            "before it is called tuned."
        )
    return lines


def own_measure(plan: Sweep, keys: Iterable[str]) -> str | None:
    """A warning where what is searched changes what is minimised."""
    changed = [key for key in keys if "objective" in key.split(".")]
    if plan.metric != "eval_loss" or not changed:
        return None
    return (
        f"eval_loss is that of the objective, and {', '.join(changed)} may change what it is made of: its values then "
        "do not say which is better; want a metric such as eval_rewards/accuracies, or one of `measure`."
    )


def terminal(plan: Sweep, summary: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for arm in plan.arms:
        found = summary["arms"][arm.name]
        header, table = rows(plan, arm, found["trials"])
        more = f"... and {len(table) - IN_TERMINAL} more in sweep.md" if len(table) > IN_TERMINAL else ""
        lines += [
            "",
            terminal_table(header, table[:IN_TERMINAL]),
            *([more] if more else []),
            "",
            *said(plan, arm.name, found),
        ]
    return "\n".join(lines)


def _page(plan: Sweep, summary: Mapping[str, Any]) -> None:
    from uft.comparison import figures
    from uft.reporting.page import write_page

    seeds = f"seed{'s' if len(plan.seeds) > 1 else ''} {', '.join(map(str, plan.seeds))}"
    lines = [
        f"# Sweep: {plan.metric}, to be {plan.direction}d",
        "",
        f"Sampler {plan.sampler}, pruner {plan.pruner}, {seeds} of every trial"
        + (", as many trials for every arm." if plan.has_arms else "."),
        "",
    ]
    for arm in plan.arms:
        found = summary["arms"][arm.name]
        finished = [trial for trial in found["trials"] if trial["state"] == "finished"]
        lines += [
            f"## {arm.name}" if plan.has_arms else "## Trials",
            "",
            *(f"- {s}" for s in said(plan, arm.name, found)),
            "",
        ]
        lines += ["Searched: " + "; ".join(found["space"]) + ".", ""]
        if finished:
            name = figures.over_parameters(
                plan.output_dir / f"sweep{_ending(plan, arm)}.png", finished, arm.space,
                plan.metric, found["best"]["number"],
            )  # fmt: skip
            lines += [
                f"![{plan.metric} of every finished trial over each parameter; the star is the best.]({name})",
                "",
            ]
        lines += [markdown_table(*rows(plan, arm, found["trials"])), ""]
    write_page(plan.output_dir, "\n".join(lines), "sweep")
