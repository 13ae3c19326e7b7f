"""Figures of a comparison and of a sweep.  Marks differ as well as colours, so that they read in print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from uft.comparison.summary import interval_of
from uft.comparison.tables import less_is_better

# Okabe & Ito's colours, told apart by the colour-blind, darker where they would be too pale on white
COLOURS = ("#C04F00", "#0072B2", "#00785A", "#A8487F", "#8F6A00", "#3A8FC4", "#333333")
MARKERS = "oD^svP*X"
RC = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def style(k: int) -> tuple[str, str]:
    return COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]


def saved(figure: Figure, path: Path) -> str:
    figure.savefig(path, dpi=150, bbox_inches="tight", pil_kwargs={"optimize": True})
    return path.name


def axis_label(metric: str) -> str:
    return f"{metric} ({'less' if less_is_better(metric) else 'more'} is better)"


def tradeoff(path: Path, summary: Mapping[str, Any]) -> str:
    """What is kept against what is gained: a mark at each arm's mean with 95 % t-intervals, a dot per seed, a star for
    the base model.  Better lies to the right and above."""
    x, y, base = summary["gained"], summary["kept"], summary["base"]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(6.4, 4.6))
        axes = figure.add_subplot()
        for k, (name, arm) in enumerate(summary["arms"].items()):
            colour, marker = style(k)
            measures = arm["stages"][-1]["measures"]
            if x not in measures or y not in measures:  # it diverged on every seed
                continue
            seeds = measures[x]["by_seed"]
            axes.scatter(
                list(seeds.values()), [measures[y]["by_seed"][s] for s in seeds], s=12, color=colour, alpha=0.4, lw=0
            )
            found = [interval_of(measures[metric]) for metric in (x, y)]
            half = [(f.high - f.low) / 2 if math.isfinite(f.low) else 0.0 for f in found]
            axes.errorbar(
                found[0].mean, found[1].mean, xerr=half[0], yerr=half[1], fmt=marker, color=colour, markersize=8,
                markeredgecolor="white", capsize=2, elinewidth=1, label=name,
            )  # fmt: skip
        if base.get(x) is not None and base.get(y) is not None:
            axes.plot(base[x], base[y], "*", color="black", markersize=13, ls="none", label="base model")
        for metric, flip in ((x, axes.invert_xaxis), (y, axes.invert_yaxis)):
            if less_is_better(metric):
                flip()
        axes.set_xlabel(f"gained: {axis_label(x)}")
        axes.set_ylabel(f"kept: {axis_label(y)}")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
        return saved(figure, path)


def over_stages(path: Path, summary: Mapping[str, Any], forgotten: str | None) -> str:
    """Each outcome at the base and after every stage, and what was lost against the base."""
    outcomes = list(dict.fromkeys(m for m in (summary["kept"], summary["gained"]) if m))
    panels = [*outcomes, *([forgotten] if forgotten else [])]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(3.6 * len(panels), 3.5), layout="constrained")
        for axes, metric in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            lost = metric == forgotten
            start = 0.0 if lost else summary["base"].get(metric)
            for k, (name, arm) in enumerate(summary["arms"].items()):
                _path(axes, arm, metric, start, k, len(summary["arms"]), name)
            if start is not None:
                axes.axhline(start, color="black", lw=0.8, ls=":")
            longest = max(len(arm["stages"]) for arm in summary["arms"].values())
            axes.set_xticks(range(longest + 1), ["base", *(f"stage {i + 1}" for i in range(longest))])
            axes.set_title(("lost since the base:\n" if lost else "") + axis_label(metric), loc="left", fontsize=9)
            axes.grid(axis="y", alpha=0.25)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=min(5, len(labels)))
        return saved(figure, path)


def _path(axes: Axes, arm: Mapping[str, Any], metric: str, start: float | None, k: int, arms: int, name: str) -> None:
    colour, marker = style(k)
    found = [interval_of(stage["measures"][metric]) for stage in arm["stages"] if metric in stage["measures"]]
    means, half = [f.mean for f in found], [(f.high - f.low) / 2 if math.isfinite(f.low) else 0.0 for f in found]
    if not found:
        return
    # beside each other, so that intervals do not hide one another
    aside = 0.06 * (k - (arms - 1) / 2)
    x = np.arange(1, len(found) + 1) + aside
    axes.errorbar(x, means, yerr=half, fmt=marker, color=colour, capsize=2, markeredgecolor="white", label=name)
    if start is not None:
        axes.plot([0, *x], [start, *means], color=colour, lw=1)


def cost(path: Path, summary: Mapping[str, Any]) -> str:
    """FLOPs, seconds and peak memory of every arm, the first two divided by stage."""
    names = list(summary["arms"])
    rows = np.arange(len(names))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(9.2, 1.2 + 0.42 * len(names)), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (what, title, unit) in zip(
            panels,
            [("flops", "FLOPs, reference passes counted", 1.0), ("seconds", "seconds", 1.0),
             ("peak_memory_bytes", "peak memory, MiB", 2.0**20)],
        ):  # fmt: skip
            for row, name in zip(rows, names):
                arm, left = summary["arms"][name], 0.0
                parts = [arm] if what == "peak_memory_bytes" else arm["stages"]
                for stage, part in enumerate(parts):
                    width = part["compute"][what] / unit
                    axes.barh(
                        row, width, left=left, color=style(row)[0], alpha=1.0 - 0.4 * (stage % 2), edgecolor="white"
                    )
                    left += width
            axes.set_title(title, loc="left", fontsize=9)
            axes.grid(axis="x", alpha=0.25)
        panels[0].set_yticks(rows, names)
        panels[0].invert_yaxis()
        return saved(figure, path)


def over_parameters(
    path: Path, trials: Sequence[Mapping[str, Any]], space: Sequence[Any], metric: str, best: int
) -> str:
    """The value of every finished trial over each parameter that was swept; a star marks the best.

    trials   with `number`, `value` and `params`
    space    `uft.comparison.sweep_recipe.Parameter`; an axis is as long as what was searched
    """
    columns = min(3, len(space))
    lines = -(-len(space) // columns)
    star = next(i for i, trial in enumerate(trials) if trial["number"] == best)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(3.4 * columns + 0.4, 2.9 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for axes, parameter in zip(panels.flat, space):
            found, choices = [trial["params"][parameter.key] for trial in trials], parameter.values
            x = found if choices is None else [choices.index(value) for value in found]
            axes.scatter(x, [trial["value"] for trial in trials], s=22, color=COLOURS[1], alpha=0.7, lw=0)
            axes.plot(x[star], trials[star]["value"], "*", color=COLOURS[0], markersize=15, markeredgecolor="white")
            if choices is None:
                axes.set_xscale("log" if parameter.log else "linear")
                axes.set_xlim(parameter.low, parameter.high)
                axes.xaxis.set_minor_formatter(NullFormatter())
            else:
                axes.set_xticks(range(len(choices)), [str(choice) for choice in choices])
                axes.set_xlim(-0.5, len(choices) - 0.5)
            axes.set_xlabel(parameter.key)
            axes.grid(alpha=0.25)
        for axes in panels[:, 0]:
            axes.set_ylabel(metric)
        for axes in panels.flat[len(space) :]:
            axes.set_visible(False)
        return saved(figure, path)
