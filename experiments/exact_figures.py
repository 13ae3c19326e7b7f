"""Figures of exact paths: where training goes, beside the best that any policy could do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from .figures import MARKERS, spread_labels
from .lab.enumerable.optimum import Front
from .study_figures import LINES

Paths = Mapping[str, Sequence[Sequence[Mapping[str, float]]]]  # arm -> runs -> points
Names = Mapping[str, str]  # arm -> its label, or its family

PANELS = {
    "control": "one loss alone, and the control",
    "sequential": "one stage after the other",
    "joint": "one joint stage, by weight of DPO",
    "other": "one term a step; pointwise losses",
}


def loss_paths(path: Path, paths: Paths, labels: Names, families: Names, front: Front) -> None:
    _panels(path, paths, labels, families, front, "dpo", 1.0, "f$_{DPO}$, nats per pair (better ↓)", marked=(0.5, 0.9))


def reward_paths(path: Path, paths: Paths, labels: Names, families: Names, front: Front) -> None:
    _panels(path, paths, labels, families, front, "reward", -1.0, "expected reward (better ↑)", marked=())


def _panels(
    path: Path, paths: Paths, labels: Names, families: Names, front: Front, second: str, sign: float, label: str,
    marked: Sequence[float],
) -> None:  # fmt: skip
    """A panel per family.  Lines are means over seeds and thin ones single seeds; hollow marks end a first stage; what
    `marked` weights have on the front is a dot there."""
    shown = [family for family in PANELS if family in families.values()]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(5.3 * columns, 3.5 * rows), sharex=True, sharey=True,
                                  squeeze=False)  # fmt: skip
    left, right, bottom, top = _limits(paths, front, second, sign)
    for panel, family in zip(panels.flat, shown):
        panel.plot(front.x, sign * front.y, color="black", lw=1.6, zorder=4)
        panel.set_xlim(left, right)
        panel.set_ylim(bottom, top)
        panel.plot(front.ideal[0], sign * front.ideal[1], marker="*", color="black", markersize=9, zorder=4)
        ends = []
        with_limit = (family, "limit") if family == "joint" else (family,)
        own = [name for name in paths if families[name] in with_limit]
        for name, colour, marker in zip(own, LINES, MARKERS):
            runs = np.array([[(point["sft"], point[second]) for point in run] for run in paths[name]])
            for run in runs:
                panel.plot(*run.T, color=colour, lw=0.6, alpha=0.35)
            mean = runs.mean(0)
            panel.plot(*mean.T, color=colour, lw=1.5)
            for k, point in enumerate(paths[name][0]):
                if _ends_stage(point):
                    panel.plot(*mean[k], marker, color=colour, markerfacecolor="white", markersize=6, zorder=5)
            panel.plot(*mean[-1], marker, color=colour, markersize=7, markeredgecolor="white", zorder=6)
            ends.append((mean[-1], labels[name], colour))
        start = paths[own[0]][0][0]
        panel.plot(start["sft"], start[second], "o", color="#666666", markersize=6, zorder=5)
        panel.annotate("base", (start["sft"], start[second]), (6, 6 * sign), textcoords="offset points",
                       va="center", color="#666666")  # fmt: skip
        _in_column(panel, ends, right)
        panel.set_title(PANELS[family], loc="left")
    first = panels.flat[0]
    first.annotate("ideal", (front.ideal[0], sign * front.ideal[1]), (7, -1), textcoords="offset points", va="center")
    k, place = (0, (8, 0)) if sign > 0 else (-1, (-60, -12))  # where no path comes by
    first.annotate("true Pareto front", (front.x[k], sign * front.y[k]), place, textcoords="offset points", va="center")
    for panel in panels.flat[: len(shown)]:
        for weight in marked if panel.get_title("left") == PANELS["joint"] else ():
            k = int(np.argmin(np.abs(front.weight - weight)))
            panel.plot(front.x[k], sign * front.y[k], "o", color="black", markersize=4, zorder=4)
            panel.annotate(f"{weight:g}", (front.x[k], sign * front.y[k]), (-5, -3 * sign), textcoords="offset points",
                           ha="right", va="center", fontsize=7)  # fmt: skip
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("f$_{SFT}$, nats per token (better ←)")
    for panel in panels[:, 0]:
        panel.set_ylabel(label)
    figure.tight_layout(w_pad=3.0)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def kl_ends(path: Path, paths: Paths, labels: Names, families: Names, front: Front) -> None:
    """Reward against KL to the base where each run ends; the front is base · exp(reward / beta) / Z for every beta."""
    colours = {"control": "#666666", "sequential": "#D55E00", "joint": "#0072B2", "other": "#009E73", "limit": "black"}
    figure, axes = plt.subplots(figsize=(7.0, 4.6))
    axes.plot(front.x, -front.y, color="black", lw=1.6)
    k = int(np.argmin(np.abs(front.x - 2.0)))
    axes.annotate("the most reward\nat this KL", (front.x[k], -front.y[k]), (-10, 8), textcoords="offset points",
                  ha="right")  # fmt: skip
    ends, seen = [], {}
    for name, runs in paths.items():
        family = families[name]
        marker = MARKERS[seen.setdefault(family, 0) % len(MARKERS)]
        seen[family] += 1
        points = np.array([(run[-1]["kl_base"], run[-1]["reward"]) for run in runs])
        axes.plot(*points.T, marker, color=colours[family], alpha=0.35, markersize=4, linestyle="none")
        axes.plot(*points.mean(0), marker, color=colours[family], markersize=8, markeredgecolor="white")
        ends.append((points.mean(0), labels[name], colours[family]))
    axes.set_xlabel("KL(π ‖ base), nats per response")
    axes.set_ylabel("expected reward")
    right = 1.25 * max(run[-1]["kl_base"] for runs in paths.values() for run in runs)
    axes.set_xlim(-0.03 * right, right)
    axes.set_ylim(0.0, 1.1 * float(np.interp(right, front.x, -front.y)))
    _in_column(axes, ends, right)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _limits(paths: Paths, front: Front, second: str, sign: float) -> tuple[float, float, float, float]:
    """All ends of stages and the front, but not all of the ways there."""
    ends = [p for runs in paths.values() for run in runs for p in (run[0], run[-1], *filter(_ends_stage, run))]
    x = [point["sft"] for point in ends] + front.x.tolist()
    y = [point[second] for point in ends] + (sign * front.y).tolist()
    wide, high = max(x) - min(x), max(y) - min(y)
    return min(x) - 0.09 * wide, max(x) + 0.12 * wide, min(y) - 0.07 * high, max(y) + 0.06 * high


def _ends_stage(point: Mapping[str, float]) -> bool:
    return bool(point.get("boundary"))


def _in_column(axes: Any, ends: Sequence[tuple[np.ndarray, str, str]], right: float) -> None:
    """Names in a column at the right, none on another, tied to their points."""
    low, high = axes.get_ylim()
    left, _ = axes.get_xlim()
    axes.set_xlim(left, right)
    heights = spread_labels([end[1] for end, _, _ in ends], (high - low) * 0.06)
    # the column as a whole stays beside the axes
    shift = min(0.0, high - max(heights)) + max(0.0, low - min(heights))
    for (end, label, colour), height in zip(ends, heights):
        axes.annotate(
            label, xy=end, xytext=(right + 0.02 * (right - left), height + shift), annotation_clip=False, va="center",
            color=colour, arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "lw": 0.7, "relpos": (0, 0.5)},
        )  # fmt: skip
