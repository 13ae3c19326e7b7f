"""What a comparison is shown as: a table and sentences in the terminal, comparison.md and comparison.html, figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uft.comparison.runs import PREVIOUS
from uft.comparison.summary import interval_of, seeds_needed
from uft.comparison.tables import less_is_better, markdown_table, shown, signed, terminal_table

MORE = (
    "verifiable/accuracy", "demonstrations/nll", "pairs/rewards/accuracies", "pairs/likelihood/accuracies",
    "harmlessness/rewards", "refusals/refusal", "refusals/false_refusal",
)  # fmt: skip
IN_TERMINAL = 5  # columns of measures


def _last_measures(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of the first arm that has any: one that diverged on every seed has none."""
    return next(
        (arm["stages"][-1]["measures"] for arm in summary["arms"].values() if arm["stages"][-1]["measures"]), {}
    )


def forgotten(summary: Mapping[str, Any]) -> str | None:
    """The measure of what was lost of what is to be kept."""
    section = (summary["kept"] or "").partition("/")[0]
    last = _last_measures(summary)
    return next((n for n in (f"{section}/F_true", f"{section}/nll_change") if n in last), None)


def columns(summary: Mapping[str, Any]) -> list[str]:
    """The measures that a reader looks at first."""
    lost = forgotten(summary)
    wanted = [summary["kept"], summary["gained"], *([lost] if lost else []), *MORE]
    last = _last_measures(summary)
    return [name for name in dict.fromkeys(wanted) if name in last][:IN_TERMINAL]


def terminal(summary: Mapping[str, Any]) -> str:
    contrasts = terminal_table(*contrast_rows(summary))
    return "\n".join(
        [
            f"{len(summary['seeds'])} seeds; means ± half of the 95 % t-interval",
            "",
            terminal_table(*arm_rows(summary)),
            "",
            "contrasts, paired by seed; p of the exact sign-flip test",
            "",
            contrasts,
            "",
            *summary["conclusions"],
            budget_line(summary),
        ]
    )


def arm_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = columns(summary)
    base = summary["base"]
    rows = [["base", *(_number(base.get(name)) for name in names), "", ""]]
    for arm, found in summary["arms"].items():
        measures = found["stages"][-1]["measures"]
        cells = [shown(interval_of(measures[name])) if name in measures else "–" for name in names]
        cost = [f"{found['compute']['steps']:,.0f}", f"{found['compute']['flops']:.3g}"] if measures else ["–", "–"]
        rows.append([arm + _gone(found), *cells, *cost])
    return ["arm", *(f"{name} {_arrow(name)}" for name in names), "steps", "FLOPs"], rows


def _gone(found: Mapping[str, Any]) -> str:
    """Behind the name of an arm: on how many seeds it did not come to its end."""
    n = len(found.get("without_end", {}))
    return f" (without {n} seed{'s' if n > 1 else ''})" if n else ""


def gone_lines(summary: Mapping[str, Any]) -> list[str]:
    """What became of each run that did not come to its end."""
    return [
        f"{arm}, seed {seed}, {said}"
        for arm, found in summary["arms"].items()
        for seed, said in found.get("without_end", {}).items()
    ]


def contrast_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [f"{each['a']} − {each['b']}", each["metric"], signed(interval_of(each)), _p(each["p"]), _p(each["p_holm"])]
        for each in summary["contrasts"]
    ]
    return ["contrast", "measure", "difference", "p", "p, Holm"], rows


def cost_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for arm, found in summary["arms"].items():
        if not found["stages"][-1]["measures"]:  # not one run came to its end
            continue
        ratios = list(found.get("flops_relative_to_the_deciding_arm", {}).values())
        for name, part in [("", found), *((s["name"], s) for s in found["stages"] if len(found["stages"]) > 1)]:
            compute = part["compute"]
            rows.append(
                [
                    f"{arm}: {name}" if name else arm,
                    f"{compute['steps']:,.0f}",
                    f"{compute['flops']:.4g}",
                    "" if name or not ratios else f"{min(ratios):.3f} to {max(ratios):.3f}",
                    f"{compute['tokens']:,.0f}",
                    f"{sum(v for k, v in compute.items() if k.startswith('examples/')):,.0f}",
                    f"{compute['reference_forwards']:,.0f}",
                    f"{compute['seconds']:,.1f}",
                    f"{compute['peak_memory_bytes'] / 2**20:,.0f}",
                ]
            )
    return ["arm", "steps", "FLOPs", "of the deciding arm's", "tokens", "examples", "reference passes", "seconds",
            "peak MiB"], rows  # fmt: skip


def forgetting_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """What was forgotten after each stage, against the base and against the stage before."""
    first = _last_measures(summary)
    names = [n for n in first if n.endswith(("/F_true", "/BT_true", "/nll_change")) and not n.startswith(PREVIOUS)]
    if not names:
        return None
    rows = []
    for arm, found in summary["arms"].items():
        for k, stage in enumerate(found["stages"]):
            for prefix, since in (("", "the base"), *([(PREVIOUS, found["stages"][k - 1]["name"])] if k else [])):
                cells = [stage["measures"].get(f"{prefix}{name}") for name in names]
                rows.append([f"{arm}: {stage['name']}", since, *(shown(interval_of(c)) if c else "–" for c in cells)])
    return ["after", "against", *names], rows


