"""What a sweep found: sweep.json, recipes of the best, a table, a page and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uft.comparison.sweep_recipe import Sweep, Swept
from uft.comparison.sweep_tuned import ending, write_best, write_compare
from uft.comparison.tables import markdown_table, terminal_table
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


def has_compare(plan: Sweep, arms: Mapping[str, Any]) -> bool:
    """Whether compare.yaml is written: two arms or more, each with a best trial."""
    return len(plan.arms) > 1 and all(arm["best"] for arm in arms.values())


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
            write_best(plan, arm, best, len(found[arm.name]))
    if has_compare(plan, arms):
        write_compare(plan, {name: arm["best"] for name, arm in arms.items()})
    about = {key: getattr(plan, key) for key in ("metric", "direction", "sampler", "pruner", "seeds")}
    summary = {**about, "arms": arms, "recipe": dict(plan.values), **environment()}
    write_json(folder / "sweep.json", summary)
    _page(plan, summary)
    return summary


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


def counted(trials: Trials) -> str:
    """How many trials there are, and what became of them: 8 trials: 6 finished (1 as another), 2 failed."""
    states = [trial["state"] for trial in trials]
    same = sum("as_trial" in trial for trial in trials)
    parts = [f"{states.count(state)} {state}" for state in ("finished", "ended early", "failed") if state in states]
    if same:
        parts[0] += f" ({same} of them as an earlier one of the same values)"
    return f"{len(states)} trial{'s' * (len(states) != 1)}: {', '.join(parts)}"


def unlike(arms: Mapping[str, Any]) -> str | None:
    """A warning where arms were not tuned with as many trials."""
    tried = {name: sum("as_trial" not in trial for trial in arm["trials"]) for name, arm in arms.items()}
    if len(set(tried.values())) < 2:
        return None
    several = ", ".join(f"{name} {count}" for name, count in tried.items())
    return f"Arms were not tuned alike: different values tried, {several}; more trials find a better best."


def own_measure(plan: Sweep, keys: Iterable[str]) -> str | None:
    """A warning where what is searched changes what the metric means."""
    changed = [key for key in keys if "objective" in key.split(".")]
    betas = [key for key in changed if key.endswith("beta")]
    other = "want a metric such as eval_rewards/accuracies, or one of `measure`."
    if plan.metric == "eval_loss" and changed:
        return (
            f"eval_loss is that of the objective, and {', '.join(changed)} may change what it is made of: its values "
            f"then do not say which is better; {other}"
        )
    if plan.metric.startswith("eval_") and plan.metric.endswith("/margins") and betas:
        return f"{plan.metric} grows with {', '.join(betas)}, which multiplies it, whatever was learnt; {other}"
    return None


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
    if uneven := unlike(summary["arms"]):
        lines += ["", uneven]
    return "\n".join(lines)


def _page(plan: Sweep, summary: Mapping[str, Any]) -> None:
    from uft.comparison import figures
    from uft.reporting.page import write_page

    seeds = f"seed{'s' if len(plan.seeds) > 1 else ''} {', '.join(map(str, plan.seeds))}"
    lines = [
        f"# Sweep: {plan.metric}, to be {plan.direction}d",
        "",
        f"Sampler {plan.sampler}, pruner {plan.pruner}, {seeds} of every trial.",
        "",
    ]
    if uneven := unlike(summary["arms"]):
        lines += [f"**{uneven}**", ""]
    for arm in plan.arms:
        found = summary["arms"][arm.name]
        finished = [trial for trial in found["trials"] if trial["state"] == "finished"]
        lines += [
            f"## {arm.name}" if plan.has_arms else "## Trials",
            "",
            *(f"- {s}" for s in said(plan, arm.name, found)),
            "",
        ]
        lines += [f"{counted(found['trials'])}. Searched: {'; '.join(found['space'])}.", ""]
        if finished:
            name = figures.over_parameters(
                plan.output_dir / f"sweep{ending(plan, arm)}.png", finished, arm.space,
                plan.metric, found["best"]["number"],
            )  # fmt: skip
            lines += [
                f"![{plan.metric} of every finished trial over each parameter; the star is the best.]({name})",
                "",
            ]
        lines += [markdown_table(*rows(plan, arm, found["trials"])), ""]
    write_page(plan.output_dir, "\n".join(lines), "sweep")