def budget_line(summary: Mapping[str, Any]) -> str:
    """What was made equal, and how equal it came out."""
    budget = summary["budget"]
    if budget["unit"] is None:
        return "Budget: none; every arm trained as long as it said, so that arms may differ in cost."
    own = [
        name
        for name, arm in summary["recipe"]["arms"].items()
        if isinstance(arm, Mapping) and arm.get("budget") and name != budget["decider"]
    ]
    apart = f" With a budget of their own, and so not equal: {', '.join(own)}." if own else ""
    if budget["decider"] is None:
        return f"Budget: {budget['total']:.4g} {budget['unit']} for every arm, over all of its stages.{apart}"
    unit = "FLOPs, reference passes counted" if budget["unit"] == "flops" else budget["unit"]
    ratios = [
        ratio
        for name, arm in summary["arms"].items()
        if name not in own
        for ratio in arm.get("flops_relative_to_the_deciding_arm", {}).values()
    ]
    reached = f" Reached: {min(ratios):.3f} to {max(ratios):.3f} of its FLOPs." if ratios else ""
    return (
        f"Budget: equal {unit}. {budget['decider']} trained as long as it said; the last stage of every other arm was "
        f"cut or prolonged to the same on every seed.{reached}{apart}"
    )


def write(summary: Mapping[str, Any], folder: Path) -> None:
    """comparison.md, comparison.html and figures."""
    from uft.comparison import figures
    from uft.reporting.page import write_page

    pictures = []
    if summary["kept"] and summary["gained"]:
        name = figures.tradeoff(folder / "tradeoff.png", summary)
        caption = (
            "What is kept against what is gained. Marks are means over seeds with 95 % t-intervals, dots are seeds, "
            "the star is the base model; better is to the right and above."
        )
        pictures += [f"![{caption}]({name})", ""]
    name = figures.over_stages(folder / "stages.png", summary, forgotten(summary))
    staged = f"![The base model and every stage after it: means over seeds with 95 % t-intervals.]({name})"
    name = figures.cost(folder / "cost.png", summary)
    costs = f"![What each arm cost; shades are stages. Means over seeds, the highest peak of memory.]({name})"
    write_page(folder, "\n".join(_text(summary, pictures, staged, costs)), "comparison")


def _text(summary: Mapping[str, Any], pictures: list[str], staged: str, costs: str) -> list[str]:
    seeds, tests = summary["seeds"], len(summary["contrasts"])
    machine = summary["hardware"].get("gpu") or summary["hardware"]["cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    rows = forgetting_rows(summary)
    lost = [
        "F_true: share of samples right before and wrong after, less what guessing would show; BT_true: the reverse; "
        "nll_change: nats per token.", "", markdown_table(*rows), "",
    ] if rows else []  # fmt: skip
    return [
        f"# Ways of training {summary['model']}, compared",
        "",
        f"{len(summary['arms'])} arms on seeds {', '.join(map(str, seeds))}. {budget_line(summary)}",
        "",
        "## What can be concluded",
        "",
        *(f"- {each}" for each in summary["conclusions"]),
        "",
        *pictures,
        "## Arms",
        "",
        "Means over seeds ± half of the 95 % t-interval, after the last stage. ↑ more is better, ↓ less is better.",
        "",
        markdown_table(*arm_rows(summary)),
        "",
        *([*(f"- {each}" for each in gone), ""] if (gone := gone_lines(summary)) else []),
        "## Contrasts",
        "",
        "Differences paired by seed with 95 % t-intervals; p of the exact sign-flip test, and after Holm's correction "
        f"for {tests} test{'s' if tests > 1 else ''}. Arms and measures were named before the runs. "
        f"{seeds_needed(tests)} seeds are the fewest that can reach 0.05.",
        "",
        markdown_table(*contrast_rows(summary)),
        "",
        "## What was forgotten, stage by stage",
        "",
        *lost,
        staged,
        "",
        "## Cost",
        "",
        markdown_table(*cost_rows(summary)),
        "",
        costs,
        "",
        "## Every measure after the last stage",
        "",
        markdown_table(*_all_rows(summary)),
        "",
        f"{summary['date']}, commit {summary['commit']}, {machine}; {versions}.",
    ]


def _all_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    arms = {name: arm["stages"][-1]["measures"] for name, arm in summary["arms"].items()}
    names = dict.fromkeys(n for measures in arms.values() for n in measures if not n.startswith(PREVIOUS))
    rows = [
        [
            name,
            _number(summary["base"].get(name)),
            *(shown(interval_of(measures[name])) if name in measures else "–" for measures in arms.values()),
        ]
        for name in names
    ]
    return ["measure", "base", *arms], rows


def _arrow(name: str) -> str:
    return "↓" if less_is_better(name) else "↑"


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _p(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"
